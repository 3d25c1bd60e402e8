"""From a bundle's graph to a session of ONNX Runtime: what every use of a bundle checks before it computes.

A manifest and a graph are untrusted. ONNX Runtime itself follows a tensor's file wherever it says, at least up to 1.23,
so the places of all weights are read here first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LlamaExportError
from ..names import ORT, TRT, TRT_PRIMITIVE
from .adapters import adapter_inputs
from .bundle import CPU_PROVIDER, CUDA_PROVIDER, DATA_FILE, GRAPH_FILE, Bundle, Manifest, Shape, refuse_escape
from .cache_graph import with_float_cache
from .cpu_graph import for_cpu
from .onnx_file import Initializer, external_initializers, with_accuracy_level
from .recipe import IDS, KEPT, POSITIONS
from .requirements import require, require_python

DEVICES = {CPU_PROVIDER: "cpu", CUDA_PROVIDER: "cuda"}
"""Where each execution provider has its memory."""

PAST, PRESENT = "past_key_values.", "present."
"""What stands before a name of the cache, as an input and as an output of the graph."""

LEAST: Mapping[str, str] = {ORT: "1.23.2", TRT: "1.25.0", TRT_PRIMITIVE: "1.23.2"}
"""The oldest onnxruntime that runs each dialect: TensorScatter of opset 24 came with 1.25.0."""

_MAX_GRAPH_BYTES = 256 << 20
_LOGITS_RANK = 3
_SILENT = 4  # ONNX Runtime's severity "fatal": its errors arrive as exceptions, its warnings are for builders


def cache_names(shape: Shape) -> tuple[str, ...]:
    """The parts of the cache in the order of the graph's inputs: "0.key", "0.value", "1.key", ..."""
    return tuple(f"{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value"))


def import_onnxruntime(manifest: Manifest) -> Any:
    """Import onnxruntime for a bundle.

    Raises LlamaExportError unless this Python and this onnxruntime are new enough, and it has the provider that the
    bundle asks for.
    """
    require_python(manifest.minimum.get("python"))
    if manifest.provider not in DEVICES:
        raise LlamaExportError(f"This bundle asks for {manifest.provider}, but only {', '.join(DEVICES)} can be used.")
    onnxruntime = onnxruntime_module()
    version, available = onnxruntime.__version__, onnxruntime.get_available_providers()
    remedy = "upgrade it with `pip install --upgrade onnxruntime`"
    for least in (manifest.minimum.get("onnxruntime"), LEAST[manifest.dialect]):
        require("onnxruntime", version, least, remedy)
    if manifest.provider not in available:
        raise LlamaExportError(
            f"This bundle needs {manifest.provider}, but onnxruntime {version} here has {', '.join(available)}; "
            "install llama-export[gpu] instead of [cpu], or build a bundle with `-t cpu`."
        )
    return onnxruntime


def onnxruntime_module() -> Any:
    """Import onnxruntime; LlamaExportError when it is missing or does not work."""
    try:
        import onnxruntime  # noqa: PLC0415 (a bundle can be opened, checked and described without it)

        onnxruntime.get_available_providers()
        onnxruntime.disable_telemetry_events()
    except ModuleNotFoundError as error:
        raise LlamaExportError(
            f'ONNX Runtime cannot be imported ({error}); install it with `pip install "llama-export[cpu]"`, '
            "or [gpu] for CUDA."
        ) from error
    except Exception as error:  # a broken installation raises what its parts raise
        raise LlamaExportError(
            f"ONNX Runtime is installed but does not work ({type(error).__name__}: {error}); "
            "`llama-export doctor` says how to mend it."
        ) from error
    return onnxruntime


def engine_name(ort: Any, manifest: Manifest) -> str:
    """What computes a bundle: "onnxruntime 1.32.0 cpu"."""
    return f"onnxruntime {ort.__version__} {DEVICES[manifest.provider]}"


