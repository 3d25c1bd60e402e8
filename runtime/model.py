"""A loaded bundle: text in, text out."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import UsageError
from .adapters import adapter_named
from .bundle import Bundle, open_bundle
from .chat import ChatTemplate, Message, load_chat_template
from .choice import choose_backend, open_backend
from .conversation import Conversation
from .generate import GenerationOptions, Result, Stream, TokenCache
from .hashes import check_files
from .sequence import Backend
from .text import Tokenizer

T = TypeVar("T")

_LOOK_SECONDS = 0.2
"""How often one who waits for a thread hears Ctrl-C: Windows interrupts no such wait."""


def load(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    engine_dir: Path | None = None,
    threads: int | None = None,
    check_hashes: bool = False,
    chat: bool = False,
    adapter: str | None = None,
) -> Model:
    """Open the bundle in the folder `path` and load its model.

    backend: what computes, a name of `names.BACKENDS`; default, the engine for this GPU where there is one, else ONNX
    Runtime, and `Model.backend_note` says why. engine_dir: where `llama-export engine` keeps engines, default: the
    user's cache folder. threads: to compute with; default, the physical cores. check_hashes:
    read every file again to compare it with the manifest, even if this was done before and nothing has changed since.
    chat: load the chat template as well, while the model loads; otherwise its first use does. adapter: the name of one
    that the bundle has to choose from, see `Model.use_adapter`. Raises UsageError when there is no such folder, backend
    or adapter, or `threads` is out of range, LlamaExportError when the bundle is damaged, cannot run here, or lacks the
    template that `chat` asks for.
    """
    started = time.perf_counter()
    bundle = open_bundle(path)
    if adapter is not None:
        adapter_named(bundle, adapter)
    # Not in the thread: there its imports wait for Python's lock while a tokenizer is read.
    choice = choose_backend(bundle, backend, engine_dir)
    check_files(bundle, force=check_hashes)
    opening = _InThread(lambda: open_backend(bundle, choice, threads=threads, adapter=adapter))
    try:
        tokenizer = Tokenizer.load(bundle.file("tokenizer.json"), bundle.manifest.tokens)
        template = load_chat_template(bundle) if chat else None
    finally:
        opening.wait()
    opened, seconds = opening.result(), time.perf_counter() - started
    return Model(
        bundle,
        opened.backend,
        tokenizer,
        chat_template=template,
        load_seconds=seconds,
        adapter=adapter,
        backend_note=opened.note,
    )


class Model:
    """One bundle with its tokenizer and backend. Writes one text at a time, and in one thread at a time.

    reuse, where a method has it: compute only what differs from the start of the text written before. The numbers,
    and so rarely a token, differ slightly from those of a prompt computed anew, as ONNX Runtime rounds one row and
    many differently.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        load_seconds: float = 0.0,
        adapter: str | None = None,
        backend_note: str | None = None,
    ) -> None:
        """chat_template: the bundle's, if it is loaded already. adapter: the one that the backend has. backend_note:
        why it is not what the bundle is made for.
        """
        self.bundle = bundle
        self.backend_note = backend_note
        self.tokenizer = tokenizer
        self.load_seconds = load_seconds
        self._backend = backend
        self._chat_template = chat_template
        self._cache = TokenCache(backend)
        self._adapter = adapter

    @property
    def adapter(self) -> str | None:
        """The adapter that it writes with; None for the model itself."""
        return self._adapter

    @property
    def backend_name(self) -> str:
        """What computes: the engine, its version and the device."""
        return self._backend.name

    @property
    def threads(self) -> int:
        """With how many threads it computes."""
        return self._backend.threads

    @property
    def capacity(self) -> int:
        """Tokens of prompt and text together."""
        return self._backend.capacity

    @property
    def vocab(self) -> int:
        """Token ids are below this."""
        return self._backend.vocab

    @property
    def adapters(self) -> tuple[str, ...]:
        """The adapters that can be chosen."""
        return tuple(record.name for record in self.bundle.manifest.choices)

    def use_adapter(self, name: str | None) -> None:
        """Write with an adapter of the bundle from now on; None is the model without any.

        Raises UsageError when the bundle has no such adapter, LlamaExportError when its file is damaged.
        """
        self._backend.use_adapter(name)
        self._adapter = name
        self._cache = TokenCache(self._backend)

    def lend_backend(self) -> Backend:
        """What computes, to be used directly, with its sequence empty; what was written before cannot be reused."""
        self._backend.rewind(0)
        self._cache = TokenCache(self._backend)
        return self._backend

    @property
    def chat_template(self) -> ChatTemplate:
        """How the model was trained to see a conversation; LlamaExportError when the bundle has no template."""
        if self._chat_template is None:
            self._chat_template = load_chat_template(self.bundle)
        return self._chat_template

    def stream(
        self, prompt: str | Sequence[int], options: GenerationOptions | None = None, *, reuse: bool = False
    ) -> Stream:
        """Continue `prompt`, a text or token ids, piece by piece.

        Raises UsageError when the prompt is empty, longer than the context or has ids outside the vocabulary.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        return self._stream(ids, options, reuse=reuse, continues=True)

    def generate(
        self, prompt: str | Sequence[int], options: GenerationOptions | None = None, *, reuse: bool = False
    ) -> Result:
        """Continue `prompt` to its end; see `stream`."""
        return _finish(self.stream(prompt, options, reuse=reuse))

    def stream_chat(
        self, messages: Sequence[Message], options: GenerationOptions | None = None, *, reuse: bool = False
    ) -> Stream:
        """Answer a conversation, piece by piece.

        Raises LlamaExportError when the bundle has no chat template or it refuses the messages, else as `stream`
        does.
        """
        ids = self.tokenizer.encode(self.chat_template.render(messages), special=False)
        return self._stream(ids, options, reuse=reuse, continues=False)

    def chat(
        self, messages: Sequence[Message], options: GenerationOptions | None = None, *, reuse: bool = False
    ) -> Result:
        """Answer a conversation; see `stream_chat`."""
        return _finish(self.stream_chat(messages, options, reuse=reuse))

    def conversation(self, system: str | None = None) -> Conversation:
        """Begin a conversation that remembers its turns, each computing only what is new."""
        return Conversation(self, system)

    def _stream(self, ids: list[int], options: GenerationOptions | None, *, reuse: bool, continues: bool) -> Stream:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab:
            raise UsageError(f"Token ids must be from 0 to {self.vocab - 1}; the prompt has others.")
        return Stream(
            self._cache,
            self.tokenizer,
            ids,
            options or GenerationOptions(),
            eos=self.bundle.manifest.tokens.eos,
            reuse=reuse,
            continues=continues,
            load_seconds=self.load_seconds,
        )


def _finish(stream: Stream) -> Result:
    for _ in stream:
        pass
    return stream.result


class _InThread(Generic[T]):
    """A call that runs beside the caller (`concurrent.futures` takes as long to import as it saves here)."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)

    def result(self) -> T:
        self.wait()
        if self._error is not None:
            raise self._error
        value: T = self._value
        return value
