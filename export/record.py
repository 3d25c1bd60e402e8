"""The references inside a bundle: the exported model proposes greedy text, one PyTorch pass proves each token, with
the checkpoint's weights and with those that the bundle stores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedConfig

from ..optimize.formats import Format
from ..optimize.graph import ORDER as ORDER_PREFIX
from ..optimize.graph import ROTARY_TABLES
from ..optimize.ort.cache_int8 import NO_SCALES, scale_name
from ..optimize.plan import column_orders
from ..optimize.quantise import dense_format
from ..optimize.shared.order_inputs import order_name
from ..optimize.tensors import Float32, SourceTensor
from ..optimize.trt.linear import NO_INPUT_SCALES, InputScale
from ..progress import Progress
from ..runtime.bundle import CPU_PROVIDER, GRAPH_FILE, Bundle, Manifest
from ..runtime.proof.reference import EXACT, INDEX, ORDER, InputRecord, Reference, WeightRecord, fingerprint
from ..runtime.proof.replayers import GraphReplayer
from ..runtime.threads import physical_cores
from .config import transformers_config
from .identity import identity_of, stored_type
from .lora.peft_folder import Adapter
from .memory import give_back
from .prompts import Asked, without_long
from .propose import propose
from .prove import About, Proposed, prove, spread_layers
from .reference import Computed, Exact, Original, StreamedModel
from .rotary import rotary_tables
from .source import Source
from .write import Placement

_ADAPTER_PROMPTS = 2
"""Recorded of an adapter: its graph is the model's, which has been through all prompts."""


@dataclass(frozen=True)
class Recorder:
    """Makes the references of the bundle in `folder`, whose graph and weights are there and whose manifest is not yet.

    source: with adapters merged in, where they are; stored: the tensors that were written. sha256: of the checkpoint,
    see `identity.model_sha256`. prompts: as `prompts` encodes them. tools: versions of what computes them.
    """

    source: Source
    stored: Mapping[str, SourceTensor]
    folder: Path
    manifest: Manifest
    sha256: str
    prompts: Sequence[Asked]
    tools: Mapping[str, str]
    progress: Progress

    def model(
        self,
        placements: Mapping[str, Placement],
        tables: Mapping[str, npt.NDArray[np.generic]],
        inputs: Mapping[str, InputScale] = NO_INPUT_SCALES,
        cache: Mapping[str, Float32] = NO_SCALES,
    ) -> dict[str, Reference]:
        """Both references of the model, by kind.

        placements: where each checkpoint tensor is stored, see `write.placements`. tables: the constants beside them in
        the data file, see `write.tables_of`. inputs: the scales that calibration found, by weight. cache: those of a
        cache in int8, by its inputs.
        """
        source = self.source
        formats = {name: placement.format for name, placement in placements.items()}
        sides = (Original(source.tensors), Exact(self.stored, formats, self._scales))
        found, computed = self._proven(sides, self.prompts, None)
        weights = tuple(
            record for name in source.tensors for record in _weights(name, source, placements[name], computed[EXACT])
        )
        config = transformers_config(source.config)
        constants = (*_tables(tables, config, self.manifest.limits.context, cache), *_orders(self.stored, formats))
        rounded = (InputRecord(name, one.scale, one.dtype.name.lower()) for name, one in inputs.items())
        return _with_weights(found, weights, constants, tuple(rounded))

    def adapter(
        self, adapter: Adapter, matrices: Sequence[WeightRecord], formats: Mapping[str, Format]
    ) -> dict[str, Reference]:
        """Both references of an adapter that lies in the bundle beside the weights, by kind: transformers' layers on
        the weights with what the adapter adds. matrices: what `write_adapter` recorded.
        """
        tensors = self.source.tensors
        sides = (Original(tensors, adapter.parts), Exact(self.stored, formats, self._scales, adapter.parts))
        found, _ = self._proven(sides, without_long(self.prompts, _ADAPTER_PROMPTS), adapter.name)
        return _with_weights(found, tuple(matrices), ())

    @property
    def _scales(self) -> npt.DTypeLike:
        return np.dtype(self.manifest.shape.activations)

    def _proven(
        self, sides: tuple[Original, Exact], prompts: Sequence[Asked], adapter: str | None
    ) -> tuple[dict[str, Reference], dict[str, Computed]]:
        source, context = self.source, self.manifest.limits.context
        model = StreamedModel(transformers_config(source.config), source.tensors, context, sides)
        about = About(
            source.model_id,
            source.revision,
            stored_type(source),
            identity_of(source, self.sha256),
            self.tools,
            self.manifest.precision,
            adapter,
        )
        layers = spread_layers(source.shape.layers)
        return prove(model, about, self._proposals(prompts, adapter), layers, self.progress)

    def _proposals(self, prompts: Sequence[Asked], adapter: str | None) -> list[Proposed]:
        """The greedy text of the exported graph in full precision; its session is gone before PyTorch begins."""
        # This takes no GPU: ONNX Runtime's CPU kernels run the same graph.
        bundle = Bundle(self.folder, replace(self.manifest, providers=(CPU_PROVIDER,)), manifest_sha256="")
        graph = (self.folder / GRAPH_FILE).read_bytes()
        give_back()  # what the weights' writing freed; ONNX Runtime needs the most of all stages
        replayer = GraphReplayer(bundle, graph, physical_cores(), exact=True, adapter=adapter)
        return [Proposed(*pair) for pair in zip(prompts, propose(replayer, prompts), strict=True)]


