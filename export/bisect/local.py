"""Each op group on its own: transformers' op on the very inputs that the graph's op had, so that nothing is inherited.

What a difference may be follows from the sums that the op makes: rounding moves a sum by at most so many units in the
last place of the magnitudes that were added, which stand beside each result here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from ...optimize.formats import BLOCK
from . import explain
from . import places as at

Tensor = torch.Tensor
Seen = Mapping[str, Tensor]
"""What the graph has at each place, of one piece: [n, width]; queries [heads, n, head_dim]; keys and values of all
tokens so far [kv_heads, tokens, head_dim].
"""


_TOLD = 2.0**-14
"""Numbers below it are not whole ones in float16, and say nothing of a factor."""


@dataclass(frozen=True)
class Surroundings:
    """What attention needs beside its inputs, for the tokens of one piece. angles: cos and sin [1, n, head_dim] of
    their positions, moved by a number; visible: [n, tokens so far], True where a query sees a key; positions [n]; turns
    and theta: as of `explain.Rotation`.
    """

    angles: Callable[[int], tuple[Tensor, Tensor]]
    visible: Tensor
    positions: Tensor
    turns: Tensor
    theta: float | None


@dataclass(frozen=True)
class Result:
    """One op group's result: what the graph has, what PyTorch makes of the graph's inputs, and the magnitudes whose
    rounding explains a difference, all of one shape. terms: numbers that one of the result is the sum of. gains: of a
    norm, the mean factor of each row [n] by which it differs, against float64. hint: what would explain a difference,
    for people; asked only where there is one.
    """

    place: str
    got: Tensor
    want: Tensor
    scale: Tensor
    terms: int = 1
    gains: Tensor | None = None
    hint: Callable[[], str] = lambda: ""


def norm_result(place: str, norm: Any, x: Tensor, got: Tensor) -> Result:
    """norm: transformers' module; x, got: [n, hidden]."""
    want, wide, eps = norm(x), x.double(), norm.variance_epsilon
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.weight.double()
    told = exact.abs() > _TOLD
    ratios = torch.where(told, got.double() / torch.where(told, exact, 1.0), 1.0)
    gains = ratios.mean(-1)
    return Result(place, got, want, want.abs(), x.shape[-1], gains, lambda: explain.epsilon(x, eps, gains))


def product_result(place: str, weight: Tensor, bias: Tensor | None, x: Tensor, got: Tensor) -> Result:
    """x: [n, columns], weight: [rows, columns], got: [n, rows]."""
    scale = _in_blocks(x.abs()).sum(-1) @ _in_blocks(weight.abs()).amax(-1).T + (0 if bias is None else bias.abs())
    return Result(place, got, functional.linear(x, weight, bias), scale, x.shape[-1])


def _in_blocks(values: Tensor) -> Tensor:
    """[n, columns] as [n, blocks, columns of a block]: those of a block are made of a common scale and offset, so that
    a small one may be the difference of two as large as the largest.
    """
    padded = functional.pad(values, (0, -values.shape[-1] % BLOCK))
    return padded.view(len(values), -1, BLOCK)


def sum_result(place: str, first: Tensor, second: Tensor, got: Tensor) -> Result:
    """All [n, hidden]."""
    return Result(place, got, first + second, first.abs() + second.abs())


