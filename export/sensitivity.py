"""What storing a matrix in a format would cost the whole model: KL divergence, predicted from one forward and one
backward pass over a text.

An error d of the weights changes the model's predictions by a KL divergence of about d'Fd / 2, with F the Fisher
information of these predictions (Martens, arXiv:1412.1193, section 5). Its labels are drawn from what the model itself
predicts, so that no data are labelled. With the inputs x of a matrix and the gradients g of what comes out of it, each
of one token, it is the sum of (g . dx)^2 / 2.

Layers stream twice, forward, keeping what enters each, and backward: one decoder layer is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..errors import LlamaExportError
from ..optimize.formats import EMBEDDING, Format
from ..optimize.plan import head_of
from ..optimize.tensors import Float32, SourceTensor
from ..progress import Progress
from .layerwise import LAST_NORM, Texts, cuts, decoder_layer, embedded, float32_bytes, norm_before_head, projections

Stored = Callable[[SourceTensor, Format, int, int, Float32], Float32]
"""Rows [start, stop) of a tensor as they would be stored in a format; last come these rows as they are."""

IN_MEMORY = 1 << 28
"""Bytes of what enters the layers above which it lies in a file."""

HEAD_TOKENS = 512
"""At most so many tokens, evenly spread, tell the head's costs: no labels are drawn for these, so few tell enough."""

_LOGITS = 1 << 23
"""Logits that are in memory together."""

_SEED = 20260


