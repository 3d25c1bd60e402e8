"""What storing a matrix in a format would cost the whole model: KL divergence, predicted from one forward and one
backward pass over a text.

An error d of the weights changes the model's predictions by a KL divergence of about d'Fd / 2, with F the Fisher
information of these predictions (Martens, arXiv:1412.1193, section 5): the mean of the squared gradient of the
likelihood of labels which are drawn from what the model itself predicts, so that no data are labelled. Errors of
rounding are independent of one another, so that only F's diagonal counts. The gradient is that of a whole text: an
error of v is the same for every token that attention mixes, and does not average out. The head's own part of F is known
without drawing.

Layers stream twice, forward, keeping what enters each, and backward: one decoder layer is in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from ..runtime.threads import physical_cores
from .layerwise import LAST_NORM, Texts, cuts, decoder_layer, embedded, float32_bytes, norm_before_head, projections

Stored = Callable[[SourceTensor, Format, int, int, Float32], Float32]
"""Rows [start, stop) of a tensor as they would be stored in a format; last come these rows as they are."""

IN_MEMORY = 1 << 28
"""Bytes of what enters the layers above which it lies in a file."""

_LOGITS = 1 << 23
"""Logits that are in memory together."""

_PIECE = 1 << 19
"""Values that one thread converts at a time: the temporaries stay in the processor's cache."""

_SEED = 20260