class LayerOps:
    """The op groups of one decoder layer of transformers."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._layer: Any
        self._layer = layer
        self._modeling: Any = sys.modules[type(layer).__module__]
        self._head_dim = int(self._layer.self_attn.head_dim)

    def results(self, seen: Seen, before: Tensor, around: Surroundings) -> Iterator[Result]:
        """Compare every place of the layer. before: the layer's input in the graph, [n, hidden]."""
        layer, normed = self._layer, seen[at.INPUT_NORM]
        yield norm_result(at.INPUT_NORM, layer.input_layernorm, before, normed)
        for place, linear in (
            (at.QUERIES, layer.self_attn.q_proj),
            (at.KEYS, layer.self_attn.k_proj),
            (at.VALUES, layer.self_attn.v_proj),
        ):
            yield self._projected(place, linear, normed, seen[place])
        yield from self._attention(seen, around)
        yield self._product(at.OUTPUT, layer.self_attn.o_proj, seen[at.ATTENTION], seen[at.OUTPUT])
        yield sum_result(at.ATTENDED, before, seen[at.OUTPUT], seen[at.ATTENDED])
        yield norm_result(at.POST_NORM, layer.post_attention_layernorm, seen[at.ATTENDED], seen[at.POST_NORM])
        yield from self._mlp(seen)
        yield sum_result(at.LEFT, seen[at.ATTENDED], seen[at.DOWN], seen[at.LEFT])

    def _mlp(self, seen: Seen) -> Iterator[Result]:
        mlp, x, gate, up = self._layer.mlp, seen[at.POST_NORM], seen[at.GATE], seen[at.UP]
        yield self._either(at.GATE, mlp.gate_proj, mlp.up_proj, x, gate)
        yield self._either(at.UP, mlp.up_proj, mlp.gate_proj, x, up)
        want = mlp.act_fn(gate) * up
        tries = [("gate and up exchanged", lambda: mlp.act_fn(up) * gate), ("no activation", lambda: gate * up)]
        got = seen[at.ACTIVATED]
        yield Result(at.ACTIVATED, got, want, (gate * up).abs(), hint=lambda: explain.fitting(got, want, tries))
        yield self._product(at.DOWN, mlp.down_proj, got, seen[at.DOWN])

    def _either(self, place: str, linear: Any, other: Any, x: Tensor, got: Tensor) -> Result:
        """Gate or up, each of which may be the `other`."""
        result, attempts = self._product(place, linear, x, got), [("gate and up exchanged", lambda: other(x))]
        return replace(result, hint=lambda: explain.fitting(got, result.want, attempts))

    def _product(self, place: str, linear: Any, x: Tensor, got: Tensor) -> Result:
        return product_result(place, linear.weight, linear.bias, x, got)

    def _projected(self, place: str, linear: Any, x: Tensor, got: Tensor) -> Result:
        """Queries, keys or values, whose heads may be in another order."""
        result = self._product(place, linear, x, got)
        heads = (self._heads(result.got), self._heads(result.want))
        return replace(result, hint=lambda: explain.fitting(*heads, explain.exchanged_heads(heads[1])))

    def _heads(self, flat: Tensor) -> Tensor:
        """[n, heads * head_dim] as [heads, n, head_dim]."""
        return flat.view(len(flat), -1, self._head_dim).transpose(0, 1)

    def _turn(self, plain: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned: Tensor = self._modeling.apply_rotary_pos_emb(plain[None], plain[None], cos, sin)[0][0]
        return turned

    def _turned(self, place: str, flat: Tensor, got: Tensor, around: Surroundings) -> Result:
        plain = self._heads(flat)
        rotation = explain.Rotation(
            lambda shift: self._turn(plain, *around.angles(shift)), plain, around.positions, around.turns, around.theta
        )
        want, (cos, sin) = rotation.turn(0), (angle.abs() for angle in around.angles(0))
        scale = plain.abs() * cos + torch.roll(plain.abs(), self._head_dim // 2, dims=-1) * sin

        def hint() -> str:
            return explain.fitting(got, want, rotation.attempts()) or rotation.frequencies(got)

        return Result(place, got, want, scale, hint=hint)

    def _attention(self, seen: Seen, around: Surroundings) -> Iterator[Result]:
        queries, scaling = self._turn(self._heads(seen[at.QUERIES]), *around.angles(0)), self._layer.self_attn.scaling
        if at.TURNED_QUERIES in seen:
            yield self._turned(at.TURNED_QUERIES, seen[at.QUERIES], seen[at.TURNED_QUERIES], around)
            queries = seen[at.TURNED_QUERIES]
        keys, values, count = seen[at.CACHED_KEYS], seen[at.CACHED_VALUES], len(around.positions)
        yield self._turned(at.CACHED_KEYS, seen[at.KEYS], keys[:, -count:], around)
        plain = self._heads(seen[at.VALUES])
        tries = explain.exchanged_heads(plain)
        newest = values[:, -count:]
        yield Result(at.CACHED_VALUES, newest, plain, plain.abs(), hint=lambda: explain.fitting(newest, plain, tries))
        if at.SCALED_QUERIES in seen:
            got, want = seen[at.SCALED_QUERIES], queries * scaling
            unscaled = queries
            attempts = [("no 1/sqrt(head_dim)", lambda: unscaled)]
            yield Result(at.SCALED_QUERIES, got, want, want.abs(), hint=lambda: explain.fitting(got, want, attempts))
            queries, scaling = got, 1.0
        yield self._attended(seen, queries, scaling, around)

    def _attended(self, seen: Seen, queries: Tensor, scaling: float, around: Surroundings) -> Result:
        """transformers' attention of these queries over the graph's keys and values."""
        keys, values, visible = seen[at.CACHED_KEYS], seen[at.CACHED_VALUES], around.visible
        got, groups = seen[at.ATTENTION], len(queries) // len(keys)
        want, shares = self._attend(queries, keys, values, visible, scaling)
        scores = queries.abs() @ keys.abs().repeat_interleave(groups, dim=0).transpose(1, 2) * scaling
        largest = scores.masked_fill(~visible, 0).amax(dim=-1, keepdim=True)  # an error in a score is one of its share
        scale = shares @ values.abs().repeat_interleave(groups, dim=0) * (1 + largest)
        flat = scale.transpose(0, 1).reshape(got.shape)

        def attempts() -> Iterator[explain.Attempt]:
            if scaling != 1.0:
                yield "no 1/sqrt(head_dim)", lambda: self._attend(queries, keys, values, visible, 1.0)[0]
            for diagonal, told in ((1, "each token sees one token too many"), (-1, "no token sees itself")):
                shifted = visible.roll(diagonal, dims=-1)
                shifted[:, 0] |= ~shifted.any(-1)
                yield told, lambda shifted=shifted: self._attend(queries, keys, values, shifted, scaling)[0]  # type: ignore[misc]
            everything = torch.ones_like(visible).tril(visible.shape[1] - visible.shape[0])
            yield "no sliding window", lambda: self._attend(queries, keys, values, everything, scaling)[0]
            for told, attempt in self._turns(seen, around):
                yield told, lambda attempt=attempt: self._attend(attempt(), keys, values, visible, scaling)[0]  # type: ignore[misc]
            for told, order in explain.exchanged_heads(keys):
                yield told, lambda order=order: self._attend(queries, order(), values, visible, scaling)[0]  # type: ignore[misc]

        return Result(at.ATTENTION, got, want, flat, hint=lambda: explain.fitting(got, want, attempts()))

    def _turns(self, seen: Seen, around: Surroundings) -> Iterator[explain.Attempt]:
        """Queries that are rotated wrongly, where the graph does not show them."""
        if at.TURNED_QUERIES in seen:
            return
        plain = self._heads(seen[at.QUERIES])
        rotation = explain.Rotation(
            lambda shift: self._turn(plain, *around.angles(shift)), plain, around.positions, around.turns, around.theta
        )
        for told, attempt in rotation.attempts():
            yield f"queries: {told}", attempt

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """The output [n, heads * head_dim] and the shares [heads, n, tokens]."""
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))[None, None]
        out, shares = self._modeling.eager_attention_forward(
            self._layer.self_attn, queries[None], keys[None], values[None], mask, scaling=scaling
        )
        return out.reshape(queries.shape[1], -1), shares[0]
