"""Published speeds of other stacks beside what the planner predicts for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from .devices import load_target
from .planner_speed import Range, Step, bandwidth, dense_tflops, step_rate
from .toml_file import read_toml

_DATA = Path(__file__).with_name("planner_published.toml")
PREFILL = "prefill"


@dataclass(frozen=True)
class DecoderShape:
    """What of a model's shape decides its speed."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's projections."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.ffn

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that one token leaves, in float16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Row:
    """One published speed; the fields are explained at the top of `planner_published.toml`."""

    device: str
    stack: str
    model: str
    kind: str
    tokens_per_second: float
    weight_bits: float
    head_bits: float
    tokens: int
    source: str
    boosted: bool = False
    products: str = "fp16"
    assumed: str = ""
    exception: str = ""


@dataclass(frozen=True)
class Published:
    """All rows, and the shapes of their models by name."""

    models: Mapping[str, DecoderShape]
    rows: tuple[Row, ...]


@cache
def published() -> Published:
    """The published speeds."""
    data = read_toml(_DATA)
    models = {name: DecoderShape(**shape) for name, shape in data["models"].items()}
    return Published(MappingProxyType(models), tuple(Row(**row) for row in data["rows"]))


def predicted(row: Row) -> Range:
    """What the planner predicts for the device, model and formats of a published row.

    Reading a prompt takes the head for one token only.
    """
    shape, target = published().models[row.model], load_target(row.device)
    layers, head = shape.layers * shape.layer_weights, shape.vocab * shape.hidden
    reading = row.kind == PREFILL
    step = Step(
        weight_bytes=int((layers * row.weight_bits + head * row.head_bits) / 8),
        cache_bytes=0 if reading else row.tokens * shape.token_bytes,
        products=layers * row.tokens + head if reading else layers + head,
        layers=shape.layers,
        quantised=row.weight_bits < 16,
        tokens=row.tokens if reading else 1,
    )
    rate = step_rate(step, bandwidth(target, boosted=row.boosted), dense_tflops(target, row.products))
    assert rate is not None, f"the bandwidth of {row.device} is published"
    return rate
