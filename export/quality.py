"""What quantisation cost a bundle: PyTorch's layers with the checkpoint's weights, with those that are stored, and what
runs here.

The text passes once through the shipped graph, whose logits go to a file, and then through one pass over the weights,
in which all three meet. Of logits only pieces are in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..errors import LlamaExportError
from ..names import ONNXRUNTIME, PRODUCTS
from ..optimize.formats import Format, stored_bytes
from ..optimize.plan import head_of
from ..optimize.tensors import Float32, SourceTensor
from ..progress import Progress
from ..runtime.arrays import Float64
from ..runtime.bundle import CPU_PROVIDER, DATA_FILE, GRAPH_FILE, Bundle, Manifest
from ..runtime.evaluate.intervals import bootstrap_mean
from ..runtime.proof.replayers import GraphReplayer
from ..runtime.quality import End, EndFigures, Interval, MeasuredText, Prediction, Quality
from ..runtime.quality import Matrix as MatrixRecord
from ..runtime.threads import physical_cores
from .config import transformers_config
from .layerwise import cuts
from .memory import give_back
from .quality_layers import Errors, MatrixErrors
from .quality_logits import Apart, Divergences, KeptLogits, scored_logits
from .quality_text import QualityText
from .reference import Exact, Original, StreamedModel
from .source import Source
from .write import Placement

OWN_CODES = "own codes"
"""The method of bundles that keep a checkpoint's."""

_PIECE = 1 << 21
"""Logits that are compared together: several arrays of as many are in memory then."""

_LARGEST_NLL = 690.0
"""Whose exponential is a float64."""


