"""How an engine is built from a bundle's graph: `engine/recipe.json`, read strictly, and the profiles that follow from
the bundle's limits.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import LlamaExportError
from ..names import MODULES, TRT
from .bundle import RECIPE_FILE, Bundle, Limits, Shape
from .decode_json import decode

SCHEMA_VERSION = 1
PREFILL, DECODE = "prefill", "decode"
"""The profiles of every engine, in this order: many tokens of one text, one token of each of several texts."""

IDS, POSITIONS, KEPT = "input_ids", "position_ids", "logits_positions"
"""The inputs of the TensorRT dialects beside the cache."""

FLAGS = ("FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
"""Of the builder, in a network that is not strongly typed."""

_CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]")
_MOST_BYTES = 1 << 20
_MOST_MEMORY = 1 << 50
"""More than any device has; what is much larger fits no number of the builder's."""
_USUAL_PAST = 1024


@dataclass(frozen=True)
class Extent:
    """The shapes of one input for which an engine is built."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The shapes of all inputs for one way of running."""

    name: str
    inputs: Mapping[str, Extent]


@dataclass(frozen=True)
class Recipe:
    """All that building an engine takes beside the graph.

    module, version: as in `bundle.EngineRecord`. compute_capability: the GPUs to build for. strongly_typed: the graph's
    types are kept; otherwise `flags`, of `FLAGS`, allow lower precision. float32_layers: name parts of layers that
    stay in float32 in a network that is not strongly typed. build_memory_bytes: what the builder takes, an estimate.
    """

    module: str
    version: str
    compute_capability: tuple[str, ...]
    strongly_typed: bool
    flags: tuple[str, ...]
    float32_layers: tuple[str, ...]
    workspace_bytes: int
    optimization_level: int
    build_memory_bytes: int
    profiles: tuple[Profile, ...]
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Indented JSON, the same for equal recipes."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def read_recipe(bundle: Bundle) -> Recipe:
    """The bundle's recipe. Raises LlamaExportError when it is not valid, or is not that of the bundle."""
    path = bundle.file(RECIPE_FILE)
    try:
        data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
        recipe = decode(Recipe, json.loads(data), RECIPE_FILE)
    except (OSError, ValueError, RecursionError) as error:
        raise LlamaExportError(f"{path} is no recipe ({error}); copy the bundle again.") from error
    for problem in _problems(recipe, bundle):
        raise LlamaExportError(f"{path}: {problem}; build the bundle again.")
    return recipe


def _problems(recipe: Recipe, bundle: Bundle) -> Iterator[str]:
    manifest = bundle.manifest
    engine = manifest.engine
    if recipe.schema_version != SCHEMA_VERSION:
        yield f"schema_version must be {SCHEMA_VERSION}, not {recipe.schema_version}"
    if engine is None or (recipe.module, recipe.version) != (engine.module, engine.version):
        yield "module and version are not those of the manifest"
    if recipe.module not in MODULES.values():
        yield f"module must be one of {', '.join(MODULES.values())}, not {recipe.module!r}"
    if recipe.profiles != profiles_of(manifest.dialect, manifest.shape, manifest.limits):
        yield "the profiles are not those that follow from the manifest's limits"
    if not 0 <= recipe.optimization_level <= 5:
        yield f"optimization_level must be from 0 to 5, not {recipe.optimization_level}"
    for flag in recipe.flags:
        if recipe.strongly_typed or flag not in FLAGS:
            yield f"flags has {flag!r}, but only what is not strongly typed has any, of {', '.join(FLAGS)}"
    for capability in recipe.compute_capability:
        if not _CAPABILITY.fullmatch(capability):
            yield f"compute_capability has {capability!r} where one such as 8.7 should be"
    for name in ("workspace_bytes", "build_memory_bytes"):
        if not 0 <= getattr(recipe, name) <= _MOST_MEMORY:
            yield f"{name} must be from 0 to {_MOST_MEMORY}"


def profiles_of(dialect: str, shape: Shape, limits: Limits) -> tuple[Profile, ...]:
    """The two profiles of a bundle: `PREFILL` reads chunks of one text, `DECODE` one token of up to `batch` texts."""
    chunk, batch = limits.prefill_chunk, limits.batch
    return (
        Profile(PREFILL, _inputs(dialect, shape, limits, (1, 1, 1), (1, chunk, chunk), kept=(1, 1, chunk))),
        Profile(DECODE, _inputs(dialect, shape, limits, (1, batch, batch), (1, 1, 1), kept=(1, 1, 1))),
    )


def _inputs(
    dialect: str,
    shape: Shape,
    limits: Limits,
    rows: tuple[int, int, int],
    tokens: tuple[int, int, int],
    kept: tuple[int, int, int],
) -> dict[str, Extent]:
    """Every input's extent; rows, tokens, kept: least, usual and most."""
    static = dialect == TRT
    past = (limits.context,) * 3 if static else (1, min(_USUAL_PAST, limits.context), limits.context)

    def extent(*sizes: tuple[int, int, int]) -> Extent:
        least, usual, most = zip(*sizes, strict=True)
        return Extent(least, usual, most)

    cache = extent(rows, (shape.kv_heads,) * 3, past, (shape.head_dim,) * 3)
    names = (f"past_key_values.{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value"))
    inputs: dict[str, Any] = {IDS: extent(rows, tokens), POSITIONS: extent(rows, tokens), KEPT: extent(rows, kept)}
    return {**inputs, **dict.fromkeys(names, cache)}
