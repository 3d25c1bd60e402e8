"""Put the stubs of the package tensorrt-stubs where mypy finds them: python .ci/type_stubs.py FOLDER

mypy passes by stubs of a package that has no py.typed, and these do not parse as they are: four functions have a
parameter named `in`, one has a parameter without a default after those with one.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

PACKAGES = ("tensorrt", "tensorrt_bindings")


def mended(text: str) -> str:
    return re.sub(r"\b(channel_axis: int)\) ->", r"\1 = 0) ->", re.sub(r"(?<=[(, ])in: ", "in_: ", text))


def main(folder: Path) -> None:
    marker = importlib.util.find_spec("tensorrt_stubs")
    if marker is None or marker.origin is None:
        sys.exit("tensorrt-stubs is not installed: pip install --no-deps tensorrt-stubs==10.13.0.35.1")
    site = Path(marker.origin).parents[1]
    for package in PACKAGES:
        (folder / package).mkdir(parents=True, exist_ok=True)
        for stub in (site / package).glob("*.pyi"):
            (folder / package / stub.name).write_text(mended(stub.read_text(encoding="utf-8")), encoding="utf-8")


main(Path(sys.argv[1]))
