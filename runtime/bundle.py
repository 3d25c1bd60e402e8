"""What a bundle is: a folder whose `manifest.json` says what every other file is, read strictly and written last."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LlamaExportError, UsageError
from ..names import BACKENDS, DIALECTS, MODULES, ONNXRUNTIME, RTN
from .decode_json import decode
from .hashing import sha256_of_all

SCHEMA_VERSION = 1
MAX_BATCH = 1 << 12
"""Texts at once."""
MANIFEST = "manifest.json"
GRAPH_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
"""The graph, and next to it its weights."""
ADAPTERS = "adapters"
"""The folder of the adapters that lie beside the weights."""
REFERENCE, REFERENCE_FILES = "reference", ("exact.npz", "original.npz")
"""The folder of what PyTorch computed, and what is in it; the same again for each adapter, see `reference_file`."""
QUALITY_FILE = "quality.json"
"""What quantisation cost; only in quantised bundles."""
USED_FILES = (
    GRAPH_FILE,
    DATA_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    QUALITY_FILE,
    *(f"{REFERENCE}/{name}" for name in REFERENCE_FILES),
)
"""What the runtime reads where it is there, so the manifest has to know it; and so of the reference of each adapter."""

ENGINES, RECIPE_FILE = "engine", "engine/recipe.json"
"""The folder of engines built ahead of time, and how to build one on the device."""
CACHE_DTYPES = ("float32", "float16", "int8")
CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
"""The execution providers of ONNX Runtime that a bundle may ask for."""

_MAX_MANIFEST_BYTES = 4 << 20
_UNUSABLE = re.compile(r'[\\:*?"<>|\x00-\x1f\ud800-\udfff]|[. ]\Z')
"""In a part of a path: what Windows takes for something else, drops (at the end), or no system can write."""
_PORTS = (f"{port}{one}" for port in ("COM", "LPT") for one in "123456789¹²³")
_DEVICES = frozenset(("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", *_PORTS))
"""What Windows opens for these names in any folder, with any extension (Python's os.path.isreserved)."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,7}")


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle. sha256: 64 lower-case hexadecimal digits; size: bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class ModelRecord:
    """Where the weights came from. source: the kind of checkpoint: "folder", "hub" or "gguf"; licence: as the
    checkpoint names it; duties: what that asks of a deployer, sentences for people; sha256: of the checkpoint, see
    `export.identity.model_sha256`, None in bundles of old.
    """

    id: str
    source: str
    revision: str | None = None
    licence: str | None = None
    duties: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def licence_told(self) -> str:
        """The licence, for people."""
        return self.licence or "not told by the checkpoint; find out before you hand the model on"


@dataclass(frozen=True)
class AdapterRecord:
    """A LoRA adapter of the bundle. base: the model that it says it was trained on; weight: by which it is multiplied;
    rank: its largest; sha256: of the file that it came from; file: of its matrices in the bundle, None where they are
    merged into the weights; licence: as the adapter's folder names it.
    """

    name: str
    base: str | None
    weight: float
    rank: int
    sha256: str
    file: str | None = None
    licence: str | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of the model. cache_dtype: float32, float16 or int8, the type of the past_key_values inputs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    cache_dtype: str

    @property
    def activations(self) -> str:
        """The type that the graph computes in: float32 or float16."""
        return activations_beside(self.cache_dtype)


@dataclass(frozen=True)
class Limits:
    """context: tokens that the cache can hold; batch: rows; prefill_chunk: prompt tokens given to the model at once."""

    context: int
    batch: int = 1
    prefill_chunk: int = 512


@dataclass(frozen=True)
class Tokens:
    """Ids with a meaning. eos: every id that ends an answer; add_bos: whether tokenizer.json puts BOS before a text."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    add_bos: bool


@dataclass(frozen=True)
class PlanRecord:
    """A serialized engine. file: in the bundle; compute_capability: the GPUs that it is for ("8.9"); version: of the
    module that built it; platform: that it was built on ("linux-x86_64").
    """

    file: str
    compute_capability: tuple[str, ...]
    version: str
    platform: str


@dataclass(frozen=True)
class EngineRecord:
    """Engines of a bundle for TensorRT. module: "tensorrt" or "tensorrt_rtx"; version: the release that the graph is
    made for; plans: built ahead of time, none where the device builds by `RECIPE_FILE`.
    """

    module: str
    version: str
    plans: tuple[PlanRecord, ...] = ()


@dataclass(frozen=True)
class Quantisation:
    """What chose the codes of weights. method: one of `names.METHODS`, or of a newer version's; version: of its
    algorithm; text_sha256, tokens: of the text that codes or channel scales come from, None and 0 where they did
    without.
    """

    method: str
    version: int
    text_sha256: str | None = None
    tokens: int = 0

    @property
    def retold(self) -> bool:
        """Whether a checkpoint and the formats alone give the same codes again, on every machine."""
        return self.method == RTN and self.text_sha256 is None


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, schema version 1. Instances are always valid: construction raises LlamaExportError otherwise.

    minimum: lowest versions that run the bundle, for "python" and "onnxruntime"; providers: ONNX Runtime's execution
    providers in order, the first one is required; adapters: LoRA adapters, merged or to choose from; backend: what the
    bundle is made for, one of `names.BACKENDS`; engine: what TensorRT needs, None for ONNX Runtime; files: every file
    but the manifest, by path with forward slashes; tools: versions of what made the bundle; notes: sentences for
    people; quantisation: of weights, None where nothing rounded them and in bundles of old.
    """

    model: ModelRecord
    target: str
    dialect: str
    precision: str
    shape: Shape
    limits: Limits
    tokens: Tokens
    minimum: Mapping[str, str] = field(default_factory=dict)
    providers: tuple[str, ...] = ()
    adapters: tuple[AdapterRecord, ...] = ()
    backend: str = ONNXRUNTIME
    engine: EngineRecord | None = None
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    quantisation: Quantisation | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise LlamaExportError(f"{MANIFEST}: {problem}.")

    @property
    def provider(self) -> str:
        """The execution provider without which the bundle does not run."""
        return self.providers[0] if self.providers else CPU_PROVIDER

    @property
    def choices(self) -> tuple[AdapterRecord, ...]:
        """The adapters that lie beside the weights, of which one can be chosen."""
        return tuple(adapter for adapter in self.adapters if adapter.file is not None)

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Read a manifest. Raises LlamaExportError when it is not JSON, of a newer schema, or in any way not valid."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LlamaExportError(f"{MANIFEST} is not valid JSON ({error}); build the bundle again.") from error
        version = value.get("schema_version") if isinstance(value, dict) else None
        if type(version) is int and version > SCHEMA_VERSION:
            raise LlamaExportError(
                f"The bundle has schema version {version}, but this llama-export reads up to {SCHEMA_VERSION}; "
                "upgrade it with `pip install --upgrade llama-export`."
            )
        if version != SCHEMA_VERSION:
            raise LlamaExportError(f"{MANIFEST} must have schema_version {SCHEMA_VERSION}, not {version!r}.")
        return decode(Manifest, value, MANIFEST)

    def to_json(self) -> str:
        """Return the manifest as indented JSON text with the schema version first; the same for equal manifests."""
        value: dict[str, Any] = {"schema_version": self.schema_version, **dataclasses.asdict(self)}
        value["files"] = dict(sorted(value["files"].items()))
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _problems(manifest: Manifest) -> Iterator[str]:
    """Yield what is wrong with the values of a manifest, beyond their types."""
    shape, limits, tokens = manifest.shape, manifest.limits, manifest.tokens
    bounds = (
        ("shape.layers", shape.layers, 1, 1 << 12),
        ("shape.hidden", shape.hidden, 1, 1 << 20),
        ("shape.heads", shape.heads, 1, 1 << 14),
        ("shape.kv_heads", shape.kv_heads, 1, shape.heads),
        ("shape.head_dim", shape.head_dim, 1, 1 << 14),
        ("shape.ffn", shape.ffn, 1, 1 << 24),
        ("shape.vocab", shape.vocab, 1, 1 << 24),
        ("limits.context", limits.context, 1, 1 << 24),
        ("limits.batch", limits.batch, 1, MAX_BATCH),
        ("limits.prefill_chunk", limits.prefill_chunk, 1, 1 << 24),
        *((f"tokens.{name}", value, 0, shape.vocab - 1) for name, value in _token_ids(tokens)),
        *((f"files[{name!r}].size", record.size, 0, 1 << 62) for name, record in manifest.files.items()),
    )
    for name, value, low, high in bounds:
        if not low <= value <= high:
            yield f"{name} must be from {low} to {high}, not {value}"
    if shape.heads % shape.kv_heads:
        yield f"shape.heads ({shape.heads}) must be a multiple of shape.kv_heads ({shape.kv_heads})"
    if manifest.dialect not in DIALECTS:
        yield f"dialect must be one of {', '.join(DIALECTS)}, not {manifest.dialect!r}"
    elif manifest.dialect not in BACKENDS.get(manifest.backend, ()):
        yield f"backend {manifest.backend!r} must be one that takes the dialect {manifest.dialect!r}"
    yield from _engine_problems(manifest)
    if shape.cache_dtype not in CACHE_DTYPES:
        yield f"shape.cache_dtype must be one of {', '.join(CACHE_DTYPES)}, not {shape.cache_dtype!r}"
    for name, version in manifest.minimum.items():
        if not _VERSION.fullmatch(version):
            yield f"minimum.{name} must be a version such as 1.23.2, not {version!r}"
    yield from _file_problems(manifest.files)
    names = [adapter.name for adapter in manifest.adapters]
    distinct = len({name.casefold() for name in names}) == len(names)
    if not distinct or not all(is_safe_name(name) and "/" not in name for name in names):
        yield f"adapters must have names of their own that can name a file, not {', '.join(map(repr, names))}"


def _file_problems(files: Mapping[str, FileRecord]) -> Iterator[str]:
    for name, record in files.items():
        if not is_safe_name(name):
            yield f"files has the path {name!r}, which does not name a file inside the bundle"
        if not _SHA256.fullmatch(record.sha256):
            yield f"files[{name!r}].sha256 must be 64 hexadecimal digits"
    for name, other in same_elsewhere(files):
        yield f"files has {name!r} and {other!r}, which are one file where case does not count"


def _engine_problems(manifest: Manifest) -> Iterator[str]:
    engine = manifest.engine
    if engine is None:
        if manifest.backend in MODULES:
            yield f"engine must be there for the backend {manifest.backend!r}"
        return
    if engine.module != MODULES.get(manifest.backend):
        yield f"engine.module {engine.module!r} does not fit the backend {manifest.backend!r}"
    for version in (engine.version, *(plan.version for plan in engine.plans)):
        if not _VERSION.fullmatch(version):
            yield f"engine has {version!r} where a version such as 10.3.0 should be"
    for plan in engine.plans:
        if not is_safe_name(plan.file) or not plan.file.startswith(f"{ENGINES}/"):
            yield f"engine.plans names {plan.file!r}, which is no file in the folder {ENGINES}"


def _token_ids(tokens: Tokens) -> Iterator[tuple[str, int]]:
    for name, value in (("bos", tokens.bos), ("pad", tokens.pad)):
        if value is not None:
            yield name, value
    yield from (("eos", value) for value in tokens.eos)


def activations_beside(cache_dtype: str) -> str:
    """The type that a graph with this cache computes in: a cache in int8 is there for float32 alone."""
    return "float32" if cache_dtype == "int8" else cache_dtype


def adapter_file(name: str) -> str:
    """Where an adapter lies in a bundle."""
    return f"{ADAPTERS}/{name}.npz"


def reference_file(kind: str, adapter: str | None = None) -> str:
    """Where the reference of this kind (`reference.KINDS`) lies in a bundle, or that of one of its adapters."""
    folder = REFERENCE if adapter is None else f"{REFERENCE}/{ADAPTERS}/{adapter}"
    return f"{folder}/{kind}.npz"


def is_safe_name(name: str) -> bool:
    """Tell whether `name` is a relative path with forward slashes that stays in its folder on every system, and names
    a file there: on Windows neither a device, nor the same as another name.
    """
    return name.casefold() != MANIFEST and not any(
        not part or _UNUSABLE.search(part) is not None or part.partition(".")[0].rstrip(" ").upper() in _DEVICES
        for part in name.split("/")
    )


def same_elsewhere(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names that differ in nothing but case."""
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(name.casefold(), name)) != name:
            yield other, name


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. path: its folder, absolute; manifest_sha256: what names this bundle in caches."""

    path: Path
    manifest: Manifest
    manifest_sha256: str

    def file(self, name: str) -> Path:
        """Return the path of a file that the manifest lists; LlamaExportError when it lists no such file."""
        if name not in self.manifest.files:
            raise LlamaExportError(f"The bundle {self.path} has no {name}; build it again.")
        return self.path / name


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and check the manifest of the bundle in the folder `path`; contents of other files are not read.

    Raises UsageError when there is no such folder, LlamaExportError when it is no bundle, is of a newer schema, or
    names a file outside the folder, also through a symbolic link.
    """
    folder = Path(path)
    with contextlib.suppress(RuntimeError):  # nobody is called so, or this user has no home
        folder = folder.expanduser()
    how = f"make one with `llama-export build -m MODEL -t TARGET -o {path}`"
    if not folder.exists():
        raise UsageError(f"There is no bundle {path}; {how}.")
    if not folder.is_dir():
        raise UsageError(f"{path} is a file, but a bundle is a folder; {how}.")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise LlamaExportError(f"{path} is not a bundle, as it has no {MANIFEST}; {how}.")
    try:
        size = manifest.stat().st_size
        data = manifest.read_bytes() if size <= _MAX_MANIFEST_BYTES else b""
    except OSError as error:
        raise LlamaExportError(f"{manifest} cannot be read: {error.strerror}.") from error
    if size > _MAX_MANIFEST_BYTES:
        raise LlamaExportError(f"{manifest} has {size} bytes, more than any manifest needs; build the bundle again.")
    bundle = Bundle(folder.resolve(), Manifest.from_json(data), hashlib.sha256(data).hexdigest())
    for name in (MANIFEST, *bundle.manifest.files):
        refuse_escape(bundle.path, name)
        _refuse_device(bundle.path / name)
    for adapter in bundle.manifest.choices:
        bundle.file(str(adapter.file))
    if (engine := bundle.manifest.engine) is not None:
        for name in (RECIPE_FILE, *(plan.file for plan in engine.plans)):
            bundle.file(name)
    for name in _used_files(bundle.manifest):
        if name not in bundle.manifest.files and os.path.lexists(bundle.path / name):
            raise LlamaExportError(
                f"{bundle.path / name} is not in the bundle's {MANIFEST}, so nothing vouches for it; "
                "copy the bundle again."
            )
    return bundle


def _used_files(manifest: Manifest) -> Iterator[str]:
    yield from USED_FILES
    for adapter in manifest.choices:
        yield from (f"{REFERENCE}/{ADAPTERS}/{adapter.name}/{name}" for name in REFERENCE_FILES)


def _refuse_device(path: Path) -> None:
    """A pipe or a device would never end; a file that is missing is told of where it is needed."""
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise LlamaExportError(f"{path} is not a plain file; copy the bundle again.")


def refuse_escape(folder: Path, name: str) -> None:
    """Raise LlamaExportError when the file `name` of a bundle is a link that leads out of its folder, or nowhere."""
    path = folder / name
    try:
        inside = path.resolve().is_relative_to(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links, before Python 3.13
        raise LlamaExportError(f"{path} is a link that leads nowhere; copy the bundle again.") from error
    if not inside:
        raise LlamaExportError(
            f"{path} is a link that leads out of the bundle; copy the bundle with its links followed (cp -rL)."
        )


def seal(folder: str | os.PathLike[str], manifest: Manifest) -> Manifest:
    """Record every file of `folder` in `manifest.files` and write `manifest.json`, last and atomically.

    manifest: all but `files`, which is replaced. Returns the manifest as written. Raises LlamaExportError when a file
    cannot be read or named.
    """
    root = Path(folder).resolve()
    part = root / f"{MANIFEST}.part"
    files = [Path(base) / name for base, _, names in os.walk(root) for name in names]
    paths = {path.relative_to(root).as_posix(): path for path in sorted(files) if path not in (root / MANIFEST, part)}
    for name in paths:
        refuse_escape(root, name)
    hashes = sha256_of_all(paths.values())
    records = {name: FileRecord(hashes[path], path.stat().st_size) for name, path in paths.items()}
    sealed = dataclasses.replace(manifest, files=dict(sorted(records.items())))
    # backslashreplace: half a surrogate pair, as in a folder's name that is not UTF-8, becomes JSON's own escape.
    with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(sealed.to_json())
        file.flush()
        os.fsync(file.fileno())
    part.replace(root / MANIFEST)
    return sealed
