"""Running the graph of an `ort` bundle: one session, and a cache that every call updates in place.

GroupQueryAttention writes the new keys and values into its past buffer when `present.*` is bound to the same memory,
so a step copies nothing. The buffers are as long as the context; `attention_mask` tells how much of them is valid.
Rewinding is therefore only a smaller length, and positions past it are overwritten by the next tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import LlamaExportError, UsageError
from .bundle import Bundle, Manifest
from .cache import lazy_zeros
from .huge_pages import gather_in_background
from .requirements import require
from .threads import physical_cores

Float32 = npt.NDArray[np.float32]
TokenIds = Sequence[int] | npt.NDArray[np.int64]

DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
"""Where the cache lives, for each execution provider that a bundle may ask for."""

_SILENT = 4  # ONNX Runtime's severity "fatal": its errors arrive as exceptions, its warnings are for builders


class Backend(Protocol):
    """What generation needs of an engine: one sequence of tokens, its cache, and the logits after each of them.

    Not for use from several threads at once.
    """

    name: str
    threads: int
    capacity: int
    vocab: int
    length: int

    def extend(self, ids: TokenIds, keep: int = 1) -> Float32:
        """Append tokens to the sequence; return float32 [keep, vocab], the logits after each of the last `keep`."""

    def step(self, token: int) -> Float32:
        """Append one token; return float32 [vocab], the logits after it, valid until the next call."""

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""


class OnnxRuntimeBackend:
    """A `Backend` on ONNX Runtime, CPU or CUDA as the manifest's first provider says."""

    name: str
    threads: int
    capacity: int
    vocab: int
    length: int

    def __init__(
        self,
        bundle: Bundle,
        *,
        model: Path | bytes | None = None,
        threads: int | None = None,
        capacity: int | None = None,
    ) -> None:
        """Load the graph.

        model: another graph than the bundle's model.onnx, by path or as bytes, with the same inputs and outputs;
        bytes find their external data in the bundle's folder. threads: default, the physical cores. capacity: tokens
        that the cache holds; default and at most, the manifest's context. Raises LlamaExportError when ONNX Runtime,
        its version, its providers or the graph do not fit the manifest, UsageError when an argument is out of range.
        """
        manifest = bundle.manifest
        self.threads = physical_cores() if threads is None else threads
        if not 1 <= self.threads <= 1024:
            raise UsageError(f"threads must be from 1 to 1024, not {threads}.")
        self.capacity = manifest.limits.context if capacity is None else capacity
        if not 1 <= self.capacity <= manifest.limits.context:
            raise UsageError(
                f"capacity must be from 1 to the bundle's context {manifest.limits.context}, not {capacity}."
            )
        self._ort = import_onnxruntime(manifest)
        self._device = _device(self._ort, manifest)
        self._session = open_session(self._ort, bundle, model or bundle.file("model.onnx"), self.threads)
        _check_signature(self._session, manifest)
        self.name = f"onnxruntime {self._ort.__version__} {self._device}"
        self.vocab = manifest.shape.vocab
        self.length = 0
        self._chunk = min(manifest.limits.prefill_chunk, self.capacity)
        self._ids = np.zeros((1, self._chunk), np.int64)
        self._mask = np.ones((1, self.capacity), np.int64)
        self._keep = np.ones(1, np.int64)
        self._logits_dtype = np.dtype("float16" if "float16" in self._session.get_outputs()[0].type else "float32")
        self._last = np.zeros((1, 1, self.vocab), self._logits_dtype)
        self._cache = self._make_cache(manifest)
        self._binding = self._bind()
        gather_in_background()

    def extend(self, ids: TokenIds, keep: int = 1) -> Float32:
        """Append tokens, a chunk at a time; see `Backend.extend`.

        Only the last `keep` positions pay for the output head. Raises UsageError when a token is not in the
        vocabulary, the sequence would exceed the capacity, or `keep` is not from 1 to the number of tokens.
        """
        tokens = np.asarray(ids, np.int64).reshape(-1)
        count = len(tokens)
        if not 1 <= keep <= count:
            raise UsageError(f"keep must be from 1 to the number of tokens {count}, not {keep}.")
        if tokens.min() < 0 or tokens.max() >= self.vocab:
            raise UsageError(f"Token ids must be from 0 to {self.vocab - 1}.")
        self._require_room(count)
        logits = np.empty((keep, self.vocab), np.float32)
        for start in range(0, count, self._chunk):
            part = tokens[start : start + self._chunk]
            stop = start + len(part)
            first = max(start, count - keep)  # of the positions wanted from this chunk
            rows = self._run(part, max(1, stop - first))
            if first < stop:
                logits[first - count + keep : stop - count + keep] = rows
        return logits

    def step(self, token: int) -> Float32:
        """Append one token; see `Backend.step`. Raises UsageError as `extend` does."""
        if not 0 <= token < self.vocab:
            raise UsageError(f"Token ids must be from 0 to {self.vocab - 1}, not {token}.")
        self._require_room(1)
        self._ids[0, 0] = token
        self._run_bound(1)
        logits: Float32 = self._last[0, 0].astype(np.float32, copy=False)
        return logits

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; free. Raises UsageError when the sequence is shorter."""
        if not 0 <= length <= self.length:
            raise UsageError(f"The sequence can be rewound to a length from 0 to {self.length}, not {length}.")
        self.length = length

    def _require_room(self, count: int) -> None:
        if self.length + count > self.capacity:
            raise UsageError(
                f"{self.length} tokens and {count} more exceed the context of {self.capacity}; "
                "use a shorter text or build with a larger --context."
            )

    def _run(self, tokens: npt.NDArray[np.int64], keep: int) -> npt.NDArray[Any]:
        """Run one chunk; return [keep, vocab] logits in the graph's type."""
        self._ids[0, : len(tokens)] = tokens
        rows: npt.NDArray[Any]
        if keep == 1:
            self._run_bound(len(tokens))
            rows = self._last[0]
            return rows
        try:
            self._bind_keep(keep)
            self._run_bound(len(tokens))
            rows = self._binding.get_outputs()[-1].numpy()[0]  # in the order of the first binding: logits come last
            return rows
        finally:
            self._bind_keep(1)

    def _run_bound(self, count: int) -> None:
        """Run the first `count` of the prepared ids; the logits go where they are bound."""
        total = self.length + count
        binding = self._binding
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, count), self._ids.ctypes.data)
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, total), self._mask.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise one_sentence(self._ort, "cannot run the model", error) from error
        self.length = total  # only now: an interrupted run leaves the sequence as it was

    def _bind(self) -> Any:
        binding = self._session.io_binding()
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._binding = binding
        self._bind_keep(1)
        return binding

    def _bind_keep(self, keep: int) -> None:
        """Ask for the logits of the last `keep` positions: one into our buffer, more into one of ONNX Runtime's.

        It takes no buffer that is larger than the declared [batch, 1, vocab].
        """
        self._keep[0] = keep
        binding, last = self._binding, self._last
        binding.bind_input("logits_to_keep", "cpu", 0, np.int64, (1,), self._keep.ctypes.data)
        if keep == 1:
            binding.bind_output("logits", "cpu", 0, last.dtype.type, last.shape, last.ctypes.data)
        else:
            binding.bind_output("logits", "cpu")

    def _make_cache(self, manifest: Manifest) -> dict[str, Any]:
        """Return the buffers of every layer, [1, kv_heads, capacity, head_dim], as OrtValues on the device."""
        shape = (1, manifest.shape.kv_heads, self.capacity, manifest.shape.head_dim)
        dtype = np.dtype(manifest.shape.cache_dtype)
        make = self._ort.OrtValue.ortvalue_from_numpy  # on the CPU it shares and keeps the array, elsewhere it copies
        return {
            f"{layer}.{kind}": make(lazy_zeros(shape, dtype), self._device, 0)
            for layer in range(manifest.shape.layers)
            for kind in ("key", "value")
        }


