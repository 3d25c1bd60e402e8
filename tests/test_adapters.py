"""LoRA adapters: the same weights as peft's merge_and_unload, and everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.errors import LlamaExportError, UsageError
from llama_export.export.lora.merge import base_mismatch, fitted, merged
from llama_export.export.lora.peft_folder import read_adapter
from llama_export.export.source import Source, open_source
from llama_export.optimize.formats import INT4
from safetensors.numpy import load_file, save_file
from support.gguf_models import write_llama_gguf
from support.hf_models import write_llama_folder

pytest.importorskip("peft", reason="adapters are compared with peft's")
from support.adapters import merged_by_peft, write_adapter

EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(
        tmp_path_factory.mktemp("base") / "llama", heads=5, kv_heads=1, head_dim=12, hidden=60, ffn=77
    )


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(model, tmp_path_factory.mktemp("adapters") / "plain", target_modules=EVERY_LINEAR)


def check_equal(model: Path, *adapters: Path) -> None:
    source = open_source(str(model))
    read = [read_adapter(str(path)) for path in adapters]
    read = [fitted(one, source.model_id, source.tensors) for one in read]
    tensors = merged(source.tensors, read)
    expected = merged_by_peft(model, *adapters).state_dict()
    changed = 0
    for name, tensor in tensors.items():
        rows = tensor.shape[0]
        value = expected[name].numpy()
        pieces = np.concatenate([tensor.read(0, rows // 3), tensor.read(rows // 3, rows)])
        np.testing.assert_allclose(pieces, value, rtol=0, atol=1e-6 * np.abs(value).max())
        changed += not np.array_equal(value, source.tensors[name].read(0, rows))
    assert changed == len({name for one in read for name in (*one.parts, *one.whole)}) > 0


SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "every linear": {"target_modules": EVERY_LINEAR},
    "the head too": {"target_modules": ["lm_head", "down_proj"]},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {
        "target_modules": EVERY_LINEAR,
        "rank_pattern": {"down_proj": 7, "model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"gate_proj": 32, "model.layers.0.mlp.gate_proj": 3},
    },
    "one layer": {"layers_to_transform": [1]},
    "a regular expression of modules": {"target_modules": r".*layers\.0.*(q|up)_proj"},
    "a head that was trained whole": {"modules_to_save": ["lm_head"]},
    "one dimension": {"r": 1, "lora_alpha": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_merged_weights_equal_pefts(settings: dict[str, Any], model: Path, tmp_path: Path) -> None:
    check_equal(model, write_adapter(model, tmp_path / "adapter", **settings))


def test_several_adapters(model: Path, adapter: Path, tmp_path: Path) -> None:
    check_equal(model, adapter, write_adapter(model, tmp_path / "second", seed=1, r=3))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_adapters_and_models_of_sixteen_bits(dtype: str, model: Path, adapter: Path, tmp_path: Path) -> None:
    import ml_dtypes

    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    half = Path(shutil.copytree(adapter, tmp_path / "half"))
    save_file({name: value.astype(kind) for name, value in load_file(adapter / WEIGHTS).items()}, half / WEIGHTS)
    base = write_llama_folder(tmp_path / "base", heads=5, kv_heads=1, head_dim=12, hidden=60, ffn=77, dtype=dtype)
    check_equal(base, half)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize("weight", [0.5, -1.0, 2])
def test_a_weight_multiplies_what_is_added(weight: float, adapter: Path) -> None:
    plain, scaled = read_adapter(str(adapter)), read_adapter(f"{adapter}:{weight}")
    assert scaled.weight == weight
    for name, part in plain.parts.items():
        np.testing.assert_allclose(scaled.parts[name].delta(0, 5), weight * part.delta(0, 5), rtol=1e-5)


def test_a_colon_may_be_part_of_a_name(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "step:500"))
    with pytest.raises(UsageError, match="name that not every system"):
        read_adapter(str(folder))
    assert read_adapter(f"{adapter}/").name == "plain"


def test_blocks_are_rounded_anew(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "m.gguf", types="Q4_1")
    source = open_source(str(path))
    hub = write_llama_folder(tmp_path / "llama", tied=True)
    tensors = merged(source.tensors, [read_adapter(str(write_adapter(hub, tmp_path / "adapter")))])
    changed = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert (changed.format, changed.blocks) == (INT4, None)
    kept = tensors["model.layers.0.self_attn.k_proj.weight"]
    assert kept is source.tensors["model.layers.0.self_attn.k_proj.weight"]


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))

    return edit


def tensors(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return edit


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (edited(peft_type="LOHA"), "of the kind 'LOHA', and only LORA"),
    "a page of text": (edited(peft_type="y" * 9999), "of the kind 'y{10,99}, and only LORA"),
    "dora": (edited(use_dora=True), "sets use_dora to True"),
    "a third base of its own": (edited(init_lora_weights="lora_ga"), "begun with 'lora_ga', which changes"),
    "a base of its own": (edited(init_lora_weights="pissa_niter_4"), "begun with 'pissa_niter_4', which changes"),
    "another base of its own": (edited(init_lora_weights="OLoRA"), "begun with 'OLoRA'"),
    "tokens that switch it on": (edited(alora_invocation_tokens=[1]), "sets alora_invocation_tokens"),
    "biases": (edited(bias="all"), r"trains biases \(bias is 'all'\)"),
    "another rank": (edited(r=5), r"the rank 5 for model\.layers\.\d\.\S+ in adapter_config.json"),
    "no rank": (edited(r=None), "says r is None for model"),
    "no alpha": (edited(lora_alpha="8"), "says lora_alpha is '8' for model"),
    "a pattern": (edited(rank_pattern={"(a+)+$": 3}), "regular expression '\\(a\\+\\)\\+\\$' as a rank_pattern"),
    "patterns of another kind": (edited(alpha_pattern=[1]), "no object as alpha_pattern"),
    "a module without weights": (edited(target_modules=["q_proj", "w_pack"]), "names the module w_pack"),
    "half of it": (tensors(lambda found: found.pop(Q_A)), r"no lora_A of model\.layers\.0\.self_attn\.q_proj"),
    "a stranger": (
        tensors(lambda found: found.update({f"{Q_A[:-7]}.magnitude": np.zeros(3, np.float32)})),
        r"holds the tensor base_model\S+magnitude, which is no lora_A",
    ),
    "a vector": (
        tensors(lambda found: found.update({Q_A: np.zeros(4, np.float32)})),
        r"lora_A of shape \[4\]",
    ),
    "integers": (tensors(lambda found: found.update({Q_A: np.zeros((4, 60), np.int8)})), "lora_A.weight as I8"),
    "twice": (
        tensors(lambda found: found.update({Q_A.removeprefix("base_model.model."): np.zeros((4, 60), np.float32)})),
        "holds .*q_proj.lora_A.weight twice",
    ),
    "nothing": (tensors(lambda found: found.clear()), "holds no lora_A and lora_B"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no weights"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "only a pickle"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes(b"12"), "is truncated"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "no valid JSON"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_adapter(change: Callable[[Path], None], message: str, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "bad"))
    change(folder)
    with pytest.raises(LlamaExportError, match=message):
        read_adapter(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "There is no adapter folder nowhere"),
        ("nowhere:2", "There is no adapter folder nowhere;"),
        ("{adapter}:0", "has the weight 0"),
        ("{adapter}:nan", "has the weight nan"),
        ("{model}", "is a model, not an adapter"),
        ("{adapter}/..", "holds no adapter_config.json"),
    ],
)
def test_bad_names(text: str, message: str, adapter: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_adapter(text.format(adapter=adapter, model=model))


def opened(path: Path) -> Source:
    return open_source(str(path))


def test_an_adapter_of_another_shape_is_refused_by_module(adapter: Path, tmp_path: Path) -> None:
    source = opened(write_llama_folder(tmp_path / "other"))
    with pytest.raises(LlamaExportError, match=r"for a model\.layers\.0\.\S+ of .* which has .* in other"):
        fitted(read_adapter(str(adapter)), source.model_id, source.tensors)


def test_an_adapter_of_a_deeper_model_is_refused_by_module(adapter: Path, tmp_path: Path) -> None:
    flat = write_llama_folder(tmp_path / "flat", layers=1, heads=5, kv_heads=1, head_dim=12, hidden=60, ffn=77)
    with pytest.raises(LlamaExportError, match=r"plain changes model\.layers\.1\.\S+, which is no projection of flat"):
        fitted(read_adapter(str(adapter)), "flat", opened(flat).tensors)


def test_a_tied_head_is_no_projection(model: Path, tmp_path: Path) -> None:
    tied = write_llama_folder(tmp_path / "tied", tied=True, heads=5, kv_heads=1, head_dim=12, hidden=60, ffn=77)
    adapter = read_adapter(str(write_adapter(model, tmp_path / "adapter", target_modules=["lm_head"])))
    with pytest.raises(LlamaExportError, match=r"but the head of tied is its embedding \(tied\)"):
        fitted(adapter, "tied", opened(tied).tensors)


def test_whole_weights_that_are_the_models_own_are_left_out(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    found = load_file(folder / WEIGHTS)
    copy = found["base_model.model.lm_head.base_layer.weight"]  # peft's own
    assert not read_adapter(str(folder)).whole
    save_file({**found, "base_model.model.lm_head.weight": copy}, folder / WEIGHTS)
    read = read_adapter(f"{folder}:0.5")
    assert list(read.whole) == ["lm_head.weight"]
    assert not fitted(read, "llama", opened(model).tensors).whole


def test_whole_weights_have_no_part_to_weigh(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(LlamaExportError, match=r"brings lm_head\.weight along as a whole"):
        fitted(read_adapter(f"{folder}:0.5"), "llama", opened(model).tensors)
    whole = fitted(read_adapter(str(folder)), "llama", opened(model).tensors)
    with pytest.raises(LlamaExportError, match=r"Two adapters bring lm_head\.weight along"):
        merged(opened(model).tensors, [whole, whole])


def test_names_of_bases_are_compared(adapter: Path, model: Path) -> None:
    read = read_adapter(str(adapter))
    assert read.base == str(model)
    assert base_mismatch(read, "somebody/Llama") is None  # the folder of the fixture is called llama
    told = base_mismatch(read, "somebody/Llama-Instruct")
    assert told is not None
    assert str(model) in told
    assert "somebody/Llama-Instruct" in told


def test_a_bases_name_is_one_line(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "odd"))
    edited(base_model_name_or_path="some/\n\tbody" + "y" * 1000)(folder)
    assert read_adapter(str(folder)).base == ("some/ body" + "y" * 1000)[:300]


def test_copies_of_the_base_in_another_dtype_do_not_matter(model: Path, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path / "adapter", target_modules=["lm_head"])
    found = load_file(folder / WEIGHTS)
    found["base_model.model.lm_head.base_layer.weight"] = found["base_model.model.lm_head.base_layer.weight"].astype(
        np.float16
    )
    save_file(found, folder / WEIGHTS)
    assert not fitted(read_adapter(f"{folder}:0.5"), "llama", opened(model).tensors).whole
