"""The planner: bytes as they are written, what fits and what is said of it, for every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.config_source import open_config
from llama_export.runtime.bundle import Limits, Shape
from llama_export.targets.choice import choose
from llama_export.targets.context import need
from llama_export.targets.devices import Target, load_target, target_names
from llama_export.targets.made import what_is_made
from llama_export.targets.planner import (
    DOES_NOT_FIT,
    FITS,
    FITS_WITH,
    Assessment,
    Model,
    Wish,
    assess,
)
from llama_export.targets.planner_text import (
    context_choice,
    detail_lines,
    notes,
    precision_note,
    refusal,
    sentence,
    table_lines,
    to_json,
)
from llama_export.targets.recipes import recipe_for
from llama_export.targets.tensorrt import needs_calibration, release_of

NAMES = [name for name in target_names() if name != "host"]


def model(name: str) -> Model:
    source = open_config(name)
    return Model(source.name, source.shape, source.tensors, source.native)


def plan(name: str, target: str | Target, *, backend: str | None = None, **wish: object) -> Assessment:
    chosen = choose(load_target(target) if isinstance(target, str) else target, backend=backend)
    return assess(chosen, what_is_made(chosen), model(name), Wish(**wish))


def with_memory(name: str, usable_gb: float) -> Target:
    target = load_target(name)
    return replace(target, memory_gb=usable_gb + target.reserve_gb)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("llama", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-405b"])
def test_every_target_is_assessed_by_its_own_numbers(name: str, llama: str) -> None:
    found = plan(llama, name)
    assert found.need == need(found.load, found.context)
    fits = found.need.total <= found.usable_bytes
    assert fits == (found.verdict != DOES_NOT_FIT) == (found.largest > 0) == (found.devices <= 1)
    assert sentence(found).endswith(".")
    assert found.context <= found.model.shape.max_positions


def test_405b_takes_many_devices_and_says_that_models_are_not_split() -> None:
    found = plan("llama-3.1-405b", "jetson-agx-orin-64gb")
    assert found.verdict == DOES_NOT_FIT
    assert 4 <= found.devices <= 6, "230 GB of int4 in 61 GB each"
    assert f"{found.devices} of it would hold it, but a model is not split" in refusal(found)
    assert found.speeds == (), "what does not run has no speed"


def test_a_default_precision_that_leaves_no_useful_context_gives_way_to_the_next() -> None:
    found = plan("llama-3.1-8b", with_memory("l4", 12))
    assert (found.asked, found.precision, found.verdict) == ("fp16", "int8", FITS_WITH)
    note = precision_note(found)
    assert note is not None
    assert note.startswith("The weights are int8 rather than fp16, l4's default, with which a context of 2,048 tokens")
    assert sentence(found) == "fits with int8 instead of fp16 weights."


def test_a_precision_that_needs_calibration_is_not_chosen() -> None:
    """TensorRT's int8 takes samples, so fp16 gives way to int4."""
    orin = replace(with_memory("jetson-agx-orin-32gb", 10), default_precision="fp16")
    assert plan("llama-3.1-8b", orin).precision == "int4"
    assert needs_calibration(orin, "int8")
    assert not needs_calibration(orin, "int4")


def test_a_precision_that_was_asked_for_stays() -> None:
    found = plan("llama-3.1-8b", with_memory("l4", 12), precision="fp16")
    assert (found.precision, found.verdict) == ("fp16", DOES_NOT_FIT)
    assert precision_note(found) is None
    assert "choose a smaller --precision or a larger --target" in refusal(replace(found, devices=1))


def test_a_precision_that_the_target_lacks_is_refused_with_those_that_it_has() -> None:
    with pytest.raises(UsageError, match=r"jetson-orin.*has fp16, int8, int4 and w8a8 weights, not fp8"):
        plan("llama-3.2-1b", "jetson-orin", precision="fp8")
    with pytest.raises(UsageError, match=r"Unknown precision 'int5'; .*Did you mean 'int"):
        plan("llama-3.2-1b", "rtx-4090", precision="int5")
    with pytest.raises(UsageError, match=r"jetson-orin.*has fp16, int8, int4 and w8a8 weights, not nvfp4"):
        plan("llama-3.2-1b", "jetson-orin", head_precision="nvfp4")