def import_onnxruntime(manifest: Manifest) -> Any:
    """Import onnxruntime and check its version. Raises LlamaExportError when it is absent, broken or too old."""
    try:
        import onnxruntime  # noqa: PLC0415 (a bundle can be opened, checked and described without it)
    except ImportError as error:
        raise LlamaExportError(
            f"ONNX Runtime cannot be imported ({error}); install it with `pip install 'llama-export[cpu]'`, "
            "or [gpu] for CUDA."
        ) from error
    remedy = "upgrade it with `pip install --upgrade onnxruntime`"
    require("onnxruntime", onnxruntime.__version__, manifest.minimum.get("onnxruntime"), remedy)
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def _device(ort: Any, manifest: Manifest) -> str:
    """Return the device of the manifest's first provider, which must be known and installed."""
    provider = manifest.providers[0] if manifest.providers else "CPUExecutionProvider"
    if provider not in DEVICES:
        raise LlamaExportError(f"This bundle asks for {provider}, but only {', '.join(DEVICES)} can be used.")
    available = ort.get_available_providers()
    if provider not in available:
        raise LlamaExportError(
            f"This bundle needs {provider}, but onnxruntime {ort.__version__} here has {', '.join(available)}; "
            "install llama-export[gpu] instead of [cpu], or build a bundle with `-t cpu`."
        )
    return DEVICES[provider]