def _with_weights(
    references: Mapping[str, Reference],
    weights: tuple[WeightRecord, ...],
    tables: tuple[WeightRecord, ...],
    inputs: tuple[InputRecord, ...] = (),
) -> dict[str, Reference]:
    """The exact reference with the records of what is stored."""
    exact = references[EXACT]
    return {
        **references,
        EXACT: replace(exact, index=replace(exact.index, weights=weights, tables=tables, inputs=inputs)),
    }


def _weights(name: str, source: Source, placement: Placement, exact: Computed) -> Iterator[WeightRecord]:
    """A record of each place in which the tensor is stored."""
    sha256, norm = exact.fingerprints[name]
    shape = source.tensors[name].shape
    for place in (placement, *placement.copies):
        names = place.initializers
        yield WeightRecord(name, place.format.name, shape, place.row, names, sha256, norm, place.transposed)


def _tables(
    tables: Mapping[str, npt.NDArray[np.generic]],
    config: PreTrainedConfig,
    context: int,
    cache: Mapping[str, Float32],
) -> Iterator[WeightRecord]:
    """What no prompt reaches the end of, and what the full-precision replay leaves out: the rotary tables, computed
    anew, the indices of positions, and the scales of a cache in int8.
    """
    numbers = dict(zip(ROTARY_TABLES, rotary_tables(config, context), strict=True))
    numbers |= {scale_name(name): scale for name, scale in cache.items()}
    for name, table in tables.items():
        if name.startswith(ORDER_PREFIX):
            continue  # recorded by `_orders`
        stored = numbers[name].astype(table.dtype) if name in numbers else np.arange(context).reshape(table.shape)
        format = dense_format(str(table.dtype)).name if name in numbers else INDEX
        sha256, norm = fingerprint(iter([stored.astype(np.float32)]))
        yield WeightRecord(name, format, table.shape, 0, {"values": name}, sha256, norm)


def _orders(tensors: Mapping[str, SourceTensor], formats: Mapping[str, Format]) -> Iterator[WeightRecord]:
    """The orders of columns, each once."""
    orders = column_orders(tensors, formats).values()
    for name, order in {order_name(order): order for order in orders}.items():
        sha256, norm = fingerprint(iter([order.astype(np.float32)]))
        yield WeightRecord(name, ORDER, order.shape, 0, {"values": name}, sha256, norm)
