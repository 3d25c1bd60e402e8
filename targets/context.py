"""How many tokens a bundle can hold on a target: plain arithmetic over shapes, made before anything is built.

On the CPU, GroupQueryAttention of ONNX Runtime 1.23 holds attention scores [batch, heads, chunk, context] in float32,
which for long contexts is more than the cache itself (measured: 17 kB a token on SmolLM2 beside 46 kB of cache).
Version 1.32 no longer does, CUDA never did, but a bundle must fit with any version that its manifest allows. A graph of
primitive ops holds them in float16 where TensorRT does not fuse its attention, which nobody promises, and copies one
layer's cache for the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..errors import UsageError
from ..names import ORT, TRT, TRT_PRIMITIVE
from ..optimize.formats import BF16, FP16, FP32, format_named, stored_bytes, with_half
from ..runtime.bundle import activations_beside
from ..tables import size
from .devices import GB, Target

STEP = 256
"""Contexts that memory decides are multiples of this many tokens."""

PREFILL_CHUNK = 512
"""Tokens of a prompt that one run takes."""

RUNTIME_BYTES = 150_000_000
"""Python, NumPy, ONNX Runtime and the tokenizer without a model (measured: 131 MB with the tokenizer of Llama 3)."""

SHARED_CONTEXT_BYTES = 400_000_000
"""The CUDA context and TensorRT's libraries where the GPU uses the computer's memory; on a card they are part of
`reserve_gb`. An assumption: nothing was measured on such a device.
"""

CPU_BLOCK_FACTOR = 1.6
"""Memory for a stored byte of int8 and int4 weights on the CPU, whose kernels keep repacked copies (measured: 1,276 MB
for 806 MB).
"""

CPU_DENSE_FACTORS: Mapping[str, float] = {FP32.name: 1.2, FP16.name: 2.4, BF16.name: 2.4}
"""The same of plain formats, which become float32 when the graph is loaded (measured at that moment: 630 MB for 538 MB
of fp32, 635 MB for 269 MB of fp16).
"""

STATIC_CONTEXT = 8192
"""Most tokens that a graph with a fixed cache gets where nothing is asked for: a token reads all of it, used or not."""

CACHE_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class Shape(Protocol):
    """What of a model's shape decides its memory; a manifest's shape has it all."""

    @property
    def layers(self) -> int: ...
    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def vocab(self) -> int: ...


@dataclass(frozen=True)
class Load:
    """What is to run: the model's shape, the bytes of its weights as stored, by the name of their format, and how it is
    run.

    cache_dtype: float32, float16 or int8; on_cpu: whether ONNX Runtime's CPU provider runs it; dialect: of the graph;
    shared_memory: a GPU runs it in the computer's own memory.
    """

    shape: Shape
    weight_bytes: Mapping[str, int]
    cache_dtype: str
    on_cpu: bool
    batch: int = 1
    prefill_chunk: int = PREFILL_CHUNK
    dialect: str = ORT
    shared_memory: bool = False

    @property
    def number(self) -> int:
        """Bytes of a number in the dtype of activations."""
        return CACHE_BYTES[activations_beside(self.cache_dtype)]


@dataclass(frozen=True)
class Need:
    """Bytes that a running model takes, by what takes them. tables: of the rotary embedding, one row for each token."""

    runtime: int
    weights: int
    tables: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.runtime + self.weights + self.tables + self.cache + self.workspace


@dataclass(frozen=True)
class ContextChoice:
    """context: tokens of prompt and answer together; reason: a sentence; warning: a sentence, or None."""

    context: int
    reason: str
    warning: str | None = None


def bytes_per_token(shape: Shape, cache_dtype: str) -> int:
    """Bytes of keys and values that one token leaves in the cache of one text."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * CACHE_BYTES[cache_dtype]


