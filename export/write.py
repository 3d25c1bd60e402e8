"""Weights into model.onnx.data, a few rows at a time: memory is bounded by one step, not by the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..optimize.formats import Format
from ..optimize.graph import ORDER, activations_of
from ..optimize.shared.order_inputs import order_name
from ..optimize.stored import Role, Stored, stored_of
from ..optimize.tensors import SourceTensor
from ..progress import Progress
from ..runtime.bundle import DATA_FILE, GRAPH_FILE
from .columns import Panel, panel_rows, panels
from .encode import Part, Written
from .loss import Loss
from .region import Region, pack_columns, region_of, write_at

_STEP = 1 << 19
"""Values that one thread converts at a time: 2 MB in float32, so that the temporaries stay in the processor's cache."""
_INLINE = 1024
"""Bytes up to which a constant of one dimension stays in model.onnx: shapes and axes have to be there. Column orders
have to be in the data file, where verify looks.
"""


@dataclass(frozen=True)
class Layout:
    """The data file before it is written: a region for each description, and for each table that is computed here."""

    regions: Mapping[Stored, Region]
    tables: Mapping[str, Region]
    size: int


def lay_out(model: ir.Model) -> Layout:
    """Give each stored initializer and each large constant its place; equal descriptions share one."""
    regions: dict[Stored, Region] = {}
    tables: dict[str, Region] = {}
    end = 0
    for name, value in model.graph.initializers.items():
        content = stored_of(value)
        if content in regions or (content is None and _inline(name, value)):
            continue
        region = region_of(value, content, end)
        if content is None:
            tables[name] = region
        else:
            regions[content] = region
        end = region.offset + region.size
    return Layout(regions, tables, end)


def _inline(name: str, value: ir.Value) -> bool:
    assert value.const_value is not None, f"{name} has neither values nor a description"
    size = value.const_value.nbytes
    small = size == 0 or (size <= _INLINE and len(value.const_value.shape) < 2)
    return small and not name.startswith(ORDER)


def tables_of(model: ir.Model, layout: Layout) -> dict[str, npt.NDArray[np.generic]]:
    """The constants that lie in the data file, before `refer` has replaced them."""
    values = {name: model.graph.initializers[name].const_value for name in layout.tables}
    return {name: value.numpy() for name, value in values.items() if value is not None}


def refer(model: ir.Model, layout: Layout, folder: Path) -> None:
    """Point every initializer of `model` that has a place at it, and write model.onnx into `folder`."""
    for name, value in model.graph.initializers.items():
        content = stored_of(value)
        region = layout.tables.get(name) if content is None else layout.regions[content]
        if region is not None and value.dtype is not None and value.shape is not None:
            value.const_value = ir.ExternalTensor(
                DATA_FILE, region.offset, region.size, value.dtype, shape=value.shape, name=name, base_dir=folder
            )
    ir.save(model, folder / GRAPH_FILE)


def write_data(
    model: ir.Model,
    layout: Layout,
    tensors: Mapping[str, SourceTensor],
    folder: Path,
    progress: Progress,
    threads: int,
) -> list[Loss]:
    """Fill the data file in `folder`: read rows, convert, write at their place, forget; `threads` at a time.

    Returns what the checkpoint's own quantisation lost, for each tensor whose blocks cannot be kept as they are.
    Raises LlamaExportError when a tensor holds NaN or infinity, or numbers too large for the type that computes.
    """
    with (folder / DATA_FILE).open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, layout.size)  # a full disk shows now, not at the end
        else:
            file.truncate(layout.size)
        for name, region in layout.tables.items():
            table = model.graph.initializers[name].const_value
            assert table is not None
            write_at(file.fileno(), table.tobytes(), region.offset)
        total, done = sum(region.size for region in layout.regions.values()), 0
        losses: dict[str, Loss] = {}
        steps = _steps(layout, tensors, activations_of(model).numpy(), file.fileno())
        with contextlib.closing(_run_all(steps, threads)) as results:  # no step may outlive the open file
            for size, lost in results:
                done += size
                for loss in lost:
                    losses[loss.tensor] = losses[loss.tensor] + loss if loss.tensor in losses else loss
                progress.advance(done, total)
    return [losses[name] for name in tensors if name in losses]


