"""JUnit XML: a case for each gate, with names that stay, whatever a bundle says."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

from llama_export.runtime.proof.reports.junit import junit_xml
from llama_export.runtime.proof.verdict import Case, Check, Gate, Verdict
from support.verdicts import PROMPTS, full, verdict

EVIL = "</failure><script>alert(1)</script> & \"'\x00\x1b\ufffe\ud800"


def suites(*verdicts: Verdict) -> list[ET.Element]:
    return ET.fromstring(junit_xml(verdicts).encode()).findall("testsuite")


def test_a_suite_for_each_run_and_check_and_a_case_for_each_gate() -> None:
    runs = verdict(), verdict(backend="tensorrt 10.3.0")
    root = ET.fromstring(junit_xml(runs).encode())
    gates = sum(len(case.gates) for run in runs for check in run.checks for case in check.cases)
    assert (root.tag, root.get("tests"), root.get("failures"), root.get("errors")) == (
        "testsuites",
        str(gates),
        "0",
        "0",
    )
    assert root.get("time") == "24.680"
    names = [suite.get("name") for suite in root]
    assert names == [
        f"{run}.{check}" for run in ("onnxruntime-cpu", "tensorrt") for check in ("files", "full", "shipped", "layers")
    ]
    assert [len(suite.findall("testcase")) for suite in root] == [int(suite.get("tests", "")) for suite in root]
    every = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(every)) == len(every) == gates
    assert ("onnxruntime-cpu.full", "full[chunks-short-difference]") in every
    assert ("onnxruntime-cpu.files", "files[differing]") in every


def test_a_gate_that_failed_says_what_was_measured_and_allowed_and_why() -> None:
    (suite,) = suites(dataclasses.replace(verdict(), checks=(full(broken=("decode", PROMPTS[2])),)))
    (case,) = [case for case in suite.findall("testcase") if len(case)]
    assert case.get("name") == f"full[decode-{PROMPTS[2]}-difference]"
    (failure,) = case
    assert (failure.tag, failure.get("type")) == ("failure", "difference")
    assert failure.get("message") == "largest difference of a logit: 0.25 (at most 0.00137)"
    assert failure.text == (
        "Largest difference of a logit: 0.25, where at most 0.00137 is allowed (another order of sums)."
    )
    assert (suite.get("failures"), suite.get("time")) == ("1", "3.250")
    assert {one.get("name"): one.get("value") for one in suite.iter("property")} == {
        "bundle": "bundles/tiny",
        "backend": "onnxruntime 1.32.0 cpu",
        "check": full().title,
        "positions": "260",
    }
    assert suite.findtext("system-out") == "largest logit 45.5"


def test_a_check_without_an_answer_is_an_error() -> None:
    (suite,) = suites(dataclasses.replace(verdict(), checks=(Check("full", "t", error="It does not load."),)))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    assert suite.find("testcase/error").get("message") == "It does not load."


def test_figures_that_are_not_finite_fail() -> None:
    gates = tuple(Gate("kl", "KL", value, 1) for value in (float("nan"), float("inf")))
    (suite,) = suites(dataclasses.replace(verdict(), checks=(Check("full", "t", (Case(gates),)),)))
    assert [case.get("name") for case in suite.findall("testcase")] == ["full[kl]", "full[kl] (2)"]
    assert [one.get("message") for one in suite.iter("failure")] == ["KL: NaN (at most 1)", "KL: infinite (at most 1)"]


def test_whatever_a_bundle_says_the_file_is_xml() -> None:
    gate = Gate(EVIL, EVIL, 2, 1, reason=EVIL)
    check = Check(f"full:{EVIL}", EVIL, (Case((gate,), EVIL, EVIL * 1000),), (EVIL,), error=EVIL)
    (suite,) = suites(Verdict(EVIL, EVIL, 1, (check,), 0.0, 1, (EVIL,)))
    assert suite.find("testcase/failure").text.count("<script>alert(1)</script>") == 2
    assert not list(suite.iter("script"))
    assert suite.find("properties/property").get("value") == EVIL[:-4] + "\ufffd" * 4
    assert len(suite.find("testcase").get("name")) == 200


def test_classes_keep_their_name_from_version_to_version_and_have_no_other_dot() -> None:
    of = Check("full:my.adapter", "t")
    names = {
        suite.get("name")
        for backend in ("onnxruntime 1.23.2 cpu", "onnxruntime 1.32.0 cpu")
        for suite in suites(dataclasses.replace(verdict(backend=backend), checks=(of,)))
    }
    assert names == {"onnxruntime-cpu.full:my-adapter"}


def test_two_runs_that_look_alike_stay_apart() -> None:
    assert len({suite.get("name") for suite in suites(verdict(), verdict())}) == 8


def test_nothing_verified_is_an_empty_file() -> None:
    assert suites() == []


def test_the_same_verdict_gives_the_same_bytes() -> None:
    assert junit_xml((verdict(),)) == junit_xml((verdict(),))
