"""What a checkpoint tells of its licence, and what Meta's community licences ask of a deployer, reaches the bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_export.errors import LlamaExportError
from llama_export.export.folder import check_carried
from llama_export.export.licences import (
    COMMUNITY_LICENCES,
    duties,
    folder_licence,
    legal_texts,
    named_licence,
    recognise,
)
from llama_export.export.published import published
from support.command import call
from support.gguf_models import write_llama_gguf
from support.hf_models import write_llama_folder

TITLES = {
    "2": "LLAMA 2 COMMUNITY LICENSE AGREEMENT\nLlama 2 Version Release Date: July 18, 2023\n",
    "3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n\nMeta Llama 3 Version Release Date: April 18, 2024\n",
    "3.1": " LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n",
    "3.2": "\n\nLlama 3.2  Community License\nAgreement",
    "3.3": "**LLAMA 3.3 COMMUNITY LICENSE AGREEMENT**\n Llama 3.3 Version Release Date: December 6, 2024",
}


@pytest.mark.parametrize("version", COMMUNITY_LICENCES)
def test_a_community_licence_is_known_by_id_title_and_notice(version: str) -> None:
    licence = COMMUNITY_LICENCES[version]
    assert recognise(f"llama{version}") is licence
    assert recognise(TITLES[version]) is licence
    assert recognise(licence.notice) is licence
    assert recognise(licence.title) is licence


@pytest.mark.parametrize(
    ("told", "version"),
    [
        ("Llama-2", "2"),
        ("meta-llama-3", "3"),
        ("https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/LICENSE", "3.1"),
        ("https://www.llama.com/llama3_2/license", "3.2"),
        ("https://llama.meta.com/llama3/license/", "3"),
        ("Llama 3.3 Community License Agreement", "3.3"),
        ("apache-2.0", None),
        ("llama4", None),
        ("LLAMA 4 COMMUNITY LICENSE AGREEMENT", None),
        ("llama-30b-licence", None),
        ("codellama-2", None),
        ("Apache License\nVersion 2.0\nThis model was trained from Llama 2 outputs.", None),
        ("", None),
    ],
)
def test_other_spellings_are_known_and_others_licences_are_not(told: str, version: str | None) -> None:
    found = recognise(told)
    assert (found.version if found else None) == version


def test_every_published_model_has_the_duties_of_its_family() -> None:
    for name, model in published().items():
        told = " ".join(duties(model.licence))
        assert ("700 million" in told) == (not name.startswith("llama-1")), name
        assert ('"Built with Llama"' in told) == name.startswith("llama-3."), name
        assert ('"Built with Meta Llama 3"' in told) == name.startswith("llama-3-"), name


def test_what_each_version_asks() -> None:
    asked = {version: " ".join(duties(f"llama{version}")) for version in COMMUNITY_LICENCES}
    assert all(licence.notice in asked[version] for version, licence in COMMUNITY_LICENCES.items())
    assert all(licence.policy in asked[version] for version, licence in COMMUNITY_LICENCES.items())
    assert all(licence.released in asked[version] for version, licence in COMMUNITY_LICENCES.items())
    assert {version for version, text in asked.items() if "Built with" in text} == {"3", "3.1", "3.2", "3.3"}
    assert {version for version, text in asked.items() if 'begins with "Llama"' in text} == {"3.1", "3.2", "3.3"}
    assert {version for version, text in asked.items() if 'begins with "Llama 3"' in text} == {"3"}
    assert {version for version, text in asked.items() if "1.b.v:" in text} == {"2", "3"}


def test_several_sources_add_up_and_nothing_is_said_twice() -> None:
    both = duties("llama3.1", None, TITLES["2"], "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT", "mit")
    assert both == duties("llama3.1") + duties("llama2")
    assert duties() == duties(None, "apache-2.0", "") == ()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (("llama3.1", None, None), "llama3.1"),
        (("other", "llama3", "https://llama.meta.com/llama3/license"), "llama3"),
        (("other", None, "https://llama.meta.com/llama3/license"), "https://llama.meta.com/llama3/license"),
        ((None, "Mine", None), "Mine"),
        (("other", None, None), None),
        ((None, None, None), None),
    ],
)
def test_the_most_telling_of_id_name_and_link(told: tuple[str | None, str | None, str | None], expected: str) -> None:
    assert named_licence(*told) == expected


def test_a_folder_tells_by_its_card_or_by_its_licence_file(tmp_path: Path) -> None:
    assert folder_licence(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text(TITLES["3.3"])
    assert folder_licence(tmp_path) == "llama3.3"
    (tmp_path / "LICENSE.txt").write_text("My Llama 2 licence\n\nLlama 2 Community License applies to the base.\n")
    assert folder_licence(tmp_path) == "My Llama 2 licence"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: https://example.org/licence\n---\n")
    assert folder_licence(tmp_path) == "https://example.org/licence"
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n")
    assert folder_licence(tmp_path) == "My Llama 2 licence"


def test_the_texts_of_licences_and_notices_are_read_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "NOTICE").write_bytes(b"\xff Llama 3.2 Community License")
    files = {
        "LICENSE.md": TITLES["2"].encode(),
        "config.json": b"llama 3 community license",
        "NOTICE": tmp_path / "NOTICE",
    }
    assert duties(*legal_texts(files)) == duties("llama2") + duties("llama3.2")


def built(model: Path, place: Path) -> tuple[dict[str, Any], str]:
    """The manifest's record of the model, and the report for people, of a bundle made of `model` at `place`."""
    pytest.importorskip("torch", reason="building needs PyTorch")
    result = call("build", "-m", model, "-t", "cpu", "-o", place, "--no-reference", "--quiet")
    assert result.exit_code == 0, result.output
    return json.loads((place / "manifest.json").read_text())["model"], result.stdout


