"""The scales by which calibrated bundles round what projections read: recorded as calibration found them, and compared
with what the graph holds, whatever was done to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from llama_export.build_options import BuildOptions
from llama_export.errors import LlamaExportError
from llama_export.export.bisect import bisect
from llama_export.export.calibrate import calibrate, input_scales
from llama_export.export.calibration_text import calibration_text
from llama_export.export.source import open_source
from llama_export.optimize.formats import EMBEDDING, FP8, FP16, INT8_ROW
from llama_export.pipeline import build
from llama_export.progress import Silent
from llama_export.referencing import ReferenceOptions, make_reference
from llama_export.runtime.bundle import RECIPE_FILE, open_bundle, reference_file
from llama_export.runtime.proof.input_scales import compare_inputs
from llama_export.runtime.proof.reference import EXACT, Index, InputRecord
from llama_export.runtime.proof.reference_checks import index_problems
from llama_export.runtime.proof.reference_file import load, load_index, load_index_of_bundle, save
from llama_export.runtime.proof.verdict import Verdict
from llama_export.runtime.proof.verify import planned, verify
from onnx import helper, numpy_helper
from support.faults import Fault, copy_of, graph
from support.hf_models import write_llama_folder

pytest.importorskip("onnxruntime", reason="bundles are verified with ONNX Runtime")

TEXT = "The old lighthouse keeper climbed the stairs every evening at dusk. " * 60
TARGETS: dict[str, dict[str, Any]] = {
    "float16 scales": {"target": "jetson-orin", "precision": "int8"},
    "float32 scales": {"target": "jetson-agx-orin-64gb", "precision": "int8", "jetpack": "6.0"},
    "E4M3 numbers": {"target": "jetson-thor-t5000", "precision": "fp8"},
}
LAYER = "model.layers.1."
DOWN, OUT = f"{LAYER}mlp.down_proj", f"{LAYER}self_attn.o_proj"
JOINT = f"{LAYER}mlp.gate_up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("calibrated")
    write_llama_folder(place / "llama")
    (place / "text.txt").write_text(TEXT)
    return place


@pytest.fixture(scope="module")
def built(folder: Path) -> Callable[[str], Path]:
    """A bundle of each kind, made once."""

    def bundle(kind: str) -> Path:
        made = folder / kind.replace(" ", "-")
        if not made.exists():
            settings = {**TARGETS[kind], "calibrate": folder / "text.txt"}
            build(BuildOptions(model=str(folder / "llama"), output=made, **settings))
        return made

    return bundle


@pytest.fixture
def bundle(built: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    files = ("model.onnx", "exact.npz", "recipe.json")
    return copy_of(built("float16 scales"), tmp_path / "bundle", changed=files)


def verdict_of(bundle: Path) -> Verdict:
    return verify(open_bundle(bundle), check_hashes=False, threads=1, progress=Silent())


def failed(verdict: Verdict) -> set[str]:
    return {check.id for check in verdict.checks if not check.passed}


def index_of(bundle: Path) -> Index:
    return load_index_of_bundle(bundle, EXACT)


def differing(bundle: Path) -> dict[str, str]:
    found = compare_inputs((bundle / "model.onnx").read_bytes(), index_of(bundle))
    return {difference.name: difference.problem for difference in found}


@pytest.mark.parametrize("kind", TARGETS)
def test_what_calibration_found_is_recorded_and_held_to(kind: str, folder: Path, built: Callable[[str], Path]) -> None:
    path = built(kind)
    index, source = index_of(path), open_source(str(folder / "llama"))
    context = open_bundle(path).manifest.limits.context
    formats = {record.name: INT8_ROW if "int8" in TARGETS[kind].values() else FP8 for record in index.weights}
    text = calibration_text(source, folder / "text.txt", context)
    matrices = {name: formats[name] if name != EMBEDDING else FP16 for name in formats}
    found = calibrate(source, text, context, matrices, Silent())
    scales = input_scales(found, formats)
    dtype = "int8" if "int8" in TARGETS[kind].values() else "float8e4m3fn"
    assert len(index.inputs) == 7 * 2 + 1
    assert index.inputs == tuple(InputRecord(name, scales[name].scale, dtype) for name in scales)
    verdict = verdict_of(path)
    assert verdict.passed, verdict.failed
    check = next(check for check in verdict.checks if check.id == "weights")
    assert check.title.endswith(", and the scales of 15 rounded inputs")


def test_a_reference_that_is_made_apart_has_them_too(folder: Path, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.npz"
    make_reference(ReferenceOptions(str(folder / "llama"), out, bundle=bundle, exact=True, new_tokens=2))
    assert load_index(out).inputs == index_of(bundle).inputs
    number(f"{DOWN}.input_scale", lambda scale: 3 * scale)(bundle)
    verdict = verify(open_bundle(bundle), check_hashes=False, threads=1, progress=Silent(), references=[out])
    assert "weights" in failed(verdict)


def number(name: str, change: Callable[[Any], Any]) -> Fault:
    """Another number in place of a constant of the graph."""

    def edit(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.name == name)
        value = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.array(change(value), value.dtype), name))

    return graph(edit)


def exchanged(model: onnx.ModelProto) -> None:
    first, second = (
        one for one in model.graph.initializer if one.name in (f"{DOWN}.input_scale", f"{OUT}.input_scale")
    )
    first.raw_data, second.raw_data = second.raw_data, first.raw_data


SCALES: dict[str, tuple[Fault, set[str]]] = {
    "three times as large": (number(f"{DOWN}.input_scale", lambda scale: 3 * scale), {DOWN}),
    "an eighth": (number(f"{OUT}.input_scale", lambda scale: scale / 8), {OUT}),
    "the next float16": (number(f"{OUT}.input_scale", lambda scale: np.nextafter(scale, np.float16(9))), {OUT}),
    "not a number": (number(f"{DOWN}.input_scale", lambda _: np.nan), {DOWN}),
    "of two that share it": (
        number(f"{JOINT}.input_scale", lambda scale: 3 * scale),
        {f"{LAYER}mlp.{one}_proj" for one in ("gate", "up")},
    ),
    "two exchanged": (graph(exchanged), {DOWN, OUT}),
}


@pytest.mark.parametrize("fault", SCALES)
def test_a_wrong_scale_is_found_and_named_without_hashes(bundle: Path, fault: str) -> None:
    plant, names = SCALES[fault]
    plant(bundle)
    verdict = verdict_of(bundle)
    assert "weights" in failed(verdict)
    assert not failed(verdict) & {"full", "layers"}, "these leave the rounding out"
    check = next(check for check in verdict.checks if check.id == "weights")
    assert {line.partition(":")[0] for line in check.details} == {f"{name}.weight" for name in names}
    assert all("its input is rounded to " in line and " by calibration" in line for line in check.details)
    assert check.cases[0].gates[0].measured == len(names)


def test_a_scale_without_a_record_is_found_and_one_without_a_rounding(bundle: Path) -> None:
    path = bundle / reference_file(EXACT)
    reference = load(path)
    kept = tuple(record for record in reference.index.inputs if record.name != f"{DOWN}.weight")
    save(replace(reference, index=replace(reference.index, inputs=kept)), path)
    assert len(kept) == 14
    verdict = verdict_of(bundle)
    assert failed(verdict) == {"weights"}
    details = next(check.details for check in verdict.checks if check.id == "weights")
    assert len(details) == 1
    assert details[0].startswith(f"{DOWN}.weight: its input is rounded to ")
    assert details[0].endswith("not recorded by the reference")
    save(replace(reference, index=replace(reference.index, inputs=())), path)
    assert len(differing(bundle)) == 15


def nodes(model: onnx.ModelProto, op_type: str, like: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op_type and f"{like}/input" in node.name]


def rewired(op_types: tuple[str, ...], place: int, name: str) -> Callable[[onnx.ModelProto], None]:
    """Another value read by the two nodes that round what `down_proj` reads, or by one of them."""

    def edit(model: onnx.ModelProto) -> None:
        for op_type in op_types:
            (node,) = nodes(model, op_type, DOWN)
            node.input[place] = name

    return edit


def left_out(model: onnx.ModelProto) -> None:
    there, back = (nodes(model, op, DOWN)[0] for op in ("QuantizeLinear", "DequantizeLinear"))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == back.output[0]:
                node.input[place] = there.input[0]
    model.graph.node.remove(there)
    model.graph.node.remove(back)


def computed(model: onnx.ModelProto) -> None:
    """The recorded number, and one that is made of it."""
    scale = f"{DOWN}.input_scale"
    model.graph.node.insert(0, helper.make_node("Add", [scale, scale], ["double"], name="double"))
    rewired(BOTH, 1, "double")(model)


def twice(model: onnx.ModelProto) -> None:
    """Which of them counts, readers may take differently."""
    first = next(one for one in model.graph.initializer if one.name == f"{DOWN}.input_scale")
    value = numpy_helper.to_array(first)
    model.graph.initializer.append(numpy_helper.from_array(np.array(value * 3, value.dtype), first.name))


def two_encodings(model: onnx.ModelProto) -> None:
    next(one for one in model.graph.initializer if one.name == f"{DOWN}.input_scale").int32_data.append(0x3C00)


def other_integers(model: onnx.ModelProto) -> None:
    zero = next(one for one in model.graph.initializer if one.name == f"{DOWN}.input_zero")
    zero.data_type = onnx.TensorProto.UINT8


def attribute(model: onnx.ModelProto) -> None:
    for op_type in BOTH:
        nodes(model, op_type, DOWN)[0].attribute.append(helper.make_attribute("axis", 2))


def inserted(model: onnx.ModelProto) -> None:
    """What attention reads is rounded too, by a scale that the graph has: the full-precision replay leaves it out."""
    node = next(node for node in model.graph.node if node.op_type == "MatMul" and "attention" in node.name)
    at, scale = list(model.graph.node).index(node), [f"{OUT}.input_scale", f"{OUT}.input_zero"]
    model.graph.node.insert(at, helper.make_node("QuantizeLinear", [node.input[0], *scale], ["stray"]))
    model.graph.node.insert(at + 1, helper.make_node("DequantizeLinear", ["stray", *scale], ["stray back"]))
    node.input[0] = "stray back"


def read_by_others(model: onnx.ModelProto) -> None:
    """The norm's result is used rounded by what should have it as it is."""
    back = nodes(model, "DequantizeLinear", DOWN)[0]
    model.graph.node.append(helper.make_node("Neg", [back.output[0]], ["reader"], name="reader"))


