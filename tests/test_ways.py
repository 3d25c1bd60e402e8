"""The ways through a graph: every dialect goes all of them, and what goes one wrongly is found by that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_export.progress import Silent
from llama_export.runtime.bundle import Bundle
from llama_export.runtime.choice import choose_backend, open_backend
from llama_export.runtime.proof.gates import limits_of
from llama_export.runtime.proof.judging import Judge, Question, replay
from llama_export.runtime.proof.reference import Logits, Prompt, compress
from llama_export.runtime.proof.replayers import BackendReplayer, ExecutorReplayer, GraphReplayer
from llama_export.runtime.proof.ways import BATCH, CHUNKS, DECODE, GREEDY, ONE_PIECE, REWIND, WAYS, Text, why_not
from llama_export.runtime.requirements import parse_version
from llama_export.runtime.session import LEAST, read_graph
from support.tiny_bundle import TinyLlama, random_llama, write_bundle
from support.tiny_tensorrt import PRIMITIVE, STATIC, write_tensorrt_bundle

onnxruntime = pytest.importorskip("onnxruntime", reason="graphs run in ONNX Runtime")

CHUNK = 7
LENGTHS = (9, 2, 30, 1, 14)
SHAPES: dict[str, dict[str, int]] = {
    "grouped heads": {},
    "one head of keys": {"heads": 3, "kv_heads": 1, "hidden": 28, "layers": 1},
    "as many heads of keys": {"heads": 2, "kv_heads": 2, "head_dim": 32},
}


def texts_of(llama: TinyLlama, lengths: Sequence[int] = LENGTHS, new: int = 9) -> list[Text]:
    """Random prompts with the greedy text that the model in NumPy writes after each."""
    rng, texts = np.random.default_rng(7), []
    for length in lengths:
        ids = [int(token) for token in rng.integers(0, llama.vocab, length)]
        for _ in range(new):
            ids.append(int(llama.logits(ids)[-1].argmax()))
        texts.append(Text(tuple(ids), length))
    return texts


def bundle_of(folder: Path, dialect: str, llama: TinyLlama) -> Bundle:
    make = write_bundle if dialect == "ort" else write_tensorrt_bundle
    arguments = () if dialect == "ort" else (dialect,)
    return make(folder, *arguments, llama, prefill_chunk=CHUNK)


def expected_of(llama: TinyLlama, texts: Sequence[Text]) -> list[np.ndarray]:
    return [llama.logits(list(text.ids)).astype(np.float32) for text in texts]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dialect", ["ort", STATIC, PRIMITIVE])
def test_every_way_gives_the_models_logits(dialect: str, shape: str, tmp_path: Path) -> None:
    if parse_version(onnxruntime.__version__) < parse_version(LEAST[dialect]):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no TensorScatter")
    llama = random_llama(4, **SHAPES[shape])
    bundle, texts = bundle_of(tmp_path, dialect, llama), texts_of(llama)
    expected = expected_of(llama, texts)
    graph = GraphReplayer(bundle, read_graph(bundle), 1, exact=True)
    real = BackendReplayer(open_backend(bundle, choose_backend(bundle, "onnxruntime"), threads=1).backend)
    for replayer in (graph, real):
        for way, go in WAYS.items():
            if why_not(way, replayer.most_rows, len(texts)) is not None:
                assert (way, replayer) == (BATCH, real)
                continue
            seen: dict[int, list[int]] = {}
            for piece in go(replayer, texts, CHUNK):
                np.testing.assert_allclose(
                    piece.logits, expected[piece.text][piece.start : piece.stop], atol=1e-3, err_msg=way
                )
                seen.setdefault(piece.text, []).extend(range(piece.start, piece.stop))
            assert sorted(seen) == list(range(len(texts)))
            for number, positions in seen.items():
                assert positions == covered(way, texts[number], replayer.most_rows, number), (way, number)


def covered(way: str, text: Text, rows: int, number: int) -> list[int]:
    """The positions of a text that a way gives the logits of."""
    count = len(text.ids)
    first, last = 0, count
    if way == REWIND:
        first = max(0, max(1, count // 2) - 3)
    if way == GREEDY:
        first = text.prompt_tokens - 1
    if way == DECODE and rows > 1:
        last = min(count, text.prompt_tokens + 8)
    return list(range(first, last))


def test_chunks_end_where_chunks_end_and_have_odd_pieces() -> None:
    class Recorder:
        name, vocab, context, most_rows, chunk = "recorder", 5, 4096, 1, 1024

        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def begin(self, rows: int) -> None:
            self.calls.append((-1, -1))

        def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
            self.calls.append((firsts[0], firsts[0] + counts[0]))
            return np.zeros((*ids.shape, self.vocab), np.float32)

        def cache(self, layer: int) -> None:
            return None

    for count, chunk, cuts in (
        (552, 512, [0, 7, 14, 512, 552]),
        (40, 512, [0, 7, 14, 40]),
        (1100, 512, [0, 7, 14, 512, 1024, 1100]),
        (20, 7, [0, 5, 10, 14, 20]),
        (3, 512, [0, 3]),
        (6, 1, [0, 1, 2, 3, 4, 5, 6]),
    ):
        recorder = Recorder()
        pieces = WAYS[CHUNKS](recorder, [Text((1,) * count, 1)], chunk)
        assert sum(piece.stop - piece.start for piece in pieces) == count
        assert recorder.calls[1:] == list(pairwise(cuts))


class Wrong(GraphReplayer):
    """A graph that is run wrongly in one way."""

    fault: Callable[[Any, Any, Any], tuple[Any, Any, Any]]

    def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        return super().run(*type(self).fault(ids, firsts, counts))


def ignores_firsts(ids: Any, firsts: Any, counts: Any) -> tuple[Any, Any, Any]:
    """Puts the first row's place in for every row's."""
    return ids, [firsts[0]] * len(firsts), counts


def off_by_one(ids: Any, firsts: Any, counts: Any) -> tuple[Any, Any, Any]:
    return ids, [max(0, first - 1) if ids.shape[1] == 1 else first for first in firsts], counts


class Forgetful(GraphReplayer):
    """Does not notice a rewind: goes on behind the last token that was run."""

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self._end = 0

    def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        if len(firsts) == 1:
            firsts = [self._end]
            self._end += counts[0]
        return super().run(ids, firsts, counts)


class Late(GraphReplayer):
    """Gives the logits of a padded row at its end, as if padding came first."""

    def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        logits = super().run(ids, firsts, counts)
        return np.stack([np.roll(row, -count, axis=0) for row, count in zip(logits, counts, strict=True)])


class Mixing(GraphReplayer):
    """Gives a row another row's logits."""

    def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        return super().run(ids, firsts, counts)[::-1].copy()


