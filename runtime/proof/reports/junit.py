"""JUnit XML, as GitHub's test reporters, GitLab and Jenkins read it: a suite for each run and check, a case for each
gate.

The format has no standard; what is written here is what https://github.com/testmoapp/junitxml describes as understood
everywhere. The same verdicts give the same bytes.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence

from ..verdict import Check, Gate, Verdict
from .words import distinct, gate_id, sentence

_FORBIDDEN = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold, not even escaped (https://www.w3.org/TR/xml/#charsets)."""
_LONGEST = 200  # characters of a name
_VERSION = re.compile(r"\S*\d\S*")


def junit_xml(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as one XML document. A gate that failed is a failure, a check that could not be answered an error.

    Names hold no version of a backend, so that they stay the same from run to run and a history can be kept of them.
    """
    suites = [
        _suite(verdict, check, name)
        for verdict, name in zip(verdicts, distinct(map(_stable, verdicts)), strict=True)
        for check in verdict.checks
    ]
    root = ET.Element("testsuites", name="llama-export verify")
    root.extend(suites)
    for count in ("tests", "failures", "errors"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.set("time", _seconds(sum(verdict.seconds for verdict in verdicts)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _stable(verdict: Verdict) -> str:
    """A backend without its versions, and without dots, at which Jenkins splits names: "onnxruntime-cpu"."""
    words = _VERSION.sub("", verdict.backend).replace(".", " ").split()
    return _text("-".join(words) or "backend")


def _suite(verdict: Verdict, check: Check, run: str) -> ET.Element:
    classname = f"{run}.{_text(check.id).replace('.', '-')}"
    suite = ET.Element("testsuite", name=classname)
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("bundle", verdict.bundle),
        ("backend", verdict.backend),
        ("check", check.title),
        ("positions", str(verdict.positions)),
    ):
        ET.SubElement(properties, "property", name=name, value=_text(value))
    named = list(_gates(check))
    for name, gate in zip(distinct(name for name, _ in named), (gate for _, gate in named), strict=True):
        case = ET.SubElement(suite, "testcase", classname=classname, name=name, time="0")
        if not gate.passed:
            failure = ET.SubElement(case, "failure", type=_text(gate.figure), message=_text(str(gate)[5:]))
            failure.text = _text(sentence(gate))
    if check.error is not None:
        case = ET.SubElement(suite, "testcase", classname=classname, name=_text(f"{check.id}[answered]"), time="0")
        ET.SubElement(case, "error", type="unanswered", message=_text(check.error)).text = _text(check.error)
    if check.details:
        ET.SubElement(suite, "system-out").text = "\n".join(_text(line) for line in check.details)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    suite.set("skipped", "0")
    suite.set("time", _seconds(check.seconds))
    return suite


def _gates(check: Check) -> Iterator[tuple[str, Gate]]:
    for case in check.cases:
        for gate in case.gates:
            yield _text(gate_id(check.id, case.way, case.prompt, gate.figure))[:_LONGEST], gate


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}"


def _text(text: str) -> str:
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
