"""Writing a text token by token: prefill, sampling, streaming, and how it ended."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import LlamaExportError, UsageError
from .arrays import Float32
from .sampling import Sampler, SamplingOptions
from .sequence import Backend
from .text import StopStrings, StreamDecoder, Tokenizer

FinishReason = Literal["stop", "stop_string", "length", "context", "interrupted"]
"""stop: a token that ends an answer; stop_string: one of the option `stop`; length: max_new_tokens;
context: the cache is full; interrupted: the caller ended it."""

_MAX_STOPS, _MAX_STOP_LENGTH = 64, 1024


@dataclass(frozen=True)
class GenerationOptions:
    """How long and how to write. Raises UsageError naming the value that is out of range.

    max_new_tokens: at least 1. stop: texts that end the answer and are not part of it. ignore_eos: write on past
    tokens that end an answer, to measure speed.
    """

    max_new_tokens: int = 256
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}.")
        if isinstance(self.stop, str):  # would be taken for one-letter texts
            raise UsageError(f"stop must be several texts, such as ({self.stop!r},), not one.")
        if len(self.stop) > _MAX_STOPS or not all(0 < len(stop) <= _MAX_STOP_LENGTH for stop in self.stop):
            raise UsageError(
                f"stop must be at most {_MAX_STOPS} texts of 1 to {_MAX_STOP_LENGTH} characters; leave out empty ones."
            )


@dataclass(frozen=True)
class Piece:
    """Some more text, never empty and never half a character, and the ids of the tokens that completed it."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """A finished text and what it took.

    token_ids: all that were chosen, with the one that ended the answer, if one did. reused_tokens: of the
    prompt_tokens, those still in the cache from before. Rates are tokens a second, None where nothing was measured:
    prefill counts the prompt tokens that were computed, decode all tokens after the first, without the time that the
    caller took between them. load_seconds: what loading the model took, once.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    load_seconds: float
    first_token_seconds: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields under their names, ready for `json.dumps`."""
        return dataclasses.asdict(self)


class TokenCache:
    """The tokens whose keys and values a backend holds, so that a new prompt computes only what is new in it."""

    def __init__(self, backend: Backend) -> None:
        self.capacity = backend.capacity
        self._backend = backend
        self._owner: object = None
        self._tokens: list[int] = []

    @property
    def full(self) -> bool:
        """Whether no further token fits."""
        return self._backend.length >= self.capacity

    def start(self, prompt: Sequence[int], *, reuse: bool, owner: object) -> tuple[Float32, int]:
        """Make the cache hold `prompt`; return the logits after it, and how many of its tokens were there already."""
        self._owner = owner
        del self._tokens[self._backend.length :]  # an interrupted run computed less than it was given
        kept = _common_prefix(self._tokens, prompt[:-1]) if reuse else 0
        self._backend.rewind(kept)
        self._tokens[kept:] = prompt[kept:]
        return self._backend.extend(prompt[kept:])[0], kept

    def step(self, token: int, owner: object) -> Float32:
        """Append one token. Raises LlamaExportError when another text took the cache since `owner` started."""
        if self._owner is not owner:
            raise LlamaExportError("This text cannot be continued, as the model has begun another one since.")
        self._tokens.append(token)
        return self._backend.step(token)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second))  # noqa: B905 (the shorter one ends it)
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


class Stream(Iterator[Piece]):
    """A text being written: iterate for its pieces, then read `result`. `stop` ends it early."""

    def __init__(
        self,
        cache: TokenCache,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        options: GenerationOptions,
        *,
        eos: Iterable[int],
        reuse: bool = False,
        continues: bool = True,
        load_seconds: float = 0.0,
    ) -> None:
        """Prepare; computing begins with the first piece.

        reuse: keep what the cache holds of the prompt's beginning. continues: the text goes on from the prompt's last
        word, so a space between them is kept; an answer in a chat begins anew. Raises UsageError when the prompt is
        empty or longer than the context.
        """
        _check_prompt(prompt, cache.capacity)
        self._cache = cache
        self._prompt = list(prompt)
        self._options = options
        self._eos = frozenset(() if options.ignore_eos else eos)
        self._reuse = reuse
        self._load_seconds = load_seconds
        self._sampler = Sampler(options.sampling, self._prompt)
        self._decoder = StreamDecoder(tokenizer, self._prompt if continues else ())
        self._stops = StopStrings(options.stop)
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._unshown: list[int] = []
        self._reused = 0
        self._prefill_seconds: float | None = None
        self._decoded, self._decode_seconds = 0, 0.0  # an interrupted token is in neither
        self._reason: FinishReason | None = None
        self._pieces = self._write()

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def result(self) -> Result:
        """The finished text; LlamaExportError while it is still being written."""
        if self._reason is None:
            raise LlamaExportError("The text is still being written: iterate to its end, or call stop().")
        computed = len(self._prompt) - self._reused
        return Result(
            text="".join(self._texts),
            token_ids=tuple(self._ids),
            finish_reason=self._reason,
            prompt_tokens=len(self._prompt),
            reused_tokens=self._reused,
            new_tokens=len(self._ids),
            load_seconds=self._load_seconds,
            first_token_seconds=self._prefill_seconds,
            prefill_tokens_per_second=computed / self._prefill_seconds if self._prefill_seconds else None,
            decode_tokens_per_second=self._decoded / self._decode_seconds if self._decode_seconds else None,
        )

    def stop(self) -> Result:
        """End the text here, if it has not ended, also after an exception such as KeyboardInterrupt."""
        self._pieces.close()
        if self._reason is None:
            self._reason = "interrupted"
        return self.result

    def _write(self) -> Generator[Piece, None, None]:
        resumed = time.perf_counter()
        logits, self._reused = self._cache.start(self._prompt, reuse=self._reuse, owner=self)
        while True:
            token = self._sampler.pick(logits)
            text = self._take(token)
            self._measure(time.perf_counter() - resumed)
            if text:
                yield self._piece(text)
            if self._reason is not None:
                return
            resumed = time.perf_counter()
            logits = self._cache.step(token, self)

    def _take(self, token: int) -> str:
        """Record a token and the reason if the text ends with it; return what can be shown now."""
        self._ids.append(token)
        self._unshown.append(token)
        if token in self._eos:
            ended: FinishReason | None = "stop"
        elif len(self._ids) >= self._options.max_new_tokens:
            ended = "length"
        else:
            ended = "context" if self._cache.full else None
        text = "" if ended == "stop" else self._decoder.push(token)
        text = self._stops.push(text if ended is None else text + self._decoder.flush())
        self._reason = "stop_string" if self._stops.found is not None else ended
        return text if self._reason is None else text + self._stops.flush()

    def _measure(self, seconds: float) -> None:
        if self._prefill_seconds is None:
            self._prefill_seconds = seconds
        else:
            self._decoded += 1
            self._decode_seconds += seconds

    def _piece(self, text: str) -> Piece:
        self._texts.append(text)
        tokens, self._unshown = tuple(self._unshown), []
        return Piece(text, tokens)


def _check_prompt(prompt: Sequence[int], capacity: int) -> None:
    if not prompt:
        raise UsageError("The prompt is empty, and this tokenizer begins texts with no token; give some text.")
    if len(prompt) > capacity:
        raise UsageError(
            f"The prompt has {len(prompt)} tokens, but the context of this bundle is {capacity}; "
            "shorten it or build with a larger --context."
        )
