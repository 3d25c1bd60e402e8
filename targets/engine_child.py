"""The process that builds an engine: is given its job, tells how far it is on stdout, one JSON object a line.

What its orders come by stays open as long as the parent lives and wants the engine. When it ends, the build is
stopped; when it ends without a word, the parent was killed, and this process ends at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from ..errors import LlamaExportError
from ..names import MODULES, TENSORRT_RTX
from ..runtime.decode_json import decode
from ..runtime.recipe import Recipe
from ..runtime.tensorrt.api import import_module

STOP = "stop"
"""What the parent writes when the user wants no engine any more."""


def main(job: dict[str, Any], orders: TextIO) -> None:
    """Build as `job` says (`engine_process.Job`); the last line has the key "built", "error" or "stopped".

    orders: where `STOP` comes from, if it comes.
    """
    with contextlib.suppress(ValueError):  # Ctrl-C reaches the whole process group: the parent decides what it means
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = _take_stdout(Path(job["log"]))
    lock, stop = threading.Lock(), threading.Event()

    def tell(**message: Any) -> None:
        with lock, contextlib.suppress(OSError):  # the parent is gone: `_obey` ends this
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    threading.Thread(target=_obey, args=(orders, stop), daemon=True).start()
    try:
        tell(**_build(job, stop, tell))
    except LlamaExportError as error:
        tell(error=str(error))
    except OSError as error:
        tell(error=f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    except MemoryError:
        tell(error="There is not enough memory to build the engine; close other programs, or take a larger machine.")
    except Exception as error:  # whatever a release of TensorRT raises
        traceback.print_exc()
        reason = " ".join(str(error).split()).rstrip(".")
        tell(error=f"Building the engine failed: {type(error).__name__}: {reason}.")


def _build(job: dict[str, Any], stop: threading.Event, tell: Any) -> dict[str, Any]:
    recipe = decode(Recipe, job["recipe"], "recipe")
    import_module(recipe.module)  # says how to install it, where polygraphy would not
    if find_spec("polygraphy") is None:
        extra = "rtx" if recipe.module == MODULES[TENSORRT_RTX] else "tensorrt"
        raise LlamaExportError(
            f'Building engines needs polygraphy, which is not installed: run `pip install "llama-export[{extra}]"`.'
        )
    from .engine import BuildStopped, build_plan  # noqa: PLC0415  # loads TensorRT
    from .engine_log import Phases  # noqa: PLC0415

    cache = job["timing_cache"]
    try:
        built = build_plan(
            Path(job["graph"]),
            job["label"],
            recipe,
            Path(job["plan"]),
            Path(job["log"]),
            None if cache is None else Path(cache),
            Phases(lambda share: tell(share=share), stop.is_set),
        )
    except BuildStopped:
        return {"stopped": True}
    return {"built": dataclasses.asdict(built)}


def _take_stdout(log: Path) -> TextIO:
    """Stdout for us alone: what libraries print there, and on stderr, goes to the log."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return channel


def _obey(orders: TextIO, stop: threading.Event) -> None:
    if orders.readline().strip() != STOP:
        os._exit(1)
    stop.set()
