"""Arrays out of .npz files that nobody vouches for: no pickle, and no memory taken for what a header only claims."""

from __future__ import annotations

import math
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt


def read_array(
    archive: zipfile.ZipFile, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...], most_bytes: int
) -> npt.NDArray[Any]:
    """The array `name` of an archive, which must be of this dtype and shape, None for any size.

    Raises ValueError, in a few words, when it is not, or larger than `most_bytes`; KeyError when there is none; and
    what zipfile raises for damage.
    """
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        found, by_columns, kind = np.lib.format.read_array_header_1_0(file)
        fits = len(found) == len(shape) and all(want in (None, have) for have, want in zip(found, shape, strict=True))
        if not fits or kind != np.dtype(dtype):
            wanted = [size if size is not None else "any" for size in shape]
            raise ValueError(f"{name} is {kind} {list(found)}, but {np.dtype(dtype)} {wanted} is expected")
        size = math.prod(found) * kind.itemsize
        if size > most_bytes or min(found, default=0) < 0:  # a negative count would read whatever there is
            raise ValueError(f"{name} claims {size} bytes")
        data = file.read(size + 1)  # one more: only at the end does zipfile compare the checksum
    if len(data) != size:
        raise ValueError(f"{name} has another size than its header says")
    return np.frombuffer(data, kind).reshape(found, order="F" if by_columns else "C")