def open_session(ort: Any, bundle: Bundle, model: Path | bytes, threads: int) -> Any:
    """Load a graph for `bundle`: its own by path, or another as bytes whose weights are in the bundle's folder."""
    _device(ort, bundle.manifest)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    if isinstance(model, bytes):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    providers = list(bundle.manifest.providers) or ["CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(model if isinstance(model, bytes) else str(model), options, providers=providers)
    except Exception as error:
        raise one_sentence(ort, f"cannot load the model of {bundle.path}", error) from error
    if providers[0] not in session.get_providers():
        raise LlamaExportError(
            f"onnxruntime {ort.__version__} has {providers[0]}, but could not start it here; "
            "check the GPU's driver and libraries with `llama-export doctor`."
        )
    return session


def _check_signature(session: Any, manifest: Manifest) -> None:
    """Raise LlamaExportError unless the graph has the inputs of the `ort` dialect in the manifest's sizes."""
    if manifest.dialect != "ort":
        raise LlamaExportError(f"ONNX Runtime runs bundles of the dialect 'ort', but this one is {manifest.dialect!r}.")
    shape = manifest.shape
    cache = (None, shape.kv_heads, None, shape.head_dim)
    expected: dict[str, tuple[int | None, ...]] = {
        "input_ids": (None, None),
        "attention_mask": (None, None),
        "logits_to_keep": (1,),
        **{f"past_key_values.{layer}.{kind}": cache for layer in range(shape.layers) for kind in ("key", "value")},
    }
    found = {value.name: value.shape for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found or not _fits(found[name], expected[name]):
            raise LlamaExportError(
                f"The graph does not fit its manifest: the input {name} should be {expected.get(name, 'absent')} "
                f"and is {found.get(name, 'absent')}; build the bundle again."
            )


def _fits(dims: Sequence[object], expected: Sequence[int | None]) -> bool:
    """Tell whether the dims of an input (a name where one is free) allow the expected ones (None is any)."""
    return len(dims) == len(expected) and all(
        want is None or want == have or not isinstance(have, int) for have, want in zip(dims, expected, strict=True)
    )


def one_sentence(ort: Any, what: str, error: Exception) -> LlamaExportError:
    """Return ONNX Runtime's exception as ours, its message cut to the first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return LlamaExportError(f"onnxruntime {ort.__version__} {what}: {lines[0][:400]}")