class Breaking(GraphReplayer):
    """Gives NaN once, at one place of one text."""

    def run(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        logits = super().run(ids, firsts, counts)
        if firsts[0] <= 20 < firsts[0] + counts[0]:
            logits[0, 20 - firsts[0], 3] = np.nan
        return logits


class Picking(GraphReplayer):
    """Gives the logits after the first token where it is asked for those after the last one alone."""

    def last(self, ids: Any, firsts: Sequence[int], counts: Sequence[int]) -> Any:
        return super().last(ids, firsts, [1] * len(counts))


def wrong(fault: Callable[[Any, Any, Any], tuple[Any, Any, Any]]) -> type[GraphReplayer]:
    return type("Planted", (Wrong,), {"fault": staticmethod(fault)})


FAULTS: dict[str, tuple[type[GraphReplayer], set[str]]] = {
    "nothing wrong": (GraphReplayer, set()),
    "every row at the first one's place": (wrong(ignores_firsts), {BATCH}),
    "a token at the place before": (wrong(off_by_one), {DECODE, BATCH, GREEDY, REWIND}),
    "logits of padded rows at the end": (Late, {BATCH}),
    "a rewind that is not noticed": (Forgetful, {REWIND}),
    "rows exchanged": (Mixing, {BATCH}),
    "another position than the last": (Picking, {GREEDY}),
    "NaN once": (Breaking, {ONE_PIECE, CHUNKS, DECODE, REWIND}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dialect", ["ort", PRIMITIVE])
def test_what_runs_a_way_wrongly_fails_in_it(dialect: str, fault: str, tmp_path: Path) -> None:
    llama = random_llama(4)
    bundle, texts = bundle_of(tmp_path, dialect, llama), texts_of(llama)
    kind, ways = FAULTS[fault]
    assert ways <= failing(kind(bundle, read_graph(bundle), 1, exact=True), llama, texts)
    if not ways:
        assert not failing(kind(bundle, read_graph(bundle), 1, exact=True), llama, texts)


def failing(replayer: GraphReplayer, llama: TinyLlama, texts: Sequence[Text]) -> set[str]:
    """The ways that do not pass the gates of full precision."""
    names = tuple(f"text {number}" for number in range(len(texts)))
    prompts = [Prompt(name, "", text.ids, text.prompt_tokens, 0) for name, text in zip(names, texts, strict=True)]
    expected: list[Logits] = [compress(logits) for logits in expected_of(llama, texts)]
    question = Question("full", "Q", tuple(WAYS), names, limits_of("full", "float32"))
    judge = Judge(question, prompts, expected)
    replay(replayer, texts, tuple(WAYS), CHUNK, Silent(), [judge])
    return {case.way for case in judge.cases(str) if not case.passed}


def test_hidden_states_and_caches_can_be_seen(tmp_path: Path) -> None:
    """A graph with values of other names shows none; its cache is that of its inputs and outputs."""
    llama = random_llama(4)
    bundle = bundle_of(tmp_path, "ort", llama)
    replayer = GraphReplayer(bundle, read_graph(bundle), 1, exact=True, layers=(0, 1))
    replayer.begin(1)
    logits, states = replayer.run_watched(np.arange(5), 0)
    assert (logits.shape, states) == ((5, llama.vocab), {})
    view = replayer.cache(1)
    assert view is not None
    assert view.keys.shape == view.values.shape == (1, llama.kv_heads, 5, llama.head_dim)


def test_an_executor_of_more_rows_than_texts(tmp_path: Path) -> None:
    from llama_export.runtime.ort_executors import onnxruntime_executor

    llama = random_llama(4)
    bundle, texts = bundle_of(tmp_path, PRIMITIVE, llama), texts_of(llama, (4, 6, 3))
    replayer = ExecutorReplayer(bundle, onnxruntime_executor(bundle, rows=4, threads=1))
    assert (replayer.most_rows, replayer.chunk) == (4, CHUNK)
    expected = expected_of(llama, texts)
    for piece in WAYS[BATCH](replayer, texts, CHUNK):
        np.testing.assert_allclose(piece.logits, expected[piece.text][piece.start : piece.stop], atol=1e-3)