@dataclass
class Sensitivity:
    """One measurement of what candidates cost: `kl` has by matrix and format the predicted KL divergence, in nats a
    token, of storing this matrix alone so, once `measure` ends.

    tensors: the checkpoint's. context: of the bundle. sequences: the texts. candidates: by the checkpoint name of a
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
        shape = (layers, self.tokens, hidden)
        with tempfile.TemporaryFile(dir=folder) as file:
            large = 2 * layers * self.tokens * hidden > IN_MEMORY
            entered = np.memmap(file, np.uint16, "w+", shape=shape) if large else np.empty(shape, np.uint16)
            self._run(torch.from_numpy(entered).view(torch.bfloat16))
        return self.kl

    def _split(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Rows of all tokens by sequence."""
        return list(torch.split(tokens, [len(sequence) for sequence in self.sequences]))

    @property
    def tokens(self) -> int:
        """Of the texts."""
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
        layer, fishers = self._layer(index), dict[str, _Fisher]()
        for name, module in projections(index, layer):
            if name in self.candidates:
                fishers[name] = _Fisher(torch.zeros(self.tensors[name].shape))
                module.register_forward_hook(fishers[name].hook)
        found = []
        for number, (state, gradient) in enumerate(zip(self._split(entered), gradients, strict=True)):
            given = state.float()[None].requires_grad_()
            torch.autograd.backward(texts.passed(layer, number, given), gradient[None])
            assert given.grad is not None
            found.append(given.grad[0])
        for name, module in projections(index, layer):
            if name in fishers:
                self._note(name, module.get_parameter("weight").numpy(), fishers.pop(name).diagonal.numpy())
        return found

    @torch.no_grad()
    def _embedding(self, gradients: torch.Tensor) -> None:
        """The costs of looking rows up. gradients: [tokens, hidden]."""
        places = [(text, token) for text, sequence in enumerate(self.sequences) for token in sequence]
        once, which = torch.unique(torch.tensor(places), dim=0, return_inverse=True)
        squares = torch.zeros(len(once), gradients.shape[1]).index_add_(0, which, gradients).square_()
        for start, rows in self._rows(EMBEDDING):
            here = (once[:, 1] >= start) & (once[:, 1] < start + len(rows))
            fisher = torch.zeros(rows.shape).index_add_(0, once[here, 1] - start, squares[here])
            self._note(EMBEDDING, rows, fisher.numpy(), start)

    def _head(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each sequence, the gradients [length, hidden] of what enters the last norm; the head's costs are noted.

        states: what the last layer leaves, [tokens, hidden].
        """
        states = states.requires_grad_()
        normed = norm_before_head(self.config, self._whole(LAST_NORM))(states)
        torch.autograd.backward(normed, self._head_gradient(normed.detach()))
        assert states.grad is not None
        return self._split(states.grad)

    @torch.no_grad()
    def _head_gradient(self, inputs: torch.Tensor) -> torch.Tensor:
        """The gradient [tokens, hidden] of the drawn labels' log-likelihood by the head's input. Of the head itself the
        KL divergence is half the variance of the logits' errors under the predictions.
        """
        logits = _Logits(len(inputs))
        for start, rows in self._pieces():
            logits.look(start, inputs @ rows.T)
        if not logits.total.isfinite().all():
            raise LlamaExportError(
                "The model's logits are not finite in float32, so nothing can be predicted of its quantisation; the "
                "checkpoint is damaged, download or copy it again."
            )
        name, squares, gradient = head_of(self.tensors), inputs.square(), torch.zeros_like(inputs)
        for start, rows in self._pieces():
            chances = (inputs @ rows.T - logits.total).exp()
            here = torch.nonzero((logits.labels >= start) & (logits.labels < start + len(rows)))[:, 0]
            gradient[here] += rows[logits.labels[here] - start]
            gradient -= chances @ rows
            if name in self.candidates:
                self._note(name, rows.numpy(), ((chances - chances.square()).T @ squares).numpy(), start)
        return gradient

    def _pieces(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The head's rows, so many that the logits of all tokens take little memory."""
        most = max(1, _LOGITS // self.tokens)
        for start, part in self._rows(head_of(self.tensors)):
            for first in range(0, len(part), most):
                yield start + first, torch.from_numpy(part[first : first + most])

    def _note(self, name: str, rows: Float32, fisher: Float32, start: int = 0) -> None:
        """Add to the costs of a matrix those of its `rows` from `start` on. fisher: like rows, F's diagonal, summed up
        over the texts. Of a tied head and embedding costs are added up.
        """
        found = self.kl.setdefault(name, dict.fromkeys(self.candidates[name], 0.0))
        step = max(1, _PIECE // rows.shape[1])
        tensor = self.tensors[name]

        def cost(work: tuple[Format, int]) -> float:
            format, first = work
            part = rows[first : first + step]
            error = self.stored(tensor, format, start + first, start + first + len(part), part) - part
            error *= error
            return float(np.vdot(error, fisher[first : first + step]))

        works = [(format, first) for format in found for first in range(0, len(rows), step)]
        with ThreadPoolExecutor(physical_cores()) as pool:
            for (format, _), total in zip(works, pool.map(cost, works), strict=True):
                found[format] += total / 2 / self.tokens

    def _rows(self, name: str) -> Iterator[tuple[int, Float32]]:
        tensor = self.tensors[name]
        for start, stop in cuts(tensor):
            rows = tensor.read(start, stop)
            yield start, rows
            self._passed_bytes += rows.nbytes
            # All pass twice; what head and embedding are read for besides makes no difference worth counting.
            whole = 2 * float32_bytes(self.tensors)
            self.progress.advance(min(self._passed_bytes, whole), whole)

    def _whole(self, name: str) -> torch.Tensor:
        values = np.empty(self.tensors[name].shape, np.float32)
        for start, part in self._rows(name):
            values[start : start + len(part)] = part
        return torch.from_numpy(values)


@dataclass
class _Fisher:
    """Of a projection, F's diagonal [rows, columns], summed up over texts as gradients come."""

    diagonal: torch.Tensor

    def hook(self, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        values = inputs[0].detach()[0]

        def add(gradient: torch.Tensor) -> None:
            self.diagonal.add_((gradient[0].T @ values).square_())

        output.register_hook(add)  # type: ignore[no-untyped-call]


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
        """Take in the logits [tokens, rows] of the vocabulary's entries from `start` on."""
        self.total = torch.logaddexp(self.total, logits.logsumexp(-1, keepdim=True))
        noise = torch.empty_like(logits).exponential_(generator=self._random).log_().neg_()
        best, label = (logits + noise).max(-1)
        better = best > self._best
        self._best[better], self.labels[better] = best[better], label[better] + start