def doubly(model: onnx.ModelProto) -> None:
    """Rounded a second time, coarsely, before the recorded rounding."""
    there = nodes(model, "QuantizeLinear", DOWN)[0]
    at, scale = list(model.graph.node).index(there), [f"{OUT}.input_scale", f"{OUT}.input_zero"]
    model.graph.node.insert(at, helper.make_node("QuantizeLinear", [there.input[0], *scale], ["before"]))
    model.graph.node.insert(at + 1, helper.make_node("DequantizeLinear", ["before", *scale], ["before back"]))
    there.input[0] = "before back"


BOTH = ("QuantizeLinear", "DequantizeLinear")
WEIGHT = f"{DOWN}.weight"
GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], None], str, str]] = {
    "another projection's scale": (rewired(BOTH, 1, f"{OUT}.input_scale"), WEIGHT, "its input is rounded to"),
    "one side alone": (rewired(BOTH[1:], 1, f"{OUT}.input_scale"), WEIGHT, "in one way and brought back in another"),
    "the other side": (rewired(BOTH[:1], 1, f"{OUT}.input_scale"), WEIGHT, "in one way and brought back in another"),
    "no constant": (computed, WEIGHT, "by what is no constant number"),
    "twice the name": (twice, WEIGHT, "by what is no constant number"),
    "two encodings": (two_encodings, WEIGHT, "by what is no constant number"),
    "along an axis": (attribute, WEIGHT, "in one way and brought back in another"),
    "other integers": (other_integers, WEIGHT, "times a number of uint8"),
    "left out": (left_out, WEIGHT, "its input is not rounded"),
    "something else rounded": (inserted, "stray", "no recorded weight is multiplied with"),
    "rounded before": (doubly, "before", "no recorded weight is multiplied with"),
    "read by others": (read_by_others, "reader", "rounded for a projection"),
}


