"""How fast this machine reads memory: the ceiling for decoding, which reads every weight once a token.

    python benchmarks/bandwidth.py [--threads N]

Each of N threads sums its part of one array of 64-bit integers in numpy, which needs one addition for eight bytes and
releases the interpreter lock. The array is 1 GiB, so that no processor's cache holds it; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

ARRAY_BYTES = 1 << 30


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that `threads` threads together read from memory."""
    array = np.ones(ARRAY_BYTES // 8, np.int64)  # ones, since the kernel maps untouched zeros to one shared page
    parts = np.array_split(array, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    print(f"{read_bandwidth(parser.parse_args().threads) / 1e9:.1f} GB/s")