@dataclass(frozen=True)
class _Rows:
    """Rows of one checkpoint tensor, to be written from `row` on in the regions of its weight."""

    part: Part
    regions: Mapping[Role, Region]
    row: int
    file: int

    def run(self) -> Written:
        """Write them."""
        arrays, loss = self.part.encoded()
        size = sum(self._put(role, array) for role, array in arrays.items())
        return size, [loss] if loss is not None else []

    def _put(self, role: Role, array: npt.NDArray[np.generic]) -> int:
        region = self.regions[role]
        if role in ("codes", "zeros"):
            array = pack_columns(array.astype(np.uint8, copy=False), self.part.format, region)
        stored = np.ascontiguousarray(array.astype(region.dtype, copy=False))
        write_at(self.file, stored.view(np.uint8).data, region.offset + self.row * region.row_bytes)
        return stored.nbytes


def _steps(
    layout: Layout, tensors: Mapping[str, SourceTensor], activations: np.dtype[np.generic], file: int
) -> Iterator[_Rows | Panel]:
    """The work in the order of the file: each weight once, whichever of its regions comes first."""
    weights: dict[tuple[tuple[str, ...], Format, bool], dict[Role, Region]] = {}
    for content, region in layout.regions.items():
        weights.setdefault((content.parts, content.format, content.transposed), {})[content.role] = region
    for (names, format, transposed), regions in weights.items():
        stacked = [tensors[name] for name in names]
        if transposed:
            parts = _parts(stacked, format, activations, panel_rows(stacked[0].shape[1]))
            yield from panels(parts, regions, file)
        else:
            parts = _parts(stacked, format, activations)
            yield from (_Rows(part, regions, row, file) for row, part in parts)


def _parts(
    stacked: Sequence[SourceTensor], format: Format, activations: np.dtype[np.generic], together: int = 1 << 62
) -> Iterator[tuple[int, Part]]:
    """The rows of all tensors in parts of at most `_STEP` values, each with its first row in the whole; none reaches
    over a multiple of `together` rows.
    """
    row = 0
    for tensor in stacked:
        step, start = max(1, _STEP // int(np.prod(tensor.shape[1:]))), 0
        while start < tensor.shape[0]:
            stop = min(tensor.shape[0], start + step, start + together - row % together)
            yield row, Part(tensor, format, activations, start, stop)
            row, start = row + stop - start, stop


def _run_all(steps: Iterator[_Rows | Panel], threads: int) -> Generator[Written]:
    """Run the steps, `threads` at a time, and yield what each did as it ends."""
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        running: set[Future[Written]] = set()
        try:
            for step in steps:
                running.add(pool.submit(step.run))
                if len(running) > threads:  # one waiting, so that none idles; more would only hold memory
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            yield from (future.result() for future in running)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint tensor went: its format, the initializers by role (`order` too, which all its rows share), and
    its first row in the others, which is a column where they are transposed. copies: the other places of the same
    numbers in another layout.
    """

    format: Format
    initializers: Mapping[str, str]
    row: int
    transposed: bool = False
    copies: tuple[Placement, ...] = ()


def placements(model: ir.Model, tensors: Mapping[str, SourceTensor]) -> dict[str, Placement]:
    """The place of every checkpoint tensor in the lowered graph; the first where two initializers share the bytes."""
    names: dict[tuple[tuple[str, ...], Format, bool], dict[str, str]] = {}
    for name, value in model.graph.initializers.items():
        content = stored_of(value)
        if content is not None:
            key = (content.parts, content.format, content.transposed)
            names.setdefault(key, {}).setdefault(content.role, name)
    found: dict[str, Placement] = {}
    for (parts, format, transposed), initializers in names.items():
        row = 0
        for part in parts:
            order = tensors[part].order_in(format)
            ordered = {} if order is None else {"order": order_name(order)}
            place = Placement(format, {**initializers, **ordered}, row, transposed)
            first = found.get(part)
            found[part] = place if first is None else replace(first, copies=(*first.copies, place))
            row += tensors[part].shape[0]
    return found
