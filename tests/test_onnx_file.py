"""The wire reader: it sees what the onnx package sees, and nothing that anybody writes into a file makes it stumble."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from llama_export.errors import LlamaExportError
from llama_export.runtime.bundle import DATA_FILE
from llama_export.runtime.onnx_file import external_initializers, with_accuracy_level
from onnx import TensorProto, helper
from support import onnx_bytes

NAMES = {
    TensorProto.FLOAT: "float32",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}


def external(
    name: str, shape: list[int], kind: int = TensorProto.FLOAT, *, offset: int = 0, **entries: str | None
) -> TensorProto:
    size = int(np.prod(shape)) * helper.tensor_dtype_to_np_dtype(kind).itemsize
    tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA_FILE, "offset": str(offset), "length": str(size), **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*initializers: TensorProto, nodes: tuple[onnx.NodeProto, ...] = ()) -> bytes:
    graph = helper.make_graph(nodes, "g", [], [], initializer=initializers)
    return bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString())


def seen_by_onnx(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    found = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = int(entries.get("offset", 0)), int(entries["length"])
            found[tensor.name] = (NAMES[tensor.data_type], tuple(tensor.dims), *place)
    return found


def seen_by_us(model: bytes, size: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    found = external_initializers(model, size)
    assert all(name == one.name for name, one in found.items())
    return {name: (one.dtype, one.shape, one.offset, one.size) for name, one in found.items()}


# What is there


@pytest.mark.parametrize("stored", ["fp32", "fp16", "int4", "mixed"])
def test_bundles_are_read_as_the_onnx_package_reads_them(stored: str, built: Callable[[str], Path]) -> None:
    folder = built(stored)
    data = (folder / "model.onnx").read_bytes()
    expected = seen_by_onnx(onnx.load_from_string(data))
    assert len(expected) > 10
    assert seen_by_us(data, (folder / DATA_FILE).stat().st_size) == expected


@pytest.mark.parametrize("stored", ["int8", "int4", "Q4_1"])
def test_accuracy_levels_are_set_as_the_onnx_package_would(stored: str, built: Callable[[str], Path]) -> None:
    data = (built(stored) / "model.onnx").read_bytes()
    expected = onnx.load_from_string(data)
    levels = [one for node in expected.graph.node for one in node.attribute if one.name == "accuracy_level"]
    assert {level.i for level in levels} == {4}
    for level in levels:
        level.i = 0
    patched = with_accuracy_level(data, 0)
    assert onnx.load_from_string(patched) == expected
    assert with_accuracy_level(patched, 4) == data


def test_graphs_without_an_accuracy_level_stay_as_they_are(built: Callable[[str], Path]) -> None:
    data = (built("fp32") / "model.onnx").read_bytes()
    assert with_accuracy_level(data, 0) == data
    other = helper.make_node("Other", [], ["x"], bits=4, accuracy_levels=4, level="accuracy_level")
    data = model_of(nodes=(other,))
    assert with_accuracy_level(data, 0) == data


def test_a_level_of_another_width_is_refused() -> None:
    for level in (300, -1):
        data = model_of(nodes=(helper.make_node("MatMulNBits", [], ["x"], accuracy_level=level),))
        with pytest.raises(LlamaExportError, match="an accuracy_level out of range"):
            with_accuracy_level(data, 0)


def random_model(generator: np.random.Generator) -> onnx.ModelProto:
    """A model with much that has to be passed over: nodes, strings, floats, inline data, subgraphs, metadata."""
    kinds, end, tensors = list(NAMES), 0, []
    for index in range(generator.integers(0, 6)):
        shape = generator.integers(0, 300, generator.integers(0, 4)).tolist()
        kind = kinds[generator.integers(len(kinds))]
        if generator.random() < 0.3:
            tensors.append(TensorProto(name=f"inline{index}", data_type=kind, dims=[2], raw_data=b"\x08" * 16))
            continue
        tensor = external(f"päir.{index}", shape, kind, offset=end, checksum="beef")
        tensors.append(tensor)
        end += int(tensor.external_data[2].value)
    inline = TensorProto(name="a", data_type=TensorProto.UINT8, dims=[16], raw_data=b"\x08" * 16)
    inner = helper.make_graph([helper.make_node("Inner", ["a"], ["b"])], "inner", [], [], initializer=[inline])
    nodes = [
        helper.make_node(
            "Op",
            ["", "x" * int(generator.integers(300))],
            ["y"],
            domain="some.domain",
            f=float(generator.random()),
            ints=generator.integers(-(2**62), 2**62, generator.integers(1, 5)).tolist(),
            floats=generator.random(3).tolist(),
            body=inner,
            value=helper.make_tensor("accuracy_level", TensorProto.FLOAT, [1], [4.0]),
        )
        for _ in range(generator.integers(4))
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [], initializer=tensors, doc_string="\n" * 200))
    model.metadata_props.add(key="\x08\x01", value="*" * 130)
    return model


def test_random_models() -> None:
    generator, most = np.random.default_rng(0), 0
    for _ in range(100):
        model = random_model(generator)
        expected = seen_by_onnx(model)
        most = max(most, len(expected))
        assert seen_by_us(model.SerializeToString(), 1 << 40) == expected
    assert most == 5


def test_packed_and_plain_dimensions_are_the_same() -> None:
    """The specification wants a reader to take both; proto3 writers, ours among them, pack."""
    entries = {"location": DATA_FILE, "length": "24"}
    rest = onnx_bytes.number(2, 1) + onnx_bytes.block(8, "x")
    rest += onnx_bytes.blocks(
        13, (onnx_bytes.block(1, key) + onnx_bytes.block(2, value) for key, value in entries.items())
    )
    for dims in (onnx_bytes.number(1, 2) + onnx_bytes.number(1, 3), onnx_bytes.block(1, b"\x02\x03")):
        model = onnx_bytes.block(7, onnx_bytes.block(5, dims + rest))
        assert seen_by_us(model, 24) == {"x": ("float32", (2, 3), 0, 24)}


# What is refused

HERE = "model.onnx.data"
REFUSED: dict[str, tuple[TensorProto, str]] = {
    "a parent": (external("x", [2], location="../model.onnx.data"), r"keeps 'x' in '\.\./model.onnx.data'"),
    "an absolute path": (external("x", [2], location="/etc/passwd"), "keeps 'x' in '/etc/passwd'"),
    "another file": (external("x", [2], location="other.data"), "keeps 'x' in 'other.data'"),
    "a folder": (external("x", [2], location=f"./{HERE}"), "keeps 'x' in"),
    "no file": (external("x", [2], location=None), "keeps 'x' in None"),
    "strings": (external("x", [2], TensorProto.STRING), "as type 8"),
    "beyond the end": (external("x", [2], offset=93), "from 93 on, which does not fit .* the 100 bytes"),
    "far beyond": (external("x", [2], offset=10**30), "does not fit"),
    "before the start": (external("x", [2], offset=-8), "does not fit"),
    "an offset of words": (external("x", [2], offset="eight"), "does not fit"),
    "an offset in other digits": (external("x", [2], offset="²"), "does not fit"),
    "an offset of many digits": (external("x", [2], offset="9" * 5000), "from 99999999999999999999 on"),
    "no size": (external("x", [2], length=None), "at 0 bytes"),
    "a smaller size": (external("x", [2], length="4"), r"at 4 bytes from 0 on, which does not fit its shape \[2\]"),
    "a larger size": (external("x", [2], length="12"), "at 12 bytes"),
    "a negative dimension": (external("x", [-2], length="8"), "does not fit"),
    "two that cancel out": (external("x", [-2, -1], length="8"), "does not fit"),
    "an enormous shape": (external("x", [2**62, 2**62], length="8"), "does not fit"),
    "too many dimensions": (external("x", [1] * 9, length="4"), "does not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_places_that_are_refused(case: str) -> None:
    tensor, message = REFUSED[case]
    with pytest.raises(LlamaExportError, match=message) as caught:
        external_initializers(model_of(external("first", [3]), tensor), 100)
    assert "\n" not in str(caught.value)


def test_the_last_byte_may_be_used() -> None:
    assert external_initializers(model_of(external("x", [2], offset=92)), 100)["x"].offset == 92


def test_bytes_that_do_not_say_external_but_point_somewhere() -> None:
    tensor = external("x", [2], location="../secret")
    tensor.data_location = TensorProto.DEFAULT
    with pytest.raises(LlamaExportError, match=r"\.\./secret"):
        external_initializers(model_of(tensor), 100)


# Damage


def small_model() -> bytes:
    node = helper.make_node("MatMulNBits", ["a", "b"], ["c"], domain="com.microsoft", accuracy_level=4, K=64)
    inline = helper.make_tensor("shape", TensorProto.INT64, [2], [0, -1])
    return model_of(external("b", [4, 5]), inline, external("s", [4], offset=80), nodes=(node, node))


def survives(data: bytes) -> None:
    """Both functions return, or raise our error."""
    for read in (lambda: external_initializers(data, 96), lambda: with_accuracy_level(data, 0)):
        with contextlib.suppress(LlamaExportError):
            read()


def test_truncated_at_every_byte() -> None:
    data = small_model()
    assert len(external_initializers(data, 96)) == 2
    for size in range(len(data)):
        survives(data[:size])


def test_every_bit_flipped() -> None:
    data = small_model()
    for position in range(len(data)):
        for bit in range(8):
            survives(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])


def test_noise() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        noise = generator.bytes(generator.integers(1, 200))
        survives(noise)
        survives(onnx_bytes.block(7, noise))
        survives(onnx_bytes.block(7, onnx_bytes.block(5, noise)))
        survives(onnx_bytes.block(7, onnx_bytes.block(1, onnx_bytes.block(5, noise))))


@pytest.mark.timeout(60)  # seconds where it should take one: a hang, not a slow machine
@pytest.mark.parametrize(
    "data",
    [
        onnx_bytes.block(
            7, onnx_bytes.block(5, onnx_bytes.block(1, b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" * 200_000))
        ),
        onnx_bytes.block(7, b"\x80" * 1_000_000),
        onnx_bytes.block(7, onnx_bytes.blocks(5, [b""] * 100_000)),
        b"\x38" + b"\x80" * 9 + b"\x01" + b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ],
    ids=["a million dimensions", "a number without end", "many empty tensors", "a length beyond all files"],
)
def test_what_is_made_to_take_long(data: bytes) -> None:
    with contextlib.suppress(LlamaExportError):
        external_initializers(data, 100)


def inner(name: str, tensor: TensorProto) -> dict[str, onnx.NodeProto]:
    """Ways to keep a tensor elsewhere than among the initializers of the main graph."""
    graph = helper.make_graph([], "inner", [], [], initializer=[tensor])
    return {
        "constant": helper.make_node("Constant", [], [name], value=tensor),
        "inner graph": helper.make_node("If", ["c"], [name], then_branch=graph, else_branch=graph),
        "list of tensors": helper.make_node("Any", [], [name], values=[tensor]),
    }


@pytest.mark.parametrize("way", inner("x", TensorProto()))
@pytest.mark.parametrize("location", [DATA_FILE, "../secret.bin"])
def test_tensors_in_files_are_initializers_of_the_graph(way: str, location: str) -> None:
    node = inner("x", external("x", [2], location=location))[way]
    with pytest.raises(LlamaExportError, match="keeps tensors in files that are no initializers of its graph"):
        external_initializers(model_of(external("a", [3]), nodes=(node,)), 100)
    node = inner("x", helper.make_tensor("x", TensorProto.FLOAT, [2], [1, 2]))[way]
    assert list(external_initializers(model_of(external("a", [3]), nodes=(node,)), 100)) == ["a"]
