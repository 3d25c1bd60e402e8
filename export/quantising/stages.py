"""A decoder layer between its matrices: what each of them reads, and what the layer makes of their results."""

from __future__ import annotations

from typing import Any

import torch

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The projections of a layer by what they read, in the order of its work."""


class Placed(torch.nn.Module):
    """A module on a device, for hidden states that are kept on the CPU: what it is given is brought there and back."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        super().__init__()
        self.module, self.device = module, device

    def forward(self, state: torch.Tensor, **given: Any) -> torch.Tensor:
        moved = {name: _moved(value, self.device) for name, value in given.items()}
        result: torch.Tensor = self.module(state.to(self.device), **moved)
        return result.cpu()


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(one, device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


class Stages:
    """The parts of transformers' decoder layer, which is taken apart: it does not run as a whole afterwards.

    attended: gives of hidden states [1, length, hidden] what `o` reads, in the way that a layer is called. mlp: without
    its down.
    """

    def __init__(self, layer: torch.nn.Module, device: torch.device) -> None:
        self._device = device
        part = layer.get_submodule
        self._norm, self._second_norm = part("input_layernorm"), part("post_attention_layernorm")
        self._output, self._down, self.mlp = part("self_attn.o_proj"), part("mlp.down_proj"), part("mlp")
        layer.set_submodule("self_attn.o_proj", torch.nn.Identity())
        layer.set_submodule("mlp.down_proj", torch.nn.Identity())
        self.attended = Placed(_Attended(self._norm, part("self_attn")), device)

    def before_attention(self, hidden: torch.Tensor) -> torch.Tensor:
        """What q, k and v read, on the device."""
        return self._called(self._norm, hidden)

    def after_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The hidden states between attention and MLP, on the CPU."""
        return hidden + self._called(self._output, attended).cpu()

    def before_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """What gate and up read, on the device."""
        return self._called(self._second_norm, hidden)

    def activated(self, hidden: torch.Tensor, mlp: torch.nn.Module | None = None) -> torch.Tensor:
        """What `down` reads, on the device. mlp: another than the layer's, without its down as this one is."""
        return self._called(mlp or self.mlp, self.before_mlp(hidden))

    def after_mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the layer leaves, on the CPU. hidden: those between attention and MLP."""
        return hidden + self._called(self._down, self.activated(hidden)).cpu()

    def _called(self, module: torch.nn.Module, state: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module(state.to(self._device))
        return result


class _Attended(torch.nn.Module):
    def __init__(self, norm: torch.nn.Module, attention: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, state: torch.Tensor, **given: Any) -> torch.Tensor:
        result: torch.Tensor = self.attention(hidden_states=self.norm(state), **given)[0]
        return result
