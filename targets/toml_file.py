"""Reading a TOML file that a person wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 20


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; UsageError when it cannot be read, is no TOML, or is larger than any person writes."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a plain file; name a TOML file.")  # a pipe would be waited for
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES} bytes, which no such file is.")
        return tomllib.loads(text.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits, 5,000 brackets
        raise UsageError(f"{path} is not a TOML file: {error}.") from error