@dataclass(frozen=True)
class Measurer:
    """Measures the bundle in `folder`, whose graph and weights are there and whose manifest is not yet.

    source: with adapters merged in, where they are; those beside the weights are left out. stored: the tensors that
    were written. placements: where, see `write.placements`. activations: the dtype that the graph computes in.
    cannot_run: why the bundle's own graph is not run here, "" where it is.
    """

    source: Source
    stored: Mapping[str, SourceTensor]
    placements: Mapping[str, Placement]
    folder: Path
    manifest: Manifest
    activations: str
    text: QualityText
    progress: Progress
    cannot_run: str = ""

    def quality(self, method: str, prediction: Prediction | None = None) -> Quality:
        """method: how weights were quantised. prediction: what was expected, where anything was.

        Raises LlamaExportError where logits with the checkpoint's or the stored weights are not finite.
        """
        give_back()  # what earlier stages freed
        tensors = self.source.tensors
        head = tensors[head_of(tensors)]
        pieces = (first for start, stop in cuts(head) for first, _ in _pieces(start, stop, self._scored))
        places = [*pieces, head.shape[0]]
        with KeptLogits(self.folder.parent, self._scored, places) as kept:
            shipped = self._shipped(kept)
            give_back()
            watch = self._watched(kept if isinstance(shipped, Shipped) else None)
        end = watch.end(shipped)
        text = MeasuredText(self.text.name, self.text.sha256, len(self.text.windows), self.text.tokens)
        files = {name: (self.folder / name).stat().st_size for name in (GRAPH_FILE, DATA_FILE)}
        matrices = tuple(self._matrices(watch.matrices.errors))
        return Quality(method, text, self._bytes(), files, end, matrices, prediction)

    @property
    def _scored(self) -> int:
        """Tokens that have a next one in their window."""
        return self.text.tokens - len(self.text.windows)

    def _shipped(self, kept: KeptLogits) -> Shipped | str:
        """Put what runs here through the text; what computed it, or why it cannot."""
        if self.cannot_run:
            return self.cannot_run
        # This takes no GPU: ONNX Runtime's CPU kernels run the same graph.
        bundle = Bundle(self.folder, replace(self.manifest, providers=(CPU_PROVIDER,)), manifest_sha256="")
        try:
            graph = (self.folder / GRAPH_FILE).read_bytes()
            replayer = GraphReplayer(bundle, graph, physical_cores(), exact=False)
            for logits in scored_logits(replayer, self.text.windows):
                kept.add(logits)
        except LlamaExportError as error:
            return f"ONNX Runtime cannot run it here: {error}".replace(str(self.folder), "the bundle")
        return Shipped(replayer.name + self._instead)

    @property
    def _instead(self) -> str:
        """What computes on a device, where that is not what computes here."""
        backend = self.manifest.backend
        if backend != ONNXRUNTIME:
            return f", the graph that {PRODUCTS[backend]} gets"
        return "" if self.manifest.provider == CPU_PROVIDER else f", in place of {self.manifest.provider}"

    def _watched(self, kept: KeptLogits | None) -> Comparison:
        source, context = self.source, self.manifest.limits.context
        config, formats = transformers_config(source.config), {n: p.format for n, p in self.placements.items()}
        sides = (Original(source.tensors), Exact(self.stored, formats, self._scales))
        matrices = MatrixErrors(config, context, source.tensors, self.stored, self.text.windows)
        watch = Comparison(self.text.windows, matrices, kept)
        StreamedModel(config, source.tensors, context, sides).show(self.text.windows, self.progress, watch)
        matrices.embedding(sides[1])
        return watch

    @property
    def _scales(self) -> npt.DTypeLike:
        return np.dtype(self.activations)

    def _bytes(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, placement in self.placements.items():
            for place in (placement, *placement.copies):
                counts[place.format.name] += self._stored_bytes(name, place.format)
        return dict(counts.most_common())

    def _stored_bytes(self, name: str, format: Format) -> int:
        return stored_bytes(self.source.tensors[name].shape, format, np.dtype(self._scales).itemsize)

    def _matrices(self, errors: Mapping[str, Errors]) -> Iterator[MatrixRecord]:
        for name, tensor in self.source.tensors.items():
            if len(tensor.shape) == 1:
                continue
            format, size = self.placements[name].format, math.prod(tensor.shape)
            bits = 8 * self._stored_bytes(name, format) / size
            found = errors[name]
            weight, output = rounded(found.weight), rounded(found.output)
            yield MatrixRecord(name, _layer_of(name), format.name, size, rounded(bits), weight, output)


def _layer_of(name: str) -> int | None:
    first, _, rest = name.partition("model.layers.")
    return int(rest.partition(".")[0]) if not first and rest else None


@dataclass(frozen=True)
class Shipped:
    """What computed the logits that were kept. by: its name."""

    by: str


@dataclass
class Comparison:
    """Of the checkpoint's weights with those that are stored, and of what runs: a `reference.Watch`. windows: of two
    tokens at least each. kept: the shipped graph's logits at the scored places, None where there are none.
    """

    windows: Sequence[Sequence[int]]
    matrices: MatrixErrors
    kept: KeptLogits | None
    divergences: Divergences = field(init=False)
    scored: torch.Tensor = field(init=False)
    _original: Float32 | None = None

    def __post_init__(self) -> None:
        targets = [token for window in self.windows for token in window[1:]]
        self.divergences = Divergences(targets, 1 if self.kept is None else 2)
        lengths = list(map(len, self.windows))
        ends = np.cumsum(lengths) - 1
        self.scored = torch.from_numpy(np.delete(np.arange(sum(lengths)), ends))

    def layer(
        self, index: int, layer: torch.nn.Module, hidden: Sequence[torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """See `Watch.layer`."""
        return self.matrices.layer(index, layer, hidden)

    def converted(self, name: str, before: Float32, after: Float32) -> None:
        """See `Watch.converted`."""
        self.matrices.converted(name, before, after)

    def last(self, hidden: Sequence[torch.Tensor]) -> None:
        """See `Watch.last`."""
        self.matrices.last(hidden)

    def head(self, side: int, start: int, rows: Float32, logits: Float32) -> None:
        """See `Watch.head`."""
        self.matrices.head(side, start, rows)
        if not side:
            self._original = logits
            return
        assert self._original is not None
        for first, last in _pieces(start, start + len(rows), len(self.scored)):
            both = (one[:, first - start : last - start] for one in (self._original, logits))
            original, stored = (torch.from_numpy(one)[self.scored] for one in both)
            kept = [] if self.kept is None else [torch.from_numpy(self.kept.piece(first, last))]
            self.divergences.add(first, original, [stored, *kept])

    def end(self, shipped: Shipped | str) -> End:
        """Everything has passed. shipped: what computed the logits that were kept, or why there are none."""
        original = _perplexity(self.divergences.original_nll())
        weights = self._figures(f"PyTorch {torch.__version__}", self.divergences.apart(0, "The stored weights'"))
        if isinstance(shipped, str):
            return End(original, weights, None, shipped)
        return End(original, weights, self._figures(shipped.by, self.divergences.apart(1, "The shipped graph's")))

    def _figures(self, by: str, apart: Apart) -> EndFigures:
        counts = [len(window) - 1 for window in self.windows]
        groups = np.split(apart.kl, np.cumsum(counts)[:-1])
        kl = bootstrap_mean(groups)
        return EndFigures(
            by,
            Interval(_nats(kl.value), *(None if end is None else _nats(end) for end in (kl.low, kl.high))),
            _nats(np.quantile(apart.kl, 0.99)),
            _nats(apart.kl.max()),
            rounded(float(apart.same.mean())),
            _perplexity(apart.nll),
        )


def _pieces(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """Parts of the vocabulary [start, stop) whose logits at so many places are compared together."""
    step = max(1, _PIECE // max(1, rows))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def _perplexity(nll: Float64) -> float:
    return rounded(math.exp(min(max(0.0, float(nll.mean())), _LARGEST_NLL)))


def _nats(value: float) -> float:
    """As exact as a divergence is."""
    return rounded(round(float(value), 7))


def rounded(value: float) -> float:
    """To six digits: builds of the same are equal, where kernels do not add in the same order every time."""
    return float(f"{value:.6g}")
