"""What each TensorRT release takes, what is chosen among what a target has, and what a build of it makes."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from llama_export import names
from llama_export.cli import main
from llama_export.errors import LlamaExportError, UsageError
from llama_export.optimize import ort, policy, primitive, trt
from llama_export.optimize.graph import FLOAT32_SCOPE
from llama_export.optimize.schemes import INT8_DYNAMIC, PRECISIONS, SCHEMES
from llama_export.tables import listed
from llama_export.targets import listing, made, recipes
from llama_export.targets.choice import choose, with_possible_precision
from llama_export.targets.devices import Target, load_target, target_names
from llama_export.targets.jetpack import JETPACKS
from llama_export.targets.made import Made, check_precision, what_is_made
from llama_export.targets.tensorrt import RELEASES, has_engines, release_of

CATALOGUE_NAMES = [name for name in target_names() if name != "host"]
JETSONS = [name for name in CATALOGUE_NAMES if name.startswith("jetson-")]
TENSORRT_TARGETS = [name for name in CATALOGUE_NAMES if load_target(name).backend != names.ONNXRUNTIME]


def built(name: str, *, jetpack: str | None = None, backend: str | None = None) -> tuple[Target, Made]:
    target = choose(load_target(name), jetpack=jetpack, backend=backend)
    return target, what_is_made(target)


def test_what_releases_take_is_what_is_lowered_to() -> None:
    opsets = {names.TRT: {trt.OPSET}, names.TRT_PRIMITIVE: set(primitive.IR_VERSIONS)}
    for release in RELEASES.values():
        assert release.dialect in names.BACKENDS[release.backend]
        assert release.opset in opsets[release.dialect]
    assert made.ORT_OPSET == ort.OPSET
    assert (f"/{FLOAT32_SCOPE}/",) == recipes.FLOAT32_LAYERS


def test_words_are_listed_as_people_do() -> None:
    assert [listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


# Releases


@pytest.mark.parametrize(
    ("backend", "version", "facts"),
    [
        ("tensorrt", "8.6.2", ("trt-primitive", 17, False)),
        ("tensorrt", "10.3.0", ("trt-primitive", 21, True)),
        ("tensorrt", "10.13.3", ("trt-primitive", 21, True)),
        ("tensorrt", "10.16.2", ("trt", 24, True)),
        ("tensorrt-rtx", "1.7.1", ("trt", 24, True)),
    ],
)
def test_a_release_decides_dialect_and_opset(backend: str, version: str, facts: tuple[object, ...]) -> None:
    release = RELEASES[backend, version]
    assert facts == (release.dialect, release.opset, release.strongly_typed)


def test_every_release_and_ability_has_a_source_and_a_precision_that_can_be_asked_for() -> None:
    for release in RELEASES.values():
        assert release.source
        places = [place for name in PRECISIONS if (place := release.place(name)) is not None]
        assert places and all(place.source and place.since for place in places)


def test_every_jetpack_but_5_has_a_release_that_engines_are_made_for() -> None:
    assert {version for version, jetpack in JETPACKS.items() if not has_engines("tensorrt", jetpack.tensorrt)} == {
        "5.1"
    }


def test_every_ability_has_a_format_that_the_graph_can_hold() -> None:
    for release in RELEASES.values():
        held = policy.TENSORRT_RTX if release.backend == "tensorrt-rtx" else policy.TENSORRT
        known = (policy.TENSORRT_8 if release.version.startswith("8.") else held).precisions
        assert {name for name in SCHEMES if release.place(name) is not None} <= set(known)


def test_compute_capabilities_compare_as_numbers() -> None:
    release = RELEASES["tensorrt", "10.16.2"]
    assert release.runs("fp8", ("11.0",)), "11.0 is above 8.9"
    assert not release.runs("fp8", ("8.7",))
    assert not RELEASES["tensorrt-rtx", "1.7.1"].runs("nvfp4", ("12.0", "8.9")), "one bundle for both"


# Choosing


@pytest.mark.parametrize(
    ("name", "backend", "expected"),
    [
        ("a100", "rtx", "tensorrt-rtx"),
        ("h200", "trt", "tensorrt"),
        ("rtx-4090", "ort", "onnxruntime"),
        ("jetson-orin", "onnxruntime", "onnxruntime"),
    ],
)
def test_another_backend_is_chosen_by_its_name_or_a_short_one(name: str, backend: str, expected: str) -> None:
    target = choose(load_target(name), backend=backend)
    assert (target.backend, target.sources["backend"]) == (expected, "chosen with --backend")
    assert what_is_made(target).backend == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rtx-4090", {"backend": "tensorrt"}, "It has tensorrt-rtx and onnxruntime"),
        ("cpu", {"backend": "rtx"}, "--backend rtx is none that cpu has. It has onnxruntime; choose"),
        ("h100", {"backend": "tensort"}, "Did you mean 'tensorrt'?"),
        ("rtx-4090", {"jetpack": "6.2"}, "--jetpack is for Jetsons, which rtx-4090 is not"),
        (
            "jetson-orin",
            {"jetpack": "7.0"},
            "jetson-orin never had JetPack 7.0; jetson-orin had 5.1, 6.0, 6.1, 6.2 and 7.2",
        ),
        ("jetson-thor-t5000", {"jetpack": "6.2"}, "jetson-thor-t5000 never had JetPack 6.2"),
        ("jetson-orin", {"jetpack": "9.1"}, "There is no JetPack 9.1"),
        ("jetson-orin", {"jetpack": ""}, "There is no JetPack"),
    ],
)
def test_what_a_target_never_had_is_refused_with_what_it_has(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(load_target(name), **options)
    assert message in str(caught.value)


def test_the_jetpack_decides_release_dialect_and_formats() -> None:
    chosen = {version: built("jetson-agx-orin-64gb", jetpack=version)[1] for version in ("6.0", "6.1", "6.2", "7.2")}
    assert {version: (entry.dialect, entry.opset) for version, entry in chosen.items()} == {
        "6.0": ("trt-primitive", 17),
        "6.1": ("trt-primitive", 21),
        "6.2": ("trt-primitive", 21),
        "7.2": ("trt", 24),
    }
    precisions = {entry.precisions for entry in chosen.values()}
    assert precisions == {("fp16", "int8", "w8a8"), ("fp16", "int8", "int4", "w8a8")}


def test_a_patch_release_of_a_jetpack_is_that_jetpack() -> None:
    assert choose(load_target("jetson-orin"), jetpack="6.2.1").jetpack == "6.2"


def test_a_jetpack_before_engines_is_refused_with_what_is_possible() -> None:
    with pytest.raises(LlamaExportError) as caught:
        choose(load_target("jetson-orin"), jetpack="5.1")
    for part in ("TensorRT 8.5.2", "Python 3.8", "--jetpack 6.0, 6.1, 6.2 or 7.2", "--backend onnxruntime"):
        assert part in str(caught.value)
    target, bundle_made = built("jetson-orin", jetpack="5.1", backend="ort")
    assert (target.jetpack, bundle_made.dialect) == ("5.1", "ort")


def test_a_file_of_ones_own_is_chosen_from_too(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('base = "jetson-orin-nano-8gb"\njetpack = "6.0"\n')
    target = choose(load_target(str(path)))
    assert (target.jetpack, target.default_precision) == ("6.0", "fp16")
    assert choose(load_target(str(path)), jetpack="7.2").default_precision == "int4"
    with pytest.raises(UsageError, match=r"board never had JetPack 7\.1"):
        choose(load_target(str(path)), jetpack="7.1")


def test_a_file_whose_engines_cannot_be_made_is_shown_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('base = "jetson-orin"\njetpack = "5.1"\n')
    result = CliRunner().invoke(main, ["targets", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "No engines are made for JetPack 5.1" in result.stderr


def test_a_default_precision_that_the_release_lacks_becomes_fp16() -> None:
    target = choose(load_target("jetson-orin"), jetpack="6.0")
    assert target.default_precision == "fp16"
    assert "TensorRT 8.6.2" in target.sources["default_precision"]
    calibrated = replace(load_target("jetson-orin"), default_precision="int8")
    assert with_possible_precision(calibrated).default_precision == "fp16"


@pytest.mark.parametrize("name", CATALOGUE_NAMES)
def test_the_catalogues_own_defaults_need_no_change(name: str) -> None:
    assert choose(load_target(name)) == load_target(name)


def test_a_gpu_that_tensorrt_rtx_does_not_build_for_is_refused() -> None:
    with pytest.raises(
        LlamaExportError, match=r"rtx-4090 has compute capability 8\.7, but TensorRT-RTX 1\.7\.1 builds"
    ):
        choose(replace(load_target("rtx-4090"), compute_capability=("8.9", "8.7")))


# What is made


@pytest.mark.parametrize("name", JETSONS)
def test_a_jetson_gets_a_recipe(name: str) -> None:
    target, bundle_made = built(name)
    assert (bundle_made.backend, bundle_made.dialect) == ("tensorrt", "trt-primitive")
    assert (bundle_made.activations, bundle_made.providers) == ("float16", ("CPUExecutionProvider",))
    assert not bundle_made.on_cpu
    recipe, untried = bundle_made.notes
    assert f"JetPack {target.jetpack}" in recipe
    assert "`llama-export engine`" in recipe
    assert "No such engine has been built or run on a Jetson" in untried


@pytest.mark.parametrize("name", ["rtx", "rtx-3090", "rtx-4090", "rtx-5090", "l4", "dgx-spark"])
def test_rtx_cards_get_engines(name: str) -> None:
    target, bundle_made = built(name)
    assert (bundle_made.backend, bundle_made.dialect, bundle_made.opset) == ("tensorrt-rtx", "trt", 24)
    assert all(capability in bundle_made.notes[0] for capability in target.compute_capability)
    assert "No such engine has been run on a GPU" in bundle_made.notes[1]
    unproven = [note for note in bundle_made.notes if "ARM64" in note]
    assert bool(unproven) == (name == "dgx-spark")


def test_a_data_centre_card_takes_the_newest_tensorrt() -> None:
    target, bundle_made = built("h100", backend="tensorrt")
    release = release_of(target)
    assert release is not None
    assert release.version.startswith("11.")
    assert bundle_made.precisions == ("fp16", "int8", "int4", "fp8", "w8a8")
    assert "such a GPU" in bundle_made.notes[1]


def test_a_card_with_onnxruntime_computes_on_cuda_and_a_jetsons_gpu_stays_unused() -> None:
    assert built("rtx-4090", backend="ort")[1].providers[0] == "CUDAExecutionProvider"
    jetson = built("jetson-orin", backend="ort")[1]
    assert jetson.on_cpu
    assert "The GPU stays unused." in jetson.notes


@pytest.mark.parametrize("name", TENSORRT_TARGETS)
def test_the_details_say_release_dialect_and_precisions(name: str) -> None:
    target, bundle_made = built(name)
    release = release_of(target)
    assert release is not None
    details = "\n".join(listing.detail_lines(target))
    for part in (release.name, f"dialect {release.dialect}, opset {release.opset}", *bundle_made.precisions):
        assert part in details
    makes = listing.to_json(target)["makes"]
    assert (makes["tensorrt"], makes["dialect"]) == (release.version, release.dialect)


# Precisions


@pytest.mark.parametrize(
    ("name", "jetpack", "precision", "message"),
    [
        ("jetson-orin", "6.2", "fp8", "has fp16, int8, int4 and w8a8 weights, not fp8"),
        ("jetson-orin", "6.0", "int4", "TensorRT 8.6.2, compute capability 8.7) has fp16, int8 and w8a8 weights, not"),
        ("jetson-orin", "6.0", "int4", "--jetpack 6.1, or --jetpack 6.2, or --jetpack 7.2, or --backend onnxruntime"),
        ("jetson-orin", "7.2", "nvfp4", "not nvfp4: choose one of these."),
        ("jetson-thor-t5000", "7.1", "nvfp4", "not nvfp4: choose one of these, or --jetpack 7.2."),
        ("jetson-orin", "6.2", "int8", "add --calibrate FILE, or choose fp16 or int4"),
        ("jetson-orin", "6.2", "w8a8", "add --calibrate FILE, or choose fp16 or int4"),
        ("rtx-4090", None, "w8a8", "add --calibrate FILE, or choose fp16, int8, int4 or fp8"),
        ("rtx-4090", None, "nvfp4", "(TensorRT-RTX 1.7.1, compute capability 8.9) has fp16, int8, int4, fp8 and w8a8"),
        ("rtx", None, "fp8", "8.0, 8.6, 8.9 and 12.0) has fp16, int8, int4 and w8a8 weights, not fp8"),
        ("rtx-4090", None, "fp32", "or --backend onnxruntime"),
        ("cpu", None, "fp8", "cpu with ONNX Runtime has fp32, fp16, int8, int4 and w8a8 weights, not fp8"),
        ("jetson-orin", "6.2", "int4-b64-zeros", "name their block int4-b16, int4-b32, int4-b64, int4-b128, int4-b256"),
        ("jetson-orin", "6.0", "int4-b64", "name their block none, not int4-b64: choose one of these, or --jetpack"),
        ("rtx-4090", None, "int8-b128-zeros", "int8-b128, int8-b256, not int8-b128-zeros: choose one of these, or"),
        ("cpu", None, "int4-b24", "Did you mean 'int4-b"),
        ("h100", None, "fp8", "or --backend tensorrt"),
    ],
)
def test_a_precision_that_a_target_lacks_is_refused_with_what_it_has(
    name: str, jetpack: str | None, precision: str, message: str
) -> None:
    target, bundle_made = built(name, jetpack=jetpack)
    with pytest.raises(UsageError) as caught:
        check_precision(target, bundle_made, precision, calibrated=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "jetpack", "precision", "calibrated"),
    [
        ("jetson-orin", "6.2", "int4", False),
        ("jetson-orin", "6.0", "int8", True),
        ("jetson-thor-t5000", "7.2", "nvfp4", False),
        ("jetson-thor-t5000", None, "fp8", True),
        ("rtx-4090", None, "int8", False),
        ("rtx-4090", None, "fp8", True),
        ("rtx-5090", None, "nvfp4", False),
        ("cpu", None, "fp32", False),
        ("cpu", None, "w8a8", False),
        ("cpu", None, "int4-zeros", False),
        ("cpu", None, "int8-b256-zeros", True),
        ("rtx-4090", None, "int8-b64", False),
        ("jetson-orin", "6.2", "int4-b128", True),
        ("jetson-orin", "6.2", "w8a8", True),
    ],
)
def test_a_precision_that_a_target_has_is_taken(
    name: str, jetpack: str | None, precision: str, *, calibrated: bool
) -> None:
    check_precision(*built(name, jetpack=jetpack), precision, calibrated)


def test_the_cpus_int8_is_w8a8_and_says_so() -> None:
    made = built("cpu")[1]
    place = made.place("w8a8")
    assert place is not None and "int8 by another name" in place.note
    assert place.format == made.policy().precisions["int8"]
    assert place.activations == INT8_DYNAMIC
    assert built("rtx-4090", backend="ort")[1].place("w8a8") is None, "its kernels read activations in float16"
