"""PyTorch's side of the proof: transformers' own layers on exactly the weights that the bundle stores, one layer in
memory.

Weights are read from the checkpoint and converted again, not read back from the bundle: what the writer did wrong
shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedConfig

from ..optimize.formats import Format
from ..optimize.plan import head_of
from ..optimize.quantise import stored_values
from ..optimize.tensors import Float32, SourceTensor
from ..progress import Progress
from ..runtime.reference import Fingerprint
from .layerwise import Layerwise, Parts, cuts, float32_bytes
from .lora.peft_folder import LowRank


@dataclass
class ExactModel:
    """A model in float32 whose weights are those of a bundle: `formats` applied to `tensors`, scales in `scale_dtype`.

    context: of the bundle, for which the frequencies of the dynamic rope type are fixed. added: what an adapter adds to
    stored weights, its matrices in `scale_dtype` too.
    fingerprints: of every tensor that was used, by name: sha256 and norm of its dequantised values.
    """

    config: PreTrainedConfig
    tensors: Mapping[str, SourceTensor]
    formats: Mapping[str, Format]
    scale_dtype: npt.DTypeLike
    context: int
    added: Mapping[str, LowRank] = field(default_factory=dict)
    fingerprints: dict[str, tuple[str, float]] = field(default_factory=dict)

    def logits(self, sequences: Sequence[Sequence[int]], progress: Progress) -> list[Float32]:
        """The logits [length, vocab] after each token of each sequence, all sequences in one pass over the weights."""
        total = float32_bytes(self.tensors)
        model = Layerwise(self.config, self.tensors, self.context, self._parts)
        hidden = model.decoded(sequences, lambda *_: progress.advance(self._used_bytes(), total))
        progress.advance(self._used_bytes(), total)
        logits = self._head(model.normed(torch.cat([state[0] for state in hidden])))
        progress.advance(total, total)
        return np.split(logits, np.cumsum([len(sequence) for sequence in sequences])[:-1])

    def _head(self, normed: torch.Tensor) -> Float32:
        logits = np.empty((len(normed), self.config.vocab_size), np.float32)
        for start, part in self._parts(head_of(self.tensors)):
            logits[:, start : start + len(part)] = (normed @ torch.from_numpy(part).T).numpy()
        return logits

    def _parts(self, name: str) -> Parts:
        """The tensor's dequantised rows, whose fingerprint is known when all have passed."""
        tensor, format, passed = self.tensors[name], self.formats[name], Fingerprint()
        for start, stop in cuts(tensor):
            rows = stored_values(tensor, format, start, stop, self.scale_dtype)
            if name in self.added:
                rows = rows + self.added[name].delta(start, stop, self.scale_dtype)
            passed.add(rows)
            yield start, np.ascontiguousarray(rows)
        self.fingerprints[name] = passed.value

    def _used_bytes(self) -> int:
        return float32_bytes({name: self.tensors[name] for name in self.fingerprints})