def test_a_head_may_be_left_out_of_what_is_calibrated() -> None:
    found = plan("llama-3.2-1b", "jetson-orin", precision="int8", head_precision="fp16", calibrated=True)
    assert found.formats["model.embed_tokens.weight"].name == "fp16"


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--context 131073 is above the 131,072 tokens .* give 131072 or less"):
        plan("llama-3.2-1b", "h200", context=131_073)


def test_a_context_beyond_memory_fits_with_a_smaller_one_and_is_built_with_a_warning() -> None:
    found = plan("llama-3.2-1b", "jetson-orin-nano-8gb", context=131_072)
    assert found.verdict == FITS_WITH
    assert f"--context {found.largest} instead of 131072" in sentence(found)
    choice = context_choice(found)
    assert choice.context == 131_072
    assert choice.warning is not None


def test_a_context_that_fits_with_a_smaller_default_takes_that() -> None:
    """int4 leaves room for what int8 does not."""
    target = replace(with_memory("cpu", 12), default_precision="int8")
    room = plan("llama-3.2-1b", target)
    assert (room.precision, room.verdict) == ("int8", FITS)
    found = plan("llama-3.2-1b", target, context=room.largest + 256)
    assert (found.precision, found.context) == ("int4", room.largest + 256)


def test_a_hopeless_build_is_refused_unless_forced() -> None:
    found = plan("llama-3.1-70b", "jetson-orin-nano-8gb")
    with pytest.raises(LlamaExportError, match=r"does not fit: int4 takes 4\d\.\d GB .* 5\.2 GB .* --force builds it"):
        context_choice(found)
    choice = context_choice(found, force=True)
    assert choice.context == 2048
    assert choice.warning is not None
    assert "may not load" in choice.warning


def test_a_jetson_is_told_what_closing_its_desktop_gives() -> None:
    found = plan("llama-3.1-8b", with_memory("jetson-orin-nano-8gb", 5.8))
    assert found.verdict == DOES_NOT_FIT
    assert found.headless_context > 0
    assert f"with its desktop closed (about 800 MB) {found.headless_context:,} tokens fit" in refusal(found)
    assert plan("llama-3.2-1b", "jetson-orin-nano-8gb").headless_context == 0


def test_an_engine_that_cannot_be_built_there_is_told() -> None:
    found = plan("llama-3.2-3b", "jetson-orin-nano-8gb")
    assert found.verdict in (FITS, FITS_WITH)
    assert found.engine is not None
    assert found.engine.on_device
    assert not found.engine.fits
    assert any("larger module" in line or "close the desktop" in line for line in detail_lines(found))
    assert "but not the building of its engine" in "\n".join(table_lines([found]))
    assert plan("llama-3.2-3b", "jetson-agx-orin-64gb").engine.fits
    here = plan("llama-3.2-3b", "rtx-4090").engine
    assert not here.on_device
    assert plan("llama-3.2-3b", "h200").engine is None, "ONNX Runtime has no engine"


@pytest.mark.parametrize(("dialect", "target"), [("trt", "rtx-4090"), ("trt-primitive", "jetson-agx-orin-64gb")])
def test_a_fixed_cache_is_read_whole_and_a_growing_one_as_far_as_it_is_filled(dialect: str, target: str) -> None:
    short, long = (plan("llama-3.2-1b", target, context=context) for context in (2048, 65_536))
    assert short.made.dialect == dialect
    assert (long.speeds[0].decode.high < short.speeds[0].decode.high) == (dialect == "trt")


def test_what_does_not_fit_is_not_said_to_lack_a_bandwidth() -> None:
    assert not [note for note in notes(plan("llama-3.1-8b", "jetson-orin-nano-8gb")) if "bandwidth" in note]
    assert [note for note in notes(plan("llama-3.2-1b", "rtx")) if "bandwidth" in note]


