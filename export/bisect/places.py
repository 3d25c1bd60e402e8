"""The places inside a model where a graph and PyTorch are compared, in the order in which they are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """id: in files; group: the op group whose result is looked at there, for people."""

    id: str
    group: str


EMBEDDED, NORM, LOGITS = "embedding", "final_norm", "logits"
INPUT_NORM, POST_NORM = "input_norm", "post_norm"
QUERIES, KEYS, VALUES = "q", "k", "v"
TURNED_QUERIES, SCALED_QUERIES = "q_rotary", "q_scaled"
CACHED_KEYS, CACHED_VALUES = "keys", "values"
ATTENTION, OUTPUT, ATTENDED = "attention", "o", "attention_residual"
GATE, UP, ACTIVATED, DOWN, LEFT = "gate", "up", "activation", "down", "mlp_residual"

IN_LAYER = (
    Place(INPUT_NORM, "norm before attention"),
    Place(QUERIES, "projection of queries (q)"),
    Place(KEYS, "projection of keys (k)"),
    Place(VALUES, "projection of values (v)"),
    Place(TURNED_QUERIES, "queries after the rotary embedding"),
    Place(CACHED_KEYS, "keys after the rotary embedding, in the cache"),
    Place(CACHED_VALUES, "values in the cache"),
    Place(SCALED_QUERIES, "queries times 1/sqrt(head_dim)"),
    Place(ATTENTION, "attention"),
    Place(OUTPUT, "projection of attention's output (o)"),
    Place(ATTENDED, "residual after attention"),
    Place(POST_NORM, "norm before the MLP"),
    Place(GATE, "projection gate"),
    Place(UP, "projection up"),
    Place(ACTIVATED, "activation(gate) * up"),
    Place(DOWN, "projection down"),
    Place(LEFT, "residual after the MLP"),
)
OUTSIDE = (Place(EMBEDDED, "embedding"), Place(NORM, "last norm"), Place(LOGITS, "output head (logits)"))
PLACES = {place.id: place for place in (*OUTSIDE, *IN_LAYER)}
NORMS = frozenset((INPUT_NORM, POST_NORM, NORM))

_ORDER = {place.id: number for number, place in enumerate((OUTSIDE[0], *IN_LAYER, *OUTSIDE[1:]))}


def order_of(layer: int | None, place: str, layers: int) -> tuple[int, int]:
    """A key that sorts places as they are computed. layer: None outside of the `layers` decoder layers."""
    if layer is not None:
        return layer, _ORDER[place]
    return (-1 if place == EMBEDDED else layers), _ORDER[place]


WITH_HEADS = frozenset((TURNED_QUERIES, SCALED_QUERIES, CACHED_KEYS, CACHED_VALUES))
"""Places whose values have an axis of heads."""
RESULTS = {
    INPUT_NORM: "input_layernorm",
    QUERIES: "self_attn.q_proj",
    KEYS: "self_attn.k_proj",
    VALUES: "self_attn.v_proj",
    OUTPUT: "self_attn.o_proj",
    POST_NORM: "post_attention_layernorm",
    GATE: "mlp.gate_proj",
    UP: "mlp.up_proj",
    DOWN: "mlp.down_proj",
}
"""The module of a decoder layer whose result each place is."""
INPUTS = {ATTENTION: "self_attn.o_proj", ATTENDED: "post_attention_layernorm", ACTIVATED: "mlp.down_proj"}
"""The module of a decoder layer whose input each place is."""
