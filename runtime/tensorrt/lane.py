"""One way of running an engine: a context with its profile, and the memory that goes in and comes out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ...errors import LlamaExportError
from ..arrays import Float32, Int64
from ..recipe import DECODE, IDS, KEPT, POSITIONS
from . import api
from .cuda import ALIGNMENT, Cuda
from .engine import LOGITS, Engine
from .kv_cache import Bound

_FLOAT32_BYTES = 4


class Lane:
    """A profile of an engine, ready to run `rows` texts of at most `width` tokens.

    bound: whether shapes and addresses are set, which last until `unbind`.
    """

    def __init__(
        self,
        cuda: Cuda,
        engine: Engine,
        kernels: Any,
        profile: str,
        scratch: tuple[int, int],
        *,
        rows: int,
        width: int,
        vocab: int,
    ) -> None:
        """kernels: as in `api.create_context`; profile: its name in the recipe; scratch: address and size of memory
        that all lanes share, as they never run at the same time. Raises LlamaExportError when TensorRT refuses.
        """
        self._cuda, self._engine = cuda, engine
        self._rows, self._vocab = rows, vocab
        index = [one.name for one in engine.recipe.profiles].index(profile)
        self._context = api.create_context(engine.module, engine.handle, kernels, one_shape=profile == DECODE)
        if self._context is None:
            raise self._failure(f"make a context for {profile}")
        api.give_scratch(self._context, *scratch)
        if not self._context.set_optimization_profile_async(index, cuda.stream):
            raise self._failure(f"choose the profile {profile}")
        self._feeds = _Feeds(cuda, engine, rows * width)
        self._room = 0
        self._target, self._source = np.empty(0, np.float32), 0
        self._reserve(rows * vocab)
        self._kept = 1
        self.bound = False

    def close(self) -> None:
        """Let go of the context and the engine, whose memory TensorRT gives back with its last lane."""
        del self._context, self._engine

    @property
    def logits(self) -> Float32:
        """float32 [rows, kept, vocab] of the last run, once the GPU is done; the next run overwrites it."""
        return self._target[: self._rows * self._kept * self._vocab].reshape(self._rows, self._kept, self._vocab)

    def write(self, ids: Int64, positions: Int64, kept: Int64) -> None:
        """Set the tokens of the next run; nothing may be running."""
        self._feeds.write({IDS: ids, POSITIONS: positions, KEPT: kept})

    def bind(self, cache: Iterable[Bound], count: int, kept: int) -> None:
        """Set the shapes and addresses of a run of `count` tokens, of which `kept` get logits."""
        self._reserve(self._rows * kept * self._vocab)
        self._kept = kept
        whole = {IDS: count, POSITIONS: count, KEPT: kept}
        feeds = (Bound(name, self._feeds.addresses[name], (self._rows, size)) for name, size in whole.items())
        logits = Bound(LOGITS, self._source, (self._rows, kept, self._vocab))
        inputs = self._engine.recipe.profiles[0].inputs
        for tensor in (*feeds, *cache, logits):
            if tensor.name in inputs and not self._context.set_input_shape(tensor.name, tensor.shape):
                raise self._failure(f"take {tensor.name} of {tensor.shape}")
            if not self._context.set_tensor_address(tensor.name, tensor.address):
                raise self._failure(f"take the memory of {tensor.name}")
        self.bound = True

    def unbind(self) -> None:
        """Say that shapes or addresses are others now."""
        self.bound = False

    def run(self) -> None:
        """Put a run on the stream: tokens to the GPU, the engine, logits back."""
        self._feeds.upload()
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure("run the model")
        self._cuda.download(self.logits, self._source)

    def capturable(self) -> bool:
        """Whether `run` can be recorded, as far as TensorRT tells beforehand."""
        return api.capturable(self._context, self._cuda.stream)

    def _reserve(self, count: int) -> None:
        """Make room for so many logits. The larger memory is taken first, so that without room for it all is as was."""
        if count <= self._room:
            return
        source = self._cuda.allocate(count * _FLOAT32_BYTES, "logits")
        target = self._cuda.pinned((count,), np.float32)
        if self._room:
            self._cuda.release(self._source)
            self._cuda.release(self._target.ctypes.data)
        self._source, self._target, self._room = source, target, count

    def _failure(self, what: str) -> LlamaExportError:
        """What TensorRT could not do, with the last that it said."""
        product = api.PRODUCTS[self._engine.recipe.module]
        messages = self._engine.logger.messages
        return LlamaExportError(f"{product} cannot {what}: {messages[-1].strip()[:300] if messages else 'no reason'}.")


class _Feeds:
    """The whole numbers that go in, side by side in one memory that one copy uploads. addresses: on the GPU."""

    def __init__(self, cuda: Cuda, engine: Engine, count: int) -> None:
        """count: of numbers for each input."""
        self._cuda = cuda
        types = {name: engine.types[name] for name in (IDS, POSITIONS, KEPT)}
        room = -(-count * max(kind.itemsize for kind in types.values()) // ALIGNMENT) * ALIGNMENT
        self._host = cuda.pinned((room * len(types),), np.uint8)
        self._device = cuda.allocate(self._host.nbytes, "tokens")
        self.addresses = {name: self._device + index * room for index, name in enumerate(types)}
        self._views = {
            name: self._host[index * room : (index + 1) * room].view(kind)
            for index, (name, kind) in enumerate(types.items())
        }

    def write(self, values: dict[str, Int64]) -> None:
        for name, value in values.items():
            self._views[name][: value.size] = value.reshape(-1)

    def upload(self) -> None:
        self._cuda.upload(self._device, self._host)


class Recording:
    """A lane's run, recorded as a CUDA graph where that is possible.

    The first run after a change of shapes is a plain one, as TensorRT may then prepare what no recording can hold
    (its documentation, "CUDA Graphs"). A recording that fails is not tried again: runs stay plain.
    """

    def __init__(self, cuda: Cuda, lane: Lane) -> None:
        self._cuda, self._lane = cuda, lane
        self._possible, self._warm = True, False
        self._recorded: int | None = None

    def forget(self) -> None:
        """Drop what was recorded: shapes or addresses are others now."""
        recorded, self._recorded, self._warm = self._recorded, None, False
        if recorded is not None:
            self._cuda.release(recorded)

    def run(self) -> None:
        """Put the lane's run on the stream."""
        if self._recorded is None and self._warm and self._possible:
            self._record()
        if self._recorded is not None:
            self._cuda.launch(self._recorded)
        else:
            self._lane.run()
            self._warm = True

    def _record(self) -> None:
        try:
            self._possible = self._lane.capturable()
            if self._possible:
                self._recorded = self._cuda.capture(self._lane.run)
        except LlamaExportError:
            self._possible = False