def test_a_fixed_cache_is_of_usual_length_where_nothing_is_asked_for() -> None:
    found = plan("llama-3.1-8b", "dgx-spark")
    assert (found.context, found.largest) == (8192, 131_072)
    assert "--context takes up to 131,072" in context_choice(found).reason
    assert plan("llama-3.1-8b", "dgx-spark", context=20_000).context == 20_000
    assert plan("llama-3.1-8b", "jetson-agx-orin-64gb").context == 131_072, "a growing cache costs what is in it"


def test_what_a_shorter_fixed_cache_would_give_is_told() -> None:
    long, short = plan("llama-3.1-8b", "dgx-spark", context=131_072), plan("llama-3.1-8b", "dgx-spark", context=8192)
    (told,) = [note for note in notes(long) if "a smaller --context is quicker" in note]
    assert told.endswith("tokens/s with 8,192 tokens.")
    assert f"{short.speeds[0].decode.low:.0f} to {short.speeds[0].decode.high:.0f}" in told
    assert any(note.endswith("a smaller --context is quicker.") for note in notes(short))


def test_the_memory_to_build_an_engine_is_that_of_its_recipe() -> None:
    found = plan("llama-3.2-1b", "jetson-orin-nano-8gb")
    release = release_of(found.target)
    assert release is not None
    shape = Shape(1, 32, 2, 1, 16, 32, 64, "float16")
    weights = found.weights.total
    recipe = recipe_for(release, ("8.7",), shape, Limits(64, 1, 64), weights=weights, shared_memory=True)
    assert found.engine is not None
    assert found.engine.peak_bytes == recipe.build_memory_bytes


def test_several_texts_at_once_write_more_and_each_fewer() -> None:
    one, eight = (plan("llama-3.1-8b", "rtx-4090", context=2048, batch=batch).speeds[0].decode for batch in (1, 8))
    assert one.high < eight.high < 8 * one.high


def test_super_mode_is_told_apart() -> None:
    normal, boosted = plan("llama-3.2-1b", "jetson-orin-nano-8gb").speeds
    assert not normal.boosted
    assert boosted.boosted
    assert boosted.decode.low > normal.decode.low
    assert "decode (Super mode)" in "\n".join(detail_lines(plan("llama-3.2-1b", "jetson-orin-nano-8gb")))


@pytest.mark.parametrize(("name", "why"), [("cpu", "arithmetic decides"), ("rtx", "knows no bandwidth of rtx")])
def test_no_speed_is_invented(name: str, why: str) -> None:
    found = plan("llama-3.2-1b", name)
    assert all(speeds.decode is None and speeds.prefill is None for speeds in found.speeds)
    assert any(why in line for line in detail_lines(found))


def test_the_document_for_programs_keeps_its_keys() -> None:
    found = plan("llama-3.2-1b", "jetson-orin-nano-8gb")
    document = to_json(found.model, "somewhere", found.wish, [found])
    assert document.keys() == {"schema_version", "model", "request", "plans"}
    assert document["schema_version"] == 1
    (one,) = document["plans"]
    assert one.keys() == {
        *("target", "backend", "dialect", "jetpack", "verdict", "sentence", "precision", "precision_asked"),
        *("context", "largest_context", "weights", "memory", "devices_needed", "engine", "speeds", "notes"),
    }
    parts = ("runtime", "weights", "tables", "cache", "workspace")
    assert sum(one["memory"][part] for part in parts) == one["memory"]["total"]
    assert one["weights"]["read_bytes"] < one["weights"]["bytes"] == sum(one["weights"]["by_format"].values())
    assert one["speeds"][0]["decode"]["low"] < one["speeds"][0]["decode"]["high"]


def test_a_checkpoint_that_comes_quantised_keeps_its_own() -> None:
    source = open_config("llama-3.2-1b")
    tensors = {name: replace(tensor, format=replace(tensor.format)) for name, tensor in source.tensors.items()}
    own = Model("m", source.shape, tensors, "gptq")
    target = load_target("rtx-4090")
    found = assess(target, what_is_made(target), own, Wish())
    assert (found.asked, found.precision, found.verdict) == ("gptq", "gptq", FITS)
