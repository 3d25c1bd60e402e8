"""A conversation that remembers its turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .chat import Message
from .generate import GenerationOptions, Stream


class Answers(Protocol):
    """What a conversation needs of a model."""

    def stream_chat(
        self, messages: Sequence[Message], options: GenerationOptions | None = None, *, reuse: bool = False
    ) -> Stream:
        """Begin the answer to `messages`."""


class Conversation:
    """Messages so far, and the answer being given."""

    def __init__(self, model: Answers, system: str | None = None) -> None:
        """system: instructions before the first turn."""
        self._model = model
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._system)
        self._pending: Stream | None = None

    def end_turn(self) -> Sequence[Message]:
        """Return all turns, after ending the answer that is being written, if one is, and taking it as it is."""
        if self._pending is not None:
            text = self._pending.stop().text
            self._messages.append({"role": "assistant", "content": text})
            self._pending = None
        return tuple(self._messages)

    def say(self, text: str, options: GenerationOptions | None = None) -> Stream:
        """Say something; return the answer as it is written. The conversation stays as it was when this raises."""
        messages = [*self.end_turn(), {"role": "user", "content": text}]
        continues = len(messages) > len(self._system) + 1
        stream = self._model.stream_chat(messages, options, reuse=continues)
        self._messages, self._pending = messages, stream
        return stream

    def reset(self) -> None:
        """Forget everything but the system's instructions."""
        if self._pending is not None:
            self._pending.stop()
        self._messages, self._pending = list(self._system), None