@pytest.mark.parametrize("fault", GRAPHS)
def test_another_rounding_in_the_graph_is_found(bundle: Path, fault: str) -> None:
    assert differing(bundle) == {}
    edit, name, problem = GRAPHS[fault]
    graph(edit)(bundle)
    found = differing(bundle)
    assert found.keys() == {name}
    assert problem in found[name]


def test_a_zero_point_is_found(bundle: Path) -> None:
    number(f"{OUT}.input_zero", lambda _: 3)(bundle)
    found = differing(bundle)
    assert found.keys() == {f"{OUT}.weight"}
    assert "with a zero point" in found[f"{OUT}.weight"]


def test_a_scale_in_the_data_file_has_no_record_there(bundle: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.name == f"{OUT}.input_scale")
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "model.onnx.data", "offset": "0", "length": "2"}.items():
            tensor.external_data.add(key=key, value=value)

    graph(edit)(bundle)
    with pytest.raises(LlamaExportError, match=rf"does not say what all of '{OUT}.input_scale'"):
        verdict_of(bundle)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_a_reference_whose_scales_cannot_be_is_refused(bundle: Path, scale: float) -> None:
    index = index_of(bundle)
    first, *others = index.inputs
    assert not list(index_problems(index))
    (problem,) = index_problems(replace(index, inputs=(replace(first, scale=scale), *others)))
    assert problem == f"a scale of the input of {first.name!r} out of range"
    (problem,) = index_problems(replace(index, inputs=(first, *index.inputs)))
    assert problem == "two scales for the input of one weight"