def test_licence_and_duties_reach_the_bundle_and_the_report(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama")
    (folder / "LICENSE").write_text(TITLES["3.1"])
    (folder / "USE_POLICY.md").write_text("Llama 3.1 Acceptable Use Policy\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")  # as some fine-tunes claim
    model, report = built(folder, tmp_path / "out")
    assert (model["id"], model["licence"]) == ("llama", "apache-2.0")
    assert tuple(model["duties"]) == duties("llama3.1")
    assert {"LICENSE", "USE_POLICY.md"} < {path.name for path in (tmp_path / "out").iterdir()}
    assert all(line in report.splitlines() for line in ("Licence: apache-2.0.", *duties("llama3.1")))
    shown = call("inspect", tmp_path / "out").stdout
    assert 'shows "Built with Llama" prominently' in shown
    assert "more than 700 million monthly active users" in shown


def test_a_gguf_tells_its_licence_by_id_name_or_link(tmp_path: Path) -> None:
    told = {"general.license": "other", "general.license.name": "llama3.2", "general.license.link": "https://x.org"}
    model, _ = built(write_llama_gguf(tmp_path / "a.gguf", metadata=told), tmp_path / "a")
    assert (model["licence"], tuple(model["duties"])) == ("llama3.2", duties("llama3.2"))
    told = {"general.license": None, "general.license.link": "https://llama.meta.com/llama3/license"}
    model, _ = built(write_llama_gguf(tmp_path / "b.gguf", metadata=told), tmp_path / "b")
    assert (model["licence"], tuple(model["duties"])) == (told["general.license.link"], duties("llama3"))


def test_a_licence_that_nobody_tells_is_told_as_such(tmp_path: Path) -> None:
    folder = write_llama_folder(tmp_path / "llama")
    (folder / "LICENSE").unlink()
    model, report = built(folder, tmp_path / "out")
    assert (model["licence"], model["duties"]) == (None, [])
    assert "Licence: not told by the checkpoint; find out before you hand the model on." in report.splitlines()


def test_two_licences_that_are_one_file_where_case_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(LlamaExportError, match=r"'LICENSE' and 'license', which are one file.*rename one"):
        check_carried(tmp_path, {"LICENSE": b"a", "NOTICE": b"b", "license": b"c"})
