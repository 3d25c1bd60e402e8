"""What is particular to each dialect when a bundle of it is made: lowering its graph, and what the manifest says of it.

Imports of the passes are inside functions: they take seconds, and only building needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from .errors import LlamaExportError
from .names import ORT, TRT, TRT_PRIMITIVE
from .optimize.plan import column_orders
from .optimize.requirements import CACHE_MINIMUM_ONNXRUNTIME, WINDOW_MINIMUM_ONNXRUNTIME
from .runtime.bundle import CUDA_PROVIDER
from .targets.tensorrt import Release

if TYPE_CHECKING:
    import onnx_ir as ir

    from .optimize.tensors import Float32
    from .optimize.trt.linear import InputScale
    from .planning import BuildPlan

SHIPPED_ACCURACY_LEVEL = {"float32": 4, "float16": 0}
"""MatMulNBits' accuracy_level by activations: on the CPU int8 activations run at the speed of memory."""


def lower(
    model: ir.Model,
    plan: BuildPlan,
    rotary: tuple[Float32, Float32],
    inputs: Mapping[str, InputScale],
    cache: Mapping[str, Float32],
) -> None:
    """Lower the canonical graph to the plan's dialect, in place.

    rotary: tables of cos and sin [context, head_dim / 2]. inputs: scales of what projections read, by weight, empty
    where that is not quantised. cache: scales of a cache in int8, empty for any other.
    """
    if plan.made.dialect == ORT:
        assert not inputs, "ONNX Runtime's kernels round activations by themselves"
        _lower_ort(model, plan, rotary, cache)
    else:
        assert not cache, "TensorRT's graphs have their cache in the dtype of activations"
        _lower_tensorrt(model, plan, rotary, inputs)
    if plan.made.release is not None:
        _refuse_unsupported(model, plan.made.release)


def _refuse_unsupported(model: ir.Model, release: Release) -> None:
    """Parsers drop what they do not know, sometimes without a word, and the engine computes something else."""
    from .optimize.operators import operators_of, unsupported  # noqa: PLC0415

    problems = unsupported(model, operators_of(release.backend, release.version))
    if problems:
        raise LlamaExportError(
            f"{release.name} does not take this model's graph: {problems[0]}; choose another --jetpack, or --backend "
            "onnxruntime."
        )


def _lower_ort(model: ir.Model, plan: BuildPlan, rotary: tuple[Float32, Float32], cache: Mapping[str, Float32]) -> None:
    from .optimize.ort import OrtOptions, lower  # noqa: PLC0415

    adapted = {name for adapter in plan.beside for name in adapter.parts}
    level = SHIPPED_ACCURACY_LEVEL[plan.made.activations]
    orders = column_orders(plan.source.tensors, plan.formats)
    recordable = CUDA_PROVIDER in plan.made.providers
    lower(model, OrtOptions(plan.formats, rotary, level, orders, adapted, recordable, cache))


def _lower_tensorrt(
    model: ir.Model, plan: BuildPlan, rotary: tuple[Float32, Float32], inputs: Mapping[str, InputScale]
) -> None:
    from .optimize import primitive, trt  # noqa: PLC0415

    orders = column_orders(plan.source.tensors, plan.formats)
    options = trt.TrtOptions(plan.formats, rotary, orders, inputs)
    if plan.made.dialect == TRT:
        trt.lower(model, options)
    else:
        primitive.lower(model, options, plan.made.opset)


def minimum_versions(plan: BuildPlan) -> dict[str, str]:
    """The lowest versions that run the bundle on a CPU, for the manifest."""
    from .runtime.session import LEAST  # noqa: PLC0415

    slides = plan.source.shape.window_in(plan.context.context) is not None
    window = slides and plan.made.dialect == ORT  # the other dialects have it in their mask
    least = WINDOW_MINIMUM_ONNXRUNTIME if window else LEAST[plan.made.dialect]
    return {"python": "3.10", "onnxruntime": CACHE_MINIMUM_ONNXRUNTIME if plan.cache == "int8" else least}


def cache_head_dim(plan: BuildPlan) -> int:
    """The head dimension that the cache has, padded where the dialect's kernels do not take the model's."""
    from .optimize.ort import odd_heads as ort  # noqa: PLC0415
    from .optimize.trt import odd_heads as trt  # noqa: PLC0415

    padded: Mapping[str, Callable[[int], int]] = {
        ORT: ort.cache_head_dim,
        TRT: trt.cache_head_dim,
        TRT_PRIMITIVE: lambda head_dim: head_dim,
    }
    return padded[plan.made.dialect](plan.source.shape.head_dim)