def test_a_bisection_names_it_too(bundle: Path) -> None:
    assert bisect(open_bundle(bundle), threads=1).passed
    number(f"{DOWN}.input_scale", lambda scale: 3 * scale)(bundle)
    found = bisect(open_bundle(bundle), threads=1)
    (row,) = found.failed
    assert found.first == row
    assert (row.layer, row.place, row.op) == (1, "mlp.down_proj.weight", "rounding of activations")
    assert row.hint.endswith(" by calibration")


# The recipe


@pytest.mark.parametrize(
    ("place", "told"),
    [
        (("profiles", 1, "inputs", "past_key_values.0.key", "maximum", 2), "the profiles are not those that follow"),
        (("optimization_level",), "optimization_level must be from 0 to 5"),
        (("version",), "module and version are not those of the manifest"),
    ],
)
def test_a_recipe_of_other_limits_is_found_without_hashes(bundle: Path, place: tuple[Any, ...], told: str) -> None:
    path = bundle / RECIPE_FILE
    recipe = json.loads(path.read_text())
    assert not failed(verdict_of(bundle))
    inner = recipe
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "9.9.9" if place == ("version",) else 77
    path.write_text(json.dumps(recipe))
    verdict = verdict_of(bundle)
    assert failed(verdict) == {"files"}
    assert told in verdict.checks[0].details[0]
    asked = [(check.id, gate.figure) for check in verdict.checks for case in check.cases for gate in case.gates]
    assert [(gate.check, gate.figure) for gate in planned(open_bundle(bundle), check_hashes=False)] == asked
