"""Rotary frequencies, transformers' own, fixed for a bundle: none of its types may look at the length of a text."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..optimize.tensors import Float32
from .families import classes
from .rope import DYNAMIC


def with_fixed_rope(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config whose rotary embedding does not depend on data, so that it can be traced.

    The dynamic type becomes the default one, whose frequencies are to be replaced by those of `rotary_embedding`.
    """
    fixed = copy.deepcopy(config)
    rope: dict[str, Any] = fixed.rope_parameters
    if rope["rope_type"] == DYNAMIC:
        fixed.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return fixed


def rotary_embedding(config: PreTrainedConfig, context: int) -> Any:
    """transformers' module of the family, on the CPU, with frequencies [head_dim / 2] that stay as they are.

    The dynamic type's are those that transformers' own function gives a text of `context` tokens: the original ones up
    to max_position_embeddings.
    """
    embedding = classes(config.model_type).rotary(with_fixed_rope(config))
    if config.rope_parameters["rope_type"] == DYNAMIC:
        embedding.inv_freq, embedding.attention_scaling = ROPE_INIT_FUNCTIONS[DYNAMIC](config, seq_len=context)
    return embedding


def frequencies(config: PreTrainedConfig, context: int) -> Float32:
    """The radians by which each pair of a head turns from one position to the next: float32 [head_dim / 2]."""
    return rotary_embedding(config, context).inv_freq.float().numpy()  # type: ignore[no-any-return]


def rotary_tables(config: PreTrainedConfig, context: int) -> tuple[Float32, Float32]:
    """cos and sin of every position's angles, float32 [context, head_dim / 2].

    Frequencies and their factor are transformers' own, and so are the angles, products in float32; NumPy's cos and sin
    of them lie within a unit in the last place of torch's.
    """
    factor = np.float32(rotary_embedding(config, context).attention_scaling)
    angles = np.arange(context, dtype=np.float32)[:, None] * frequencies(config, context)
    return np.cos(angles) * factor, np.sin(angles) * factor