def open_session(
    bundle: Bundle,
    graph: bytes,
    threads: int,
    *,
    exact: bool = False,
    provider_options: Mapping[str, str] | None = None,
) -> Any:
    """Load `graph`, the bundle's own or another one for the same weights, and return its session.

    exact: with kernels that compute in full precision, instead of those that ship, and a cache in the dtype of
    activations, which then the inputs of the cache have. provider_options: of the bundle's
    first provider. A graph for TensorRT is changed in memory where this processor needs it, see `cpu_graph`. Raises
    LlamaExportError as `import_onnxruntime` does, when a weight lies outside of the bundle's data file, and when ONNX
    Runtime cannot load the graph or its inputs do not fit the manifest.
    """
    ort, provider = import_onnxruntime(bundle.manifest), bundle.manifest.provider
    weights = weight_places(bundle, graph)
    if bundle.manifest.dialect != ORT:
        graph = for_cpu(graph, weights, exact=exact)
    elif exact:
        graph = with_float_cache(with_accuracy_level(graph, 0))
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = not exact  # such kernels unpack whole matrices, which an arena would keep
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _SILENT
    # Of the products that ONNX Runtime itself makes of DequantizeLinear and MatMul; 4 is its own default.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0" if exact else "4")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    providers = [
        (name, dict(provider_options)) if provider_options and name == provider else name
        for name in bundle.manifest.providers or (provider,)
    ]
    try:
        session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise one_sentence(ort, f"cannot load the model of {bundle.path}", error) from error
    if provider not in session.get_providers():
        raise LlamaExportError(
            f"onnxruntime {ort.__version__} has {provider}, but could not start it here; "
            "check the GPU's driver and libraries with `llama-export doctor`."
        )
    _check_signature(session, bundle.manifest)
    return session


def read_graph(bundle: Bundle) -> bytes:
    """Return the bundle's own graph, which is small beside its weights; LlamaExportError when it cannot be read."""
    path = bundle.file(GRAPH_FILE)
    try:
        if path.stat().st_size <= _MAX_GRAPH_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise LlamaExportError(f"{path} cannot be read: {error.strerror}; copy the bundle again.") from error
    raise LlamaExportError(f"{path} is larger than any graph without its weights; build the bundle again.")


def weight_places(bundle: Bundle, graph: bytes) -> dict[str, Initializer]:
    """Where the graph's weights lie in the bundle's data file; LlamaExportError when any lies elsewhere."""
    refuse_escape(bundle.path, DATA_FILE)
    try:
        size = (bundle.path / DATA_FILE).stat().st_size
    except OSError:  # without it no weight can lie there
        size = 0
    return external_initializers(graph, size)


def one_sentence(ort: Any, what: str, error: Exception) -> LlamaExportError:
    """Return ONNX Runtime's exception as ours, its message cut to the first line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return LlamaExportError(f"onnxruntime {ort.__version__} {what}: {lines[0][:400]}")


def _inputs(manifest: Manifest) -> dict[str, tuple[int | None, ...]]:
    """The inputs of a graph of the manifest's dialect, with their shapes, None where a size is free."""
    shape, rows = manifest.shape, (None, None)
    first: dict[str, tuple[int | None, ...]] = (
        {"input_ids": rows, "attention_mask": rows, "logits_to_keep": (1,)}
        if manifest.dialect == ORT
        else {IDS: rows, POSITIONS: rows, KEPT: rows}
    )
    length = manifest.limits.context if manifest.dialect == TRT else None
    cache = (None, shape.kv_heads, length, shape.head_dim)
    return {**first, **{PAST + name: cache for name in cache_names(shape)}}


def _check_signature(session: Any, manifest: Manifest) -> None:
    """Raise LlamaExportError unless the graph has the inputs of its dialect in the manifest's sizes, and logits of its
    vocabulary; inputs of adapters are checked with each adapter.
    """
    expected = _inputs(manifest)
    found = {value.name: value.shape for value in (*session.get_inputs(), *session.get_overridable_initializers())}
    if manifest.choices:
        slots = adapter_inputs(session)
        if not slots:
            raise LlamaExportError(
                f"The graph does not fit its manifest, which has the adapter {manifest.choices[0].name}: it has no "
                "inputs for adapters; build the bundle again."
            )
        found = {name: shape for name, shape in found.items() if name not in slots}
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected or name not in found or not _fits(found[name], expected[name]):
            raise LlamaExportError(
                f"The graph does not fit its manifest: the input {name} should be {expected.get(name, 'absent')} "
                f"and is {found.get(name, 'absent')}; build the bundle again."
            )
    logits = next((value.shape for value in session.get_outputs() if value.name == "logits"), None)
    if logits is None or len(logits) != _LOGITS_RANK or logits[-1] != manifest.shape.vocab:
        raise LlamaExportError(
            f"The graph does not fit its manifest: the output logits should be {(None, None, manifest.shape.vocab)} "
            f"and is {logits or 'absent'}; build the bundle again."
        )


def _fits(dims: Sequence[object], expected: Sequence[int | None]) -> bool:
    """Tell whether the dims of an input (a name where one is free) allow the expected ones (None is any)."""
    return len(dims) == len(expected) and all(
        want is None or want == have or not isinstance(have, int) for have, want in zip(dims, expected, strict=True)
    )
