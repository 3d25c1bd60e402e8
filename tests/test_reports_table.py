"""What `verify` prints: tables that fit a terminal, failures by name, and a last line that says what was found."""

from __future__ import annotations

import dataclasses

import pytest
from llama_export.runtime.proof.reports.table import fitted, lines
from llama_export.runtime.proof.reports.words import brief, worst
from llama_export.runtime.proof.verdict import Case, Check, Gate, LayerFigure, Verdict
from llama_export.tables import width
from support.verdicts import PROMPTS, full, verdict

BROKEN = ("chunks", PROMPTS[2])


def of(*checks: Check, engine: bool | None = None) -> Verdict:
    return Verdict("bundle", "cpu", 4, checks, 0.5, 9, ("noted",), engine)


def test_a_verdict_that_passed() -> None:
    text = lines((verdict(),))
    assert text[0] == "bundles/tiny on onnxruntime 1.32.0 cpu, 260 positions, 12.3 s"
    assert "  ok   files that differ from the manifest: 0 (at most 0)" in text
    assert "Texts of 52 tokens were replayed; docs/parity.md tells what they cannot reach." in text
    assert "An `ort` bundle." in text
    assert text[-2:] == ["", "passed"]
    assert not any("FAIL" in line for line in text)


def test_each_way_is_a_row_with_the_worst_of_all_prompts() -> None:
    text = lines((of(full(broken=BROKEN)),))
    first = text[: next(number for number, line in enumerate(text) if "KL" in line)]  # of two blocks
    rows = {line.split()[1]: line for line in first if line.startswith(("  ok ", "  FAIL "))}
    assert list(rows) == ["one", "chunks", "decode", "batch", "rewind"]
    assert rows["chunks"].split()[:3] == ["FAIL", "chunks", "0.25"]
    assert rows["decode"].split()[:3] == ["ok", "decode", "1.9e-4"]
    limits = [word for line in text for word in line.split() if word.startswith(("<=", ">="))]
    assert limits == ["<=0.0014", "<=3e-4", ">=0.999999", "<=1e-4", "<=1e-5", "<=0", ">=0.99"]


def test_what_failed_is_told_by_way_and_prompt_with_the_reason_for_its_limit() -> None:
    text = lines((of(full(broken=BROKEN)),))
    assert f"  FAIL chunks, {BROKEN[1]}: largest difference of a logit: 0.25 (at most 0.00137)" in text
    assert "  why largest difference of a logit has that limit: another order of sums" in text
    assert text[-1] == f"FAILED: {full().title}: largest difference of a logit"


def test_many_failures_are_counted() -> None:
    cases = [Case((Gate("kl", "KL", 1, 0),), "decode", f"prompt {number}") for number in range(30)]
    text = lines((of(Check("full", "t", tuple(cases))),))
    assert sum("FAIL decode, prompt" in line for line in text) == 12
    assert "  FAIL and 18 more" in text


def test_figures_that_are_not_finite_fail_and_are_named() -> None:
    gates = (Gate("a", "a", float("nan"), 1), Gate("b", "b", float("inf"), 1), Gate("c", "c", float("nan"), 1, True))
    text = lines((of(Check("t", "t", (Case(gates),))),))
    assert [line for line in text if "FAIL " in line] == [
        "  FAIL a: NaN (at most 1)",
        "  FAIL b: infinite (at most 1)",
        "  FAIL c: NaN (at least 1)",
    ]
    assert text[-1] == "FAILED: t: a; t: b; t: c"


def test_nan_is_the_worst_of_a_figure() -> None:
    found = [Gate("kl", "KL", value, 1.0) for value in (0.1, float("nan"), 7.0)]
    assert worst(found) is found[1]
    assert worst([found[0], found[2]]) is found[2]
    least = [Gate("cosine", "c", value, 0.9, at_least=True) for value in (0.95, 0.91, 1.0)]
    assert worst(least) is least[1]


def test_a_check_without_an_answer() -> None:
    text = lines((of(Check("full", "Kernels", error="The graph does not load.")),))
    assert "  FAIL The graph does not load." in text
    assert text[-1] == "FAILED: Kernels: not answered"


