"""The licence that a checkpoint tells of, and what Meta's community licences ask of whoever deploys the model.

Nothing is refused on this ground: it is told, in the manifest, the build's report and `inspect`. Duties are stated in
our words; the agreement itself, which is copied into the bundle where the checkpoint has it, is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_BEGINNING = 100_000
"""Characters of a card or licence file that are read."""
_TITLE_WITHIN = 4000
"""Characters of a licence or notice in which its title stands."""

_LICENCE_FILE = re.compile(r"LICEN[CS]E([._-].*)?", re.IGNORECASE)
LEGAL_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)
"""Names of the files that travel with the weights."""

_NAME = re.compile(r"(?<![a-z])llama[ _-]?v?(2|3(?:[._][123])?)(?![0-9])", re.IGNORECASE)
"""In an id, a name or an address: llama3.1, Llama-2, llama.com/llama3_2/license."""
_TITLE = re.compile(r"llama\s+(2|3(?:\.[123])?)\s+community\s+licen[cs]e", re.IGNORECASE)
"""In the text of a licence or notice; plain "Llama 2" in an apache licence says nothing."""


@dataclass(frozen=True)
class CommunityLicence:
    """One of Meta's community licences. version: of Llama; family: what it calls the model; released: the day of which
    section 2 speaks; policy: the address of its acceptable use policy (1.b.iv); display: what has to be shown with a
    product (1.b.i); prefix: what the names of models improved with it begin with (1.b.i); may_improve_others: whether
    these may be other language models than its own kin (1.b.v); notice: the line to retain (1.b.iii).
    """

    version: str
    family: str
    released: str
    policy: str
    display: str | None
    prefix: str | None
    may_improve_others: bool
    notice: str

    @property
    def id(self) -> str:
        """The hub's id of it."""
        return f"llama{self.version}"

    @property
    def title(self) -> str:
        return f"{self.family} Community License"


def _later(version: str, released: str, policy: str) -> CommunityLicence:
    """Llama 3.1 to 3.3, whose licences differ in name, date and address alone (for models without vision)."""
    notice = f"Llama {version} is licensed under the Llama {version} Community License, Copyright © "
    return CommunityLicence(
        version, f"Llama {version}", released, policy, "Built with Llama", "Llama", True, notice + _META
    )


_META = "Meta Platforms, Inc. All Rights Reserved."

COMMUNITY_LICENCES: Mapping[str, CommunityLicence] = {
    licence.version: licence
    for licence in (
        CommunityLicence(
            version="2",
            family="Llama 2",
            released="July 18, 2023",
            policy="https://ai.meta.com/llama/use-policy",
            display=None,
            prefix=None,
            may_improve_others=False,
            notice=f"Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) {_META}",
        ),
        CommunityLicence(
            version="3",
            family="Meta Llama 3",
            released="April 18, 2024",
            policy="https://llama.meta.com/llama3/use-policy",
            display="Built with Meta Llama 3",
            prefix="Llama 3",
            may_improve_others=False,
            notice=f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © {_META}",
        ),
        _later("3.1", "July 23, 2024", "https://llama.meta.com/llama3_1/use-policy"),
        _later("3.2", "September 25, 2024", "https://www.llama.com/llama3_2/use-policy"),
        _later("3.3", "December 6, 2024", "https://www.llama.com/llama3_3/use-policy"),
    )
}
"""By Llama version, from the texts that Meta publishes (github.com/meta-llama/llama-models, models/*/LICENSE)."""


def recognise(told: str) -> CommunityLicence | None:
    """The community licence that an id, a name, an address, or the text of a licence or notice file means."""
    found = _TITLE.search(told[:_TITLE_WITHIN])
    if found is None and "\n" not in told.strip():
        found = _NAME.search(told[:_TITLE_WITHIN])
    return COMMUNITY_LICENCES[found[1].replace("_", ".")] if found else None


def duties(*told: str | None) -> tuple[str, ...]:
    """What a deployer has to do, a sentence each, under every community licence among `told` (see `recognise`): ids,
    names and texts of one source or of several, None for what is not told. Empty when there is none among them.
    """
    licences = {licence.version: licence for one in told if one and (licence := recognise(one))}
    return tuple(sentence for licence in licences.values() for sentence in _sentences(licence))


def _sentences(licence: CommunityLicence) -> Iterator[str]:
    name = licence.title
    if licence.display:
        yield (
            f'{name}, 1.b.i: a product or service made available with it shows "{licence.display}" prominently, on a '
            "related website, user interface, blog post, about page or in its documentation."
        )
    yield (
        f"{name}, 2: whoever had, with affiliates, more than 700 million monthly active users in the calendar month "
        f"before {licence.released} needs a licence from Meta first."
    )
    yield (
        f"{name}, 1.b.i and iii: whoever receives the model gets a copy of the agreement and a Notice file that says: "
        f"{licence.notice}"
    )
    yield f"{name}, 1.b.iv: its use follows the acceptable use policy, {licence.policy}."
    if licence.prefix:
        of = "it or its outputs" if licence.may_improve_others else "it"
        yield (
            f"{name}, 1.b.i: an AI model improved with {of} and made available has a name that begins with "
            f'"{licence.prefix}".'
        )
    if not licence.may_improve_others:
        yield f"{name}, 1.b.v: neither it nor its outputs improve language models other than {licence.family}'s kin."


def named_licence(id: str | None, name: str | None, link: str | None) -> str | None:
    """The most telling of the three things that a model card (license, license_name, license_link) or a GGUF file
    (general.license, .name, .link) says: the id unless it is "other", else the name, else the link.
    """
    return next((one for one in (id if id != "other" else None, name, link) if one), None)


def folder_licence(path: Path) -> str | None:
    """Return the licence that the folder's model card names, else that of the licence file: the hub's id of a community
    licence, or the first line of another.
    """
    card = path / "README.md"
    if card.is_file() and (named := _card_licence(_beginning(card))):
        return named
    for file in sorted(path.iterdir()):
        if _LICENCE_FILE.fullmatch(file.name) and file.is_file():
            first = next((line.strip()[:120] for line in _beginning(file).splitlines() if line.strip()), None)
            titled = _TITLE.search(first or "")
            return COMMUNITY_LICENCES[titled[1]].id if titled else first
    return None


def _card_licence(text: str) -> str | None:
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    # The lines wanted are plain `key: value`, so no YAML reader is needed.
    lines = re.findall(r"^(license(?:_name|_link)?):\s*['\"]?([^\s'\"#]+)", front[1] if front else "", re.MULTILINE)
    named: dict[str, str] = dict(lines)
    return named_licence(*(named.get(key) for key in ("license", "license_name", "license_link")))


def legal_files(folder: Path) -> dict[str, Path]:
    """The licence, notice and policy files of a checkpoint's or an adapter's folder, by name."""
    return {path.name: path for path in sorted(folder.iterdir()) if LEGAL_FILE.fullmatch(path.name) and path.is_file()}


def legal_texts(files: Mapping[str, Path | bytes]) -> Iterator[str]:
    """The beginnings of the licence and notice files among those of a bundle, by their name."""
    for name, file in files.items():
        if LEGAL_FILE.fullmatch(name):
            yield file[:_BEGINNING].decode(errors="replace") if isinstance(file, bytes) else _beginning(file)


def _beginning(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_BEGINNING)
