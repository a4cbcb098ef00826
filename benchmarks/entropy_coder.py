"""Entropy coder: symbols per second each way on one core, and bytes over the information content.

    OMP_NUM_THREADS=1 python benchmarks/entropy_coder.py [--symbols 600000] [--repeat 9]

Symbols are drawn from the tables' own Gaussians, so that the overhead is the coder's alone. Each figure is
the median and the range over the repeats, with sorting, escapes, seal and the decoder's check by re-encoding.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mvcodec.entropy import SIGMAS, Tables, decode, encode, gaussian_tables
from mvcodec.entropy.tables import TOTAL


def indexes(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Sigma indexes as latents have them: all alike often, or mostly near the floor, as at low rates."""
    if kind == "all 64 sigmas alike":
        index = rng.integers(0, 64, n)
    elif kind == "geometric, mean 12":
        index = np.minimum(rng.geometric(1 / 12, n), 63)
    else:  # "70 % not coded"
        index = np.where(rng.random(n) < 0.7, 0, rng.integers(1, 40, n))
    return index.astype(np.uint8)


def draw(index: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.int32]:
    symbols = np.rint(rng.standard_normal(index.size) * SIGMAS[index]).astype(np.int32)
    symbols[index == 0] = 0
    return symbols


def ideal_bytes(symbols: NDArray[np.int32], index: NDArray[np.uint8], tables: Tables) -> float:
    """-sum log2 p / 8 of the coded symbols; an escape also costs its 4 + k raw bits."""
    coded = index > 0
    symbols, index = symbols[coded], index[coded]
    entry, last = symbols - tables.offsets[index], tables.lengths[index] - 1
    above, below = entry >= last, entry < 0
    distance = np.where(above, entry - last, np.where(below, -1 - entry, 0))
    raw = np.where(above | below, 4 + np.floor(np.log2(2 * distance + below + 1)), 0)
    start = (np.cumsum(tables.lengths) - tables.lengths)[index]
    counts = tables.counts[start + np.where(above | below, last, entry)]
    return float((raw - np.log2(counts / TOTAL)).sum() / 8)


def rates(work: Callable[[], object], n: int, repeat: int) -> str:
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    low, mid, high = (n / s / 1e6 for s in (max(seconds), statistics.median(seconds), min(seconds)))
    return f"{mid:5.1f} ({low:.1f}..{high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--symbols", type=int, default=600_000)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    rng, tables = np.random.default_rng(0), gaussian_tables()

    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, one core")
    print(f"{'indexes':<22}{'symbols':>9}{'bytes':>9}{'over ideal':>12}   encode M/s          decode M/s")
    for kind in ("all 64 sigmas alike", "geometric, mean 12", "70 % not coded"):
        for n in (options.symbols, options.symbols // 30):
            index = indexes(kind, n, rng)
            symbols = draw(index, rng)
            section = encode(symbols, index, tables)
            over = len(section) - ideal_bytes(symbols, index, tables)
            encoding = rates(lambda s=symbols, i=index: encode(s, i, tables), n, options.repeat)
            decoding = rates(lambda d=section, i=index: decode(d, i, tables), n, options.repeat)
            print(f"{kind:<22}{n:>9}{len(section):>9}{over:>+8.1f} B   {encoding:<20}{decoding}")


if __name__ == "__main__":
    main()
