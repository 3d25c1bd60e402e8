"""Faults to plant in a copy of a bundle: bits of its stored numbers, and what its graph says.

Places come from the onnx package, so that they do not depend on the reader that they test.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

DATA = "model.onnx.data"

Fault = Callable[[Path], None]


def copy_of(bundle: Path, folder: Path, *, changed: str | tuple[str, ...]) -> Path:
    """The bundle again in `folder`; what is not to be changed is linked, not copied, since it may be large."""
    names = (changed,) if isinstance(changed, str) else changed

    def copy(source: str, target: str) -> None:
        if Path(source).name in names:
            shutil.copyfile(source, target)
        else:
            os.link(source, target)

    shutil.copytree(bundle, folder, copy_function=copy)
    return folder


def flip(name: str, bit: int, *, at: int | str = 0) -> Fault:
    """Flip a bit (0 the lowest) of one number of a stored tensor: of the number `at`, or of its last one."""

    def plant(bundle: Path) -> None:
        offset, width, count = place(bundle, name)
        number = count - 1 if at == "last" else int(at)
        with (bundle / DATA).open("r+b") as file:
            file.seek(offset + number * width + bit // 8)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1 << bit % 8]))

    return plant


def put(name: str, value: float, *, at: int = 0) -> Fault:
    """Store another number."""

    def plant(bundle: Path) -> None:
        offset, width, _ = place(bundle, name)
        with (bundle / DATA).open("r+b") as file:
            file.seek(offset + at * width)
            file.write(np.array(value, {4: "<f4", 2: "<f2"}[width]).tobytes())

    return plant


def swap_rows(name: str, first: int, second: int, count: int) -> Fault:
    """Exchange `count` rows of a stored matrix from `first` on with those from `second` on."""

    def plant(bundle: Path) -> None:
        found = tensor(bundle, name)
        offset, width, total = place(bundle, name)
        row = total * width // found.dims[0]
        with (bundle / DATA).open("r+b") as file:
            parts = []
            for start in (first, second):
                file.seek(offset + start * row)
                parts.append(file.read(count * row))
            for start, part in zip((second, first), parts, strict=True):
                file.seek(offset + start * row)
                file.write(part)

    return plant


def attribute(op_type: str, name: str, value: float, *, which: int = 0) -> Fault:
    """Set an attribute of one node of a type, counted from 0, or of every one with -1."""

    def change(model: onnx.ModelProto) -> None:
        nodes = [node for node in model.graph.node if node.op_type == op_type]
        for node in nodes if which < 0 else nodes[which : which + 1]:
            set_attribute(node, name, value)

    return graph(change)


def set_attribute(node: onnx.NodeProto, name: str, value: float) -> None:
    kept = [one for one in node.attribute if one.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def attribute_of(node: onnx.NodeProto, name: str) -> int:
    return next(one.i for one in node.attribute if one.name == name)


def swap_outputs(op_type: str, like: str) -> Fault:
    """Exchange the first two outputs of the node of this type whose name has `like` in it."""

    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op_type and like in node.name)
        node.output[0], node.output[1] = node.output[1], node.output[0]

    return graph(change)


def graph(change: Callable[[onnx.ModelProto], None]) -> Fault:
    """Change the graph by the onnx package."""

    def plant(bundle: Path) -> None:
        model = onnx.load(bundle / "model.onnx", load_external_data=False)
        before = model.SerializeToString()
        change(model)
        assert model.SerializeToString() != before, "nothing changed"
        (bundle / "model.onnx").write_bytes(model.SerializeToString())

    return plant


def tensor(bundle: Path, name: str) -> onnx.TensorProto:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def place(bundle: Path, name: str) -> tuple[int, int, int]:
    """Offset in the data file, bytes of a number, and how many numbers."""
    found = tensor(bundle, name)
    entries = {entry.key: entry.value for entry in found.external_data}
    width = onnx.helper.tensor_dtype_to_np_dtype(found.data_type).itemsize
    return int(entries["offset"]), width, int(entries["length"]) // width