@dataclass
class Sensitivity:
    """One measurement of what candidates cost. After `measure`, `kl` has by matrix and format the predicted KL
    divergence, in nats a token, of storing this matrix alone so.

    tensors: the checkpoint's. context: of the bundle. sequences: the text. candidates: by the checkpoint name of a
    matrix, the formats that it may get.
    """

    config: PreTrainedConfig
    tensors: Mapping[str, SourceTensor]
    context: int
    sequences: Sequence[Sequence[int]]
    candidates: Mapping[str, Sequence[Format]]
    stored: Stored
    progress: Progress
    kl: dict[str, dict[Format, float]] = field(default_factory=dict)
    _passed_bytes: int = 0

    def measure(self, folder: Path) -> Mapping[str, Mapping[Format, float]]:
        """Measure everything and return `kl`. folder: where what enters the layers lies while it is needed, if it is
        much.

        Raises LlamaExportError where the model's numbers are not finite.
        """
        layers, hidden = self.config.num_hidden_layers, self.config.hidden_size
        shape = (layers, self._tokens, hidden)
        with tempfile.TemporaryFile(dir=folder) as file:
            large = 2 * layers * self._tokens * hidden > IN_MEMORY
            entered = np.memmap(file, np.uint16, "w+", shape=shape) if large else np.empty(shape, np.uint16)
            self._run(torch.from_numpy(entered).view(torch.bfloat16))
        return self.kl

    @property
    def _tokens(self) -> int:
        return sum(map(len, self.sequences))

    def _run(self, entered: torch.Tensor) -> None:
        """entered: bfloat16 [layers, tokens, hidden], to be filled."""
        texts = Texts(self.config, self.context, self.sequences)
        gradients = self._head(self._forward(texts, entered))
        for index in reversed(range(self.config.num_hidden_layers)):
            gradients = self._backward(texts, index, entered[index], gradients)
        if EMBEDDING in self.candidates:
            self._embedding(torch.cat(gradients))

    @torch.no_grad()
    def _forward(self, texts: Texts, entered: torch.Tensor) -> torch.Tensor:
        """What the last layer leaves, [tokens, hidden]."""
        hidden = embedded(self.sequences, self._rows)

        def run(index: int) -> None:  # a frame of its own, which lets go of the layer before the next is read
            entered[index] = torch.cat([state[0] for state in hidden])
            texts.run(self._layer(index), hidden)

        for index in range(self.config.num_hidden_layers):
            run(index)
        return torch.cat([state[0] for state in hidden])

    def _layer(self, index: int) -> torch.nn.Module:
        return decoder_layer(self.config, index, self._whole).requires_grad_(False)

    def _backward(
        self, texts: Texts, index: int, entered: torch.Tensor, gradients: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The gradients [length, hidden] of what enters a layer; its matrices' costs are noted on the way."""
        layer, seen = self._layer(index), dict[str, _Seen]()
        for name, module in projections(index, layer):
            if name in self.candidates:
                seen[name] = _Seen()
                module.register_forward_hook(seen[name].hook)
        found = []
        lengths = list(map(len, self.sequences))
        for number, (state, gradient) in enumerate(zip(entered.split(lengths), gradients, strict=True)):
            given = state.float()[None].requires_grad_()
            texts.passed(layer, number, given).backward(gradient[None])  # type: ignore[no-untyped-call]
            assert given.grad is not None
            found.append(given.grad[0])
        for name, module in projections(index, layer):
            if name in seen:
                self._projection(name, module.weight, seen.pop(name))
        return found

    @torch.no_grad()
    def _projection(self, name: str, weight: torch.Tensor, seen: _Seen) -> None:
        inputs, gradients = torch.cat(seen.inputs), torch.cat(seen.gradients)
        changes = {format: torch.zeros(len(inputs)) for format in self.candidates[name]}
        for start, stop in cuts(self.tensors[name]):
            rows = weight[start:stop].numpy()
            for format, change in changes.items():
                error = self._error(name, format, start, rows)
                change.add_(((inputs @ error.T) * gradients[:, start:stop]).sum(-1))
        self._note(name, {format: change.square().sum().item() for format, change in changes.items()})

    @torch.no_grad()
    def _embedding(self, gradients: torch.Tensor) -> None:
        """The costs of looking rows up. gradients: [tokens, hidden]."""
        tokens = torch.tensor([token for sequence in self.sequences for token in sequence])
        changes = {format: torch.zeros(len(tokens)) for format in self.candidates[EMBEDDING]}
        for start, rows in self._rows(EMBEDDING):
            here = torch.nonzero((tokens >= start) & (tokens < start + len(rows)))[:, 0]
            for format, change in changes.items():
                if len(here):
                    error = self._error(EMBEDDING, format, start, rows)[tokens[here] - start]
                    change[here] = (error * gradients[here]).sum(-1)
        self._note(EMBEDDING, {format: change.square().sum().item() for format, change in changes.items()})

    def _head(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each sequence, the gradients [length, hidden] of what enters the last norm; the head's costs are noted.

        states: [tokens, hidden]. Of the head itself the whole of F is known: the KL divergence is half the variance of
        the errors of logits under the predictions.
        """
        states = states.requires_grad_()
        normed = norm_before_head(self.config, self._whole(LAST_NORM))(states)
        normed.backward(self._head_gradient(normed.detach()))
        assert states.grad is not None
        return list(states.grad.split(list(map(len, self.sequences))))

    @torch.no_grad()
    def _head_gradient(self, inputs: torch.Tensor) -> torch.Tensor:
        """The gradient [tokens, hidden] of the drawn labels' log-likelihood by the head's input."""
        logits = _Logits(len(inputs))
        for start, rows in self._pieces():
            logits.look(start, inputs @ rows.T)
        if not logits.total.isfinite().all():
            raise LlamaExportError(
                "The model's logits are not finite in float32, so nothing can be predicted of its quantisation; the "
                "checkpoint is damaged, download or copy it again."
            )
        few = torch.arange(len(inputs))[:: -(-len(inputs) // HEAD_TOKENS)]
        name = head_of(self.tensors)
        moments = {format: torch.zeros(2, len(few)) for format in self.candidates.get(name, ())}
        gradient = torch.zeros_like(inputs)
        for start, rows in self._pieces():
            chances = (inputs @ rows.T - logits.total).exp()
            here = torch.nonzero((logits.labels >= start) & (logits.labels < start + len(rows)))[:, 0]
            gradient[here] += rows[logits.labels[here] - start]
            gradient -= chances @ rows
            for format, moment in moments.items():
                changed = inputs[few] @ self._error(name, format, start, rows.numpy()).T
                moment.add_(torch.stack([(chances[few] * changed**power).sum(-1) for power in (1, 2)]))
        scale = len(inputs) / len(few)
        self._note(name, {format: (two - one**2).sum().item() * scale for format, (one, two) in moments.items()})
        return gradient

    def _pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The head's rows, so many that the logits of all tokens take little memory."""
        most = max(1, _LOGITS // self._tokens)
        for start, part in self._rows(head_of(self.tensors)):
            for first in range(0, len(part), most):
                yield start + first, torch.from_numpy(part[first : first + most])

    def _error(self, name: str, format: Format, start: int, rows: Float32) -> torch.Tensor:
        stored = self.stored(self.tensors[name], format, start, start + len(rows), rows)
        return torch.from_numpy(stored - rows)

    def _note(self, name: str, sums: Mapping[Format, float]) -> None:
        """Costs are added up: a tied head is the embedding too."""
        found = self.kl.setdefault(name, {})
        for format, total in sums.items():
            found[format] = found.get(format, 0.0) + max(0.0, total) / 2 / self._tokens

    def _rows(self, name: str) -> Iterator[tuple[int, Float32]]:
        tensor = self.tensors[name]
        for start, stop in cuts(tensor):
            rows = tensor.read(start, stop)
            yield start, rows
            self._passed_bytes += rows.nbytes
            self.progress.advance(self._passed_bytes, self._all_bytes)

    @property
    def _all_bytes(self) -> int:
        """All weights pass twice; the head's second pass and the embedding's make no difference worth counting."""
        return 2 * float32_bytes(self.tensors)

    def _whole(self, name: str) -> torch.Tensor:
        values = np.empty(self.tensors[name].shape, np.float32)
        for start, part in self._rows(name):
            values[start : start + len(part)] = part
        return torch.from_numpy(values)


@dataclass
class _Seen:
    """Of a projection, what entered [tokens, columns] and the gradients of what came out [tokens, rows], a sequence
    each.
    """

    inputs: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def hook(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.inputs.append(inputs[0].detach()[0])
        output.register_hook(lambda gradient: self.gradients.append(gradient[0]))  # type: ignore[no-untyped-call]


class _Logits:
    """Logits that pass by in pieces of the vocabulary: their log-sum-exp, and a label drawn of each token's, by the
    largest of logit and Gumbel noise.
    """

    def __init__(self, tokens: int) -> None:
        self.total = torch.full((tokens, 1), -torch.inf)
        self.labels = torch.zeros(tokens, dtype=torch.int64)
        self._best = torch.full((tokens,), -torch.inf)
        self._random = torch.Generator().manual_seed(_SEED)

    def look(self, start: int, logits: torch.Tensor) -> None:
        self.total = torch.logaddexp(self.total, logits.logsumexp(-1, keepdim=True))
        noise = -torch.empty_like(logits).exponential_(generator=self._random).log()
        best, label = (logits + noise).max(-1)
        better = best > self._best
        self._best[better], self.labels[better] = best[better], label[better] + start