@pytest.mark.parametrize(
    ("engines", "last"),
    [
        ((None,), "passed"),
        ((False,), "passed on the CPU; no engine was checked"),
        ((True,), "passed"),
        ((False, True), "passed"),
    ],
)
def test_what_a_pass_means(engines: tuple[bool | None, ...], last: str) -> None:
    assert lines(tuple(of(full(), engine=engine) for engine in engines))[-1] == last


def test_nothing_that_was_verified_is_no_pass() -> None:
    assert lines(())[-1] == "FAILED: nothing was verified"
    assert lines((of(),))[-1] == "passed"


def test_several_runs_begin_with_a_matrix_of_ways_and_backends() -> None:
    found = lines((verdict(), verdict(broken=BROKEN, backend="tensorrt 10.3"), of(full())))
    matrix = found[: found.index("")]
    assert matrix[0] == "bundles/tiny on 3 backends"
    assert matrix[1].split() == ["onnxruntime", "1.32.0", "cpu", "tensorrt", "10.3", "cpu"]
    cells = {line[:20].strip(): line[20:].split() for line in matrix[2:]}
    assert cells["full     chunks"] == ["ok", "FAIL", "ok"]
    assert cells["full     decode"] == ["ok", "ok", "ok"]
    assert cells["shipped  decode"] == ["ok", "ok", "-"]
    assert cells["layers"] == ["ok", "ok", "-"]
    assert found[-1].startswith("FAILED: tensorrt 10.3: Full-precision kernels")


def test_tables_keep_to_80_columns_of_a_terminal() -> None:
    """Wide characters too; only sentences may be longer."""
    wide = dataclasses.replace(verdict(broken=BROKEN), backend="計算" * 40)
    found = lines((wide, verdict(broken=("decode", "long"))))
    tables = [line for line in found if "  " in line.strip()]
    assert len(tables) > 30
    assert max(map(width, tables)) <= 80


def test_a_table_too_wide_becomes_blocks_of_about_the_same_size() -> None:
    names = [["", ""], ["ok", "decode"]]
    found = fitted(names, [[f"column {number}", "1"] for number in range(9)])
    assert [line.split()[-2:] for line in found[::2]] == [["column", "4"], ["column", "8"]]
    assert all(line.split()[:2] == ["ok", "decode"] for line in found[1::2])
    assert len(fitted(names, [["x" * 200, "1"], ["y", "2"]])) == 4


def test_layers_that_differ_most_are_shown_in_their_order() -> None:
    layers = [LayerFigure(layer, 1e-6 * (layer % 5), None, float("nan") if layer == 2 else 0) for layer in range(12)]
    found = lines((of(Check("layers", "Inside", layers=tuple(layers))),))
    start = next(number for number, line in enumerate(found) if line.split()[:1] == ["layer"])
    told = [line.split() for line in found[start + 1 : start + 9]]
    assert [int(row[0]) for row in told] == sorted(int(row[0]) for row in told)
    assert ["2", "2e-6", "-", "NaN"] in told
    assert "  and 4 layers that differ less" in found


def test_names_from_a_bundle_stay_in_their_line() -> None:
    evil = "\x1b[31m" + "x\n\ty" * 3000
    case = Case((Gate("kl", "KL", 1, 0, reason=evil),), "decode", evil)
    check = Check("full", evil, (case, Case((Gate("k", evil, 0, 0),))), (evil,), error=evil)
    found = lines((dataclasses.replace(of(check), bundle=evil, backend=evil, notes=(evil,)),))
    assert not any(character in line for line in found for character in "\x1b\n\t")
    assert any(line.startswith("  FAIL decode, [31mx yx") and len(line) < 80 for line in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4.26e-10, "4.3e-10"),
        (3e-4, "3e-4"),
        (0.00137, "0.0014"),
        (0.25, "0.25"),
        (0.99996, "0.99996"),
        (0.9999999999, "1"),
        (1.0, "1"),
        (12.34, "12"),
        (4321.0, "4321"),
        (1.5e7, "1.5e7"),
        (float("inf"), "infinite"),
        (float("nan"), "NaN"),
    ],
)
def test_figures_in_narrow_columns(value: float, text: str) -> None:
    assert brief(value) == text
