"""Weights into model.onnx.data, a few rows at a time: memory is bounded by one step, not by the model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import LlamaExportError
from ..optimize.formats import FP32, Format
from ..optimize.graph import ORDER, activations_of
from ..optimize.ort.order_inputs import order_name
from ..optimize.quantise import blocks_of, pack, round_scales, stored_values, to_dense
from ..optimize.stored import Role, Stored, stored_of
from ..optimize.tensors import Blocks, SourceTensor
from ..progress import Progress
from ..runtime.bundle import DATA_FILE, GRAPH_FILE
from .loss import Loss

_STEP = 1 << 19
"""Values that one thread converts at a time: 2 MB in float32, so that the temporaries stay in the processor's cache."""
_INLINE = 1024
"""Bytes up to which a constant of one dimension stays in model.onnx: shapes and axes have to be there. Column orders
have to be in the data file, where verify looks.
"""


@dataclass(frozen=True)
class Region:
    """Where the bytes of one description lie in the data file. dtype: of the stored numbers; row_bytes: of one row."""

    offset: int
    size: int
    row_bytes: int
    dtype: npt.DTypeLike


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
        region = _region(value, end)
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


def _region(value: ir.Value, end: int) -> Region:
    assert value.shape is not None and value.dtype is not None
    shape, dtype = [int(size) for size in value.shape], value.dtype.numpy()  # type: ignore[arg-type]
    row = int(np.prod(shape[1:])) * dtype.itemsize
    size = shape[0] * row
    alignment = 4096 if size >= 4096 else 64  # whole pages, so that ONNX Runtime can map them
    return Region(-(-end // alignment) * alignment, size, row, dtype)


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
            _write_at(file.fileno(), table.tobytes(), region.offset)
        total, done = sum(region.size for region in layout.regions.values()), 0
        losses: dict[str, Loss] = {}
        steps = _steps(layout, tensors, activations_of(model).numpy(), file.fileno())
        with contextlib.closing(_run_all(steps, threads)) as results:  # no step may outlive the open file
            for written in results:
                done += written.size
                if (loss := written.loss) is not None:
                    losses[loss.tensor] = losses[loss.tensor] + loss if loss.tensor in losses else loss
                progress.advance(done, total)
    return [losses[name] for name in tensors if name in losses]


@dataclass(frozen=True)
class _Written:
    """What a step did. size: bytes."""

    size: int
    loss: Loss | None


@dataclass(frozen=True)
class _Step:
    """Rows [start, stop) of one checkpoint tensor, to be written from `row` on in the regions of its weight.

    activations: the dtype that the graph computes in, to which stored values are cast.
    """

    tensor: SourceTensor
    format: Format
    activations: np.dtype[np.generic]
    regions: Mapping[Role, Region]
    start: int
    stop: int
    row: int
    file: int

    def run(self) -> _Written:
        encoded, loss = self._blocks() if self.format.quantised else (self._values(), None)
        return _Written(sum(self._put(role, data) for role, data in encoded.items()), loss)

    def _values(self) -> dict[Role, npt.NDArray[np.generic]]:
        rows = self.tensor.read(self.start, self.stop)
        self._check_finite(rows)
        values = to_dense(rows, self.format)
        if self.format != FP32 or self.activations != np.float32:
            self._check_fits(values)
        return {"values": values}

    def _blocks(self) -> tuple[dict[Role, npt.NDArray[np.generic]], Loss | None]:
        read = blocks_of(self.tensor, self.format)(self.start, self.stop)
        stored = round_scales(read, self.activations)
        encoded: dict[Role, npt.NDArray[np.generic]] = {
            "codes": pack(stored.codes, self.format.bits),
            "scales": stored.scales,
        }
        if stored.zeros is not None:
            encoded["zeros"] = pack(stored.zeros, self.format.bits)
        if stored.offsets is not None:
            encoded["offsets"] = stored.offsets
        for before, after in ((read.scales, stored.scales), (read.offsets, stored.offsets)):
            if before is not None and after is not None:
                self._check_finite(before)
                self._check_fits(after)
        return encoded, self._loss(read, stored)

    def _loss(self, read: Blocks, stored: Blocks) -> Loss | None:
        """What the checkpoint's own quantisation loses here; weights that came unquantised have nothing to lose."""
        if self.format != self.tensor.format:
            return None
        changed = read.scales.size if self.tensor.blocks is None else read.rounded + _changed(read, stored)
        if not changed:
            return None
        values = self.tensor.read(self.start, self.stop).astype(np.float64)
        kept = stored_values(self.tensor, self.format, self.start, self.stop, self.activations)
        return Loss(
            self.tensor.name,
            self.tensor.dtype,
            self.format.name,
            changed,
            float(np.square(values - kept).sum()),
            float(np.square(values).sum()),
        )

    def _put(self, role: Role, data: npt.NDArray[np.generic]) -> int:
        region = self.regions[role]
        stored = np.ascontiguousarray(data.astype(region.dtype, copy=False))
        _write_at(self.file, stored.view(np.uint8).data, region.offset + self.row * region.row_bytes)
        return stored.nbytes

    def _check_finite(self, values: npt.NDArray[np.generic]) -> None:
        if not np.isfinite(values).all():
            raise LlamaExportError(
                f"The checkpoint's tensor {self.tensor.name} holds NaN or infinite values in rows {self.start} to "
                f"{self.stop - 1}, read as {self.tensor.dtype}; a model's weights are finite, so the file is damaged "
                "or its training diverged."
            )

    def _check_fits(self, stored: npt.NDArray[np.generic]) -> None:
        """Look for numbers that became infinite where they were stored, or will where the graph reads them."""
        with np.errstate(over="ignore"):
            if np.isfinite(stored if self.activations == np.float32 else stored.astype(self.activations)).all():
                return
        raise LlamaExportError(
            f"The checkpoint's tensor {self.tensor.name} holds numbers in rows {self.start} to {self.stop - 1} that do "
            "not fit float16, which ends at 65504; use --precision fp32 with -t cpu, which computes in float32."
        )


def _changed(read: Blocks, stored: Blocks) -> int:
    """Blocks whose scale or offset is another once it is stored."""
    changed = stored.scales != read.scales
    if read.offsets is not None and stored.offsets is not None:
        changed |= stored.offsets != read.offsets
    return int(np.count_nonzero(changed))


def _steps(
    layout: Layout, tensors: Mapping[str, SourceTensor], activations: np.dtype[np.generic], file: int
) -> Iterator[_Step]:
    """The work in the order of the file: each weight once, whichever of its regions comes first."""
    weights: dict[tuple[tuple[str, ...], Format], dict[Role, Region]] = {}
    for content, region in layout.regions.items():
        weights.setdefault((content.parts, content.format), {})[content.role] = region
    for (parts, format), regions in weights.items():
        row = 0
        for part in parts:
            tensor = tensors[part]
            rows, columns = tensor.shape[0], int(np.prod(tensor.shape[1:]))
            step = max(1, _STEP // columns)
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                yield _Step(tensor, format, activations, regions, start, stop, row + start, file)
            row += rows


def _run_all(steps: Iterator[_Step], threads: int) -> Generator[_Written]:
    """Run the steps, `threads` at a time, and yield what each did as it ends."""
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        running: set[Future[_Written]] = set()
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


def _write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint tensor went: its format, the initializers by role (`order` too, which all its rows share), and
    its first row in the others.
    """

    format: Format
    initializers: Mapping[str, str]
    row: int


def placements(model: ir.Model, tensors: Mapping[str, SourceTensor]) -> dict[str, Placement]:
    """The place of every checkpoint tensor in the lowered graph; the first where two initializers share the bytes."""
    names: dict[tuple[tuple[str, ...], Format], dict[str, str]] = {}
    for name, value in model.graph.initializers.items():
        content = stored_of(value)
        if content is not None:
            names.setdefault((content.parts, content.format), {}).setdefault(content.role, name)
    found = {}
    for (parts, format), initializers in names.items():
        row = 0
        for part in parts:
            order = tensors[part].order_in(format)
            ordered = {} if order is None else {"order": order_name(order)}
            found[part] = Placement(format, {**initializers, **ordered}, row)
            row += tensors[part].shape[0]
    return found
