"""Channel scales moved between neighbouring tensors of a decoder, so that its function stays and its numbers become
easier to round (arXiv:2211.10438, section 4; arXiv:1906.04721 calls it cross-layer equalisation).

Between a tensor that makes channels and those that read them there may be any positive factor: rows of the one are
divided by it, and columns of the others multiplied. It passes through what is linear in each channel: a norm's weight,
attention's mean of values, and the product of the MLP's gate with `up`. It does not pass through the activation of
`gate`, nor between queries and keys, whose channels the rotary embedding mixes in pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .formats import HEAD, Format, int_format
from .tensors import Float32, SourceTensor


class Sizes(Protocol):
    """The numbers of a model that say where its seams are."""

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


@dataclass(frozen=True)
class Seam:
    """Channels that some tensors make and others read.

    producers: checkpoint names of those whose rows (the numbers of a vector) are divided by a factor for each channel,
    biases included; consumers: of the matrices whose columns are multiplied by it. channels: how many there are. width:
    channels that stay together, and times: how often each such group stands in the columns, one after another, as the
    values of a head do for each of the query heads that share it.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: int
    width: int
    times: int = 1

    def columns(self, factors: Float32) -> Float32:
        """`factors` [channels] as they stand in the consumers' columns, [channels * times]."""
        return np.repeat(factors.reshape(-1, self.width), self.times, axis=0).reshape(-1)

    def channels_of(self, columns: Float32) -> Float32:
        """The largest of `columns` [..., channels * times] for each channel, [..., channels]."""
        grouped = columns.reshape(*columns.shape[:-1], -1, self.times, self.width)
        largest: Float32 = grouped.max(axis=-2).reshape(*columns.shape[:-1], self.channels)
        return largest


def seams_of(tensors: Collection[str], sizes: Sizes, layer: int) -> tuple[Seam, ...]:
    """The seams of a decoder layer, in the order of its work: into attention, from values to `o`, into the MLP, and
    from `up` to `down`. tensors: the checkpoint's names, which tell what has a bias.
    """

    def named(*names: str) -> tuple[str, ...]:
        return tuple(name for name in (f"model.layers.{layer}.{name}" for name in names) if name in tensors)

    def inside(maker: str, reader: str, channels: int, width: int, times: int = 1) -> Seam:
        return Seam(named(f"{maker}.weight", f"{maker}.bias"), named(f"{reader}.weight"), channels, width, times)

    attention = named(*(f"self_attn.{part}_proj.weight" for part in "qkv"))
    mlp = named("mlp.gate_proj.weight", "mlp.up_proj.weight")
    values, hidden = sizes.kv_heads * sizes.head_dim, sizes.hidden
    return (
        Seam(named("input_layernorm.weight"), attention, hidden, hidden),
        inside("self_attn.v_proj", "self_attn.o_proj", values, sizes.head_dim, sizes.heads // sizes.kv_heads),
        Seam(named("post_attention_layernorm.weight"), mlp, hidden, hidden),
        inside("mlp.up_proj", "mlp.down_proj", sizes.ffn, sizes.ffn),
    )


def last_seams(tensors: Collection[str], sizes: Sizes) -> tuple[Seam, ...]:
    """From the last norm to the head; none where the head is the embedding, whose columns the first layer reads."""
    return (Seam(("model.norm.weight",), (HEAD,), sizes.hidden, sizes.hidden),) if HEAD in tensors else ()


def all_seams(tensors: Collection[str], sizes: Sizes) -> Iterator[Seam]:
    """Those of every layer, and the last."""
    for layer in range(sizes.layers):
        yield from seams_of(tensors, sizes, layer)
    yield from last_seams(tensors, sizes)


@dataclass(frozen=True, eq=False)
class Factors:
    """What a tensor is multiplied by: `rows` [rows] each row, `columns` [columns] each column; None for ones."""

    rows: Float32 | None = None
    columns: Float32 | None = None

    def of_rows(self, values: Float32, start: int = 0) -> Float32:
        """A copy of `values`, rows from `start` on of the tensor ([n, columns], or [n] of a vector), multiplied."""
        copy = values.copy() if self.columns is None else values * self.columns
        if self.rows is not None:
            rows = self.rows[start : start + len(values)]
            copy *= rows if values.ndim == 1 else rows[:, None]
        return copy


def factors_of(scales: Mapping[Seam, Float32]) -> dict[str, Factors]:
    """What each tensor at these seams is multiplied by, by checkpoint name: also what LoRA's B (rows) and A (columns)
    of such a matrix are, where they stay beside it.

    scales: float32 [channels] of each seam: its producers are divided by them. Raises ValueError where they are not one
    positive finite number for each channel, whose inverse is finite too.
    """
    rows: dict[str, list[Float32]] = defaultdict(list)
    columns: dict[str, list[Float32]] = defaultdict(list)
    for seam, scale in scales.items():
        inverse = _checked(seam, scale)
        for name in seam.producers:
            rows[name].append(inverse)
        for name in seam.consumers:
            columns[name].append(seam.columns(scale))
    return {name: Factors(_product(rows[name]), _product(columns[name])) for name in (*rows, *columns)}


def _checked(seam: Seam, scale: Float32) -> Float32:
    """1 / scale."""
    if scale.shape != (seam.channels,):
        raise ValueError(f"{seam.producers[0]} has {seam.channels} channels to scale, not {scale.shape}")
    with np.errstate(divide="ignore", over="ignore"):
        inverse: Float32 = np.float32(1) / scale.astype(np.float32, copy=False)
    if not (np.isfinite(scale).all() and np.isfinite(inverse).all() and (scale > 0).all()):
        raise ValueError(f"a channel of {seam.producers[0]} would be divided by what is no positive number")
    return inverse


def _product(factors: list[Float32]) -> Float32 | None:
    return np.prod(factors, axis=0, dtype=np.float32) if factors else None


def scaled(tensors: Mapping[str, SourceTensor], scales: Mapping[Seam, Float32]) -> dict[str, SourceTensor]:
    """The same model with `scales` moved across seams: tensors of the same names and shapes, of which those at a seam
    are multiplied as they are read. scales and errors: as in `factors_of`.

    Of a tensor that came quantised only its values are kept: its codes are for other numbers.
    """
    factors = factors_of(scales)
    return {name: _scaled(tensor, factors[name]) if name in factors else tensor for name, tensor in tensors.items()}


def _scaled(tensor: SourceTensor, factors: Factors) -> SourceTensor:
    return replace(
        tensor,
        format=_symmetric(tensor.format),
        read=lambda start, stop: factors.of_rows(tensor.read(start, stop), start),
        blocks=None,
        order=None,
    )


def _symmetric(format: Format) -> Format:
    return int_format(format.bits, format.block) if format.block else format