def workspace_bytes(load: Load, context: int) -> int:
    """Bytes of activations while the last chunk of a prompt of `context` tokens is read.

    The widest moment is the MLP: gate and up together, their product, and the residual stream around them. The
    attention scores come on top: on the CPU in float32, in a graph of primitive ops in the cache's dtype, and there one
    layer's keys and values, past and new, lie together once more. Engines read a prompt one text at a time and can give
    the logits of a whole chunk.
    """
    shape, engine = load.shape, load.dialect != ORT
    chunk, number = min(load.prefill_chunk, context), load.number
    rows = chunk if engine else load.batch * chunk
    width = 3 * shape.ffn + 4 * shape.hidden + (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    primitive = load.dialect == TRT_PRIMITIVE
    scores = (4 if load.on_cpu else number if primitive else 0) * rows * shape.heads * context
    joined = load.batch * context * bytes_per_token(shape, load.cache_dtype) // shape.layers if primitive else 0
    logits = 4 * shape.vocab * (max(chunk, load.batch) if engine else load.batch)
    return rows * width * number + scores + joined + logits


def weight_memory(load: Load) -> int:
    """Bytes that the weights take once they are loaded."""
    if not load.on_cpu:
        return sum(load.weight_bytes.values())
    return int(sum(count * _cpu_factor(name) for name, count in load.weight_bytes.items()))


def _cpu_factor(name: str) -> float:
    """Memory for a stored byte of the format of this name on the CPU. Scales in float16 become float32 there: SmolLM2
    in int4 takes the same with scales of either size (measured with ONNX Runtime 1.32 and 1.23.2).
    """
    format = format_named(name)
    if format is None or not format.half:
        return CPU_DENSE_FACTORS.get(name, CPU_BLOCK_FACTOR)
    two_blocks = (1, 2 * format.block)
    return CPU_BLOCK_FACTOR * stored_bytes(two_blocks, with_half(format, False)) / stored_bytes(two_blocks, format)


def table_bytes(load: Load, context: int) -> int:
    """Bytes of the rotary tables, cosines and sines [context, head_dim / 2]: of float32 in engines, else as activations
    are.
    """
    return context * load.shape.head_dim * (load.number if load.dialect == ORT else 4)


def need(load: Load, context: int) -> Need:
    """What the running model takes when its cache holds `context` tokens for each text."""
    return Need(
        runtime=RUNTIME_BYTES + (SHARED_CONTEXT_BYTES if load.shared_memory else 0),
        weights=weight_memory(load),
        tables=table_bytes(load, context),
        cache=load.batch * context * bytes_per_token(load.shape, load.cache_dtype),
        workspace=workspace_bytes(load, context),
    )


def needed_bytes(load: Load, context: int) -> int:
    """Bytes that the running model takes when its cache holds `context` tokens for each text."""
    return need(load, context).total


def largest_context(budget: int, load: Load, max_positions: int) -> int:
    """Most tokens whose memory is within `budget` bytes: all of `max_positions`, else a multiple of 256; 0 for none."""
    if needed_bytes(load, max_positions) <= budget:
        return max_positions
    steps = range(STEP, max_positions, STEP)
    fitting = bisect_right(steps, budget, key=lambda context: needed_bytes(load, context))
    return steps[fitting - 1] if fitting else 0


def choose_context(
    target: Target, load: Load, max_positions: int, requested: int | None = None, longest: int | None = None
) -> ContextChoice:
    """The context of a bundle: `requested`, or the smaller of the model's own and what the target's memory allows.

    longest: most tokens that may be requested, where the model's rotary embedding stretches beyond `max_positions`.
    Raises UsageError when `requested` is above these.
    """
    if requested is not None:
        return _requested_context(target, load, longest or max_positions, requested)
    return default_context(target, load, max_positions)


def usual_context(load: Load, largest: int) -> int:
    """The context where nothing is asked for and `largest` fits."""
    return min(largest, STATIC_CONTEXT) if load.dialect == TRT else largest


def default_context(target: Target, load: Load, max_positions: int) -> ContextChoice:
    """The smaller of the model's `max_positions` and what fits the memory, then a multiple of 256.

    At least 256 tokens fit, or all of a model that knows fewer: `planner.assess` has seen to that.
    """
    largest = largest_context(int(target.usable_gb * GB), load, max_positions)
    context = usual_context(load, largest)
    if context < largest:
        return ContextChoice(
            context,
            f"Context {context:,} tokens of the model's {max_positions:,}: for each token this graph reads its whole "
            f"cache, used or not; --context takes up to {largest:,}.",
        )
    if context == max_positions:
        needed = needed_bytes(load, max_positions)
        reason = f"all that the model knows, which takes {size(needed)} of the {budget_text(target)}."
        return ContextChoice(max_positions, f"Context {max_positions:,} tokens: {reason}")
    assert context, "the planner refuses what does not fit"
    weights, tokens = size(needed_bytes(load, 0)), size(_for_tokens(load))
    return ContextChoice(
        context,
        f"Context {context:,} tokens of the model's {max_positions:,}: more does not fit the {budget_text(target)}, "
        f"since the weights take {weights} and every 1,000 tokens {tokens}.",
    )


def _requested_context(target: Target, load: Load, max_positions: int, requested: int) -> ContextChoice:
    if requested > max_positions:
        raise UsageError(
            f"--context {requested} is above the {max_positions:,} tokens that the model knows or stretches to: "
            f"give {max_positions} or less."
        )
    reason = f"Context {requested:,} tokens, as asked for."
    needed = needed_bytes(load, requested)
    if needed <= int(target.usable_gb * GB):
        return ContextChoice(requested, reason)
    warning = (
        f"A context of {requested:,} tokens takes about {size(needed)}, which is above the {budget_text(target)}: "
        f"it may not load there."
    )
    return ContextChoice(requested, reason, warning)


def _for_tokens(load: Load, tokens: int = 1000) -> int:
    """Bytes for each further `tokens` of a context that is longer than a chunk."""
    base = load.prefill_chunk
    return needed_bytes(load, base + tokens) - needed_bytes(load, base)


def budget_text(target: Target) -> str:
    """The memory that a target has free, in words."""
    assumed = " (an assumption)" if target.is_assumed("memory_gb") else ""
    return f"{target.usable_gb:.1f} GB that {target.name} has free of its {target.memory_gb:g} GB{assumed}"
