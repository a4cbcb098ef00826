"""Probability tables of the entropy coder: integer counts out of 2^16 per table, the last entry an escape.

    P(value v | table t) = counts[t][v - offset[t]] / 65536      offset[t] <= v < offset[t] + length[t] - 1
    P(escape  | table t) = counts[t][length[t] - 1] / 65536      every other v

Tables are computed once, at export, and stored with the weights as integers: nothing calls erf or exp when a
model is loaded, so every machine decodes with the same numbers. `bitstream_spec.md` says the same in words.
"""

from __future__ import annotations

import math

import numpy as np
from constriction import stream
from numpy.typing import ArrayLike, NDArray

from mvcodec.errors import ModelError

TOTAL = 1 << 16  # counts of one table sum to this
MAX_SYMBOL = 32767  # |symbol| <= this: symbols fit int16, escapes fit 15 bits
MAX_TABLES = 1 << 16  # table indexes fit uint16, which numpy sorts by radix
MAX_LENGTH = 1 << 14  # entries of one table; the widest Gaussian has 2566

SIGMAS: NDArray[np.float64] = np.exp(np.linspace(math.log(0.11), math.log(256.0), 64))
"""The 64 scales of the Gaussian tables, log-spaced by 0.123 (rate cost of the spacing: 0.07 %). 0.11 is the
literature's lower bound: |N(0, 0.11)| exceeds 1/2 once in 180,000, so forcing index 0 to zero is free."""


PRIOR_WEIGHT = 4  # of a fitted table: how many sightings of every entry its Gaussian is worth


def sigma_thresholds() -> NDArray[np.int32]:
    """[63] boundaries between neighbouring `SIGMAS` on the log axis, in units of 2^-16. For export: it calls log."""
    logarithms = np.log(SIGMAS)
    thresholds: NDArray[np.int32] = np.rint((logarithms[1:] + logarithms[:-1]) / 2 * 65536).astype(np.int32)
    return thresholds


class Tables:
    """Integer probability tables, checked, with the coder's models built once.

    counts:  [sum(lengths)] integers >= 1, row after row; each row sums to 65536, its last entry is the escape
    lengths: [T] entries per row, escape included, >= 2
    offsets: [T] value of each row's first entry; 0 must lie inside the row
    skip_first: symbols of table 0 are not coded and are always 0 (the lowest sigma of y)

    Raises ModelError for tables that break a rule: they come from a weights file.
    """

    def __init__(self, counts: ArrayLike, lengths: ArrayLike, offsets: ArrayLike, *, skip_first: bool = False) -> None:
        self.counts = _integers("counts", counts)
        self.lengths = _integers("lengths", lengths)
        self.offsets = _integers("offsets", offsets)
        self.skip_first = skip_first
        self._check()
        bounds = np.cumsum(self.lengths)[:-1]
        self.models = [_exact_model(row) for row in np.split(self.counts, bounds)]

    def __len__(self) -> int:
        return len(self.lengths)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The tables as small arrays for the weights file: `Tables(**arrays)` is the way back."""
        return {
            "counts": self.counts.astype(np.uint16),  # each < 65536: a row has at least two entries >= 1
            "lengths": self.lengths.astype(np.uint16),
            "offsets": self.offsets.astype(np.int16),
        }

    def _check(self) -> None:
        n = len(self.lengths)
        if not 1 <= n <= MAX_TABLES or len(self.offsets) != n:
            raise ModelError(
                f"entropy tables: {n} lengths, {len(self.offsets)} offsets; need 1 to {MAX_TABLES} of each"
            )
        if self.lengths.min() < 2 or self.lengths.max() > MAX_LENGTH:
            raise ModelError(f"entropy tables: a table must have 2 to {MAX_LENGTH} entries")
        if self.lengths.sum() != len(self.counts):
            raise ModelError(f"entropy tables: {len(self.counts)} counts for lengths of {self.lengths.sum()} in all")
        if self.counts.min() < 1 or self.counts.max() >= TOTAL:
            raise ModelError(f"entropy tables: every count must be in 1 .. {TOTAL - 1}")
        sums = np.add.reduceat(self.counts, np.cumsum(self.lengths) - self.lengths)
        if (sums != TOTAL).any():
            table = int(np.flatnonzero(sums != TOTAL)[0])
            raise ModelError(f"entropy tables: the counts of table {table} sum to {sums[table]}, not {TOTAL}")
        first, last = self.offsets, self.offsets + self.lengths - 2
        if first.max() > 0 or last.min() < 0 or first.min() < -MAX_SYMBOL or last.max() > MAX_SYMBOL:
            raise ModelError(f"entropy tables: each must hold the value 0 and stay inside +-{MAX_SYMBOL}")


def gaussian_tables() -> Tables:
    """Tables of round(N(0, sigma)) for the 64 `SIGMAS`; index 0 is not coded. For export only: it calls erf."""
    return _tables_of_scales([_gaussian_pmf(sigma) for sigma in SIGMAS])


def fitted_tables(seen: NDArray[np.int64]) -> Tables:
    """`gaussian_tables` bent towards what was seen: at one sigma, real symbols have more zeros and heavier tails.

    seen: [64, 2 S + 1] how often each symbol -S .. S occurred with each sigma index; larger ones in the outermost.
    A row's Gaussian counts as `PRIOR_WEIGHT` sightings per entry, so scales that were hardly seen stay as they are.
    """
    middle = seen.shape[1] // 2
    rows = []
    for sigma, row in zip(SIGMAS, (seen + seen[:, ::-1]) / 2, strict=True):
        gaussian = _gaussian_pmf(sigma)
        half = len(gaussian) // 2
        inside = np.zeros_like(gaussian)
        reach = min(half, middle)
        inside[half - reach : half + reach + 1] = row[middle - reach : middle + reach + 1]
        prior = PRIOR_WEIGHT * len(gaussian)
        rows.append((inside + prior * gaussian) / (row.sum() + prior))  # what lies outside is left to the escape
    rows[0] = _gaussian_pmf(SIGMAS[0])  # not coded
    return _tables_of_scales(rows)


def _gaussian_pmf(sigma: float) -> NDArray[np.float64]:
    """round(N(0, sigma)) over -half .. half.

    Half-width ceil(5 sigma) + 2: costs a Gaussian source 0.014 bit at sigma 256, nothing below 16, and saves
    up to 0.02 bit on heavier tails (Laplace, Student), as real latents have; outliers would be escapes.
    """
    half = math.ceil(5 * sigma) + 2
    edges = [math.erf((k - 0.5) / (sigma * math.sqrt(2))) for k in range(-half, half + 2)]
    pmf: NDArray[np.float64] = 0.5 * np.diff(edges)
    return pmf


def _tables_of_scales(pmfs: list[NDArray[np.float64]]) -> Tables:
    """Tables of symmetric rows, the first of which is not coded."""
    rows = [counts_from_pmf(pmf[None])[0] for pmf in pmfs]
    return Tables(np.concatenate(rows), [len(row) for row in rows], [-(len(p) // 2) for p in pmfs], skip_first=True)


def counts_from_pmf(pmf: ArrayLike) -> NDArray[np.int64]:
    """Integer counts of probability rows: [C, L] -> [C, L + 1]; the escape, last, gets the rest to 1.

    Each entry gets 1, the rest is shared in proportion, rounded by largest remainder, ties to lower index.
    Raises ValueError where a row is negative, not finite, zero, or sums to more than 1.
    """
    p = np.atleast_2d(np.asarray(pmf, dtype=np.float64))
    sums = p.sum(axis=1, keepdims=True)
    if p.ndim != 2 or not (p >= 0).all() or not (sums > 0).all() or not (sums <= 1 + 1e-6).all():
        raise ValueError("pmf must be [C, L], finite, >= 0, each row summing to more than 0 and at most 1")
    p = np.concatenate([p, np.maximum(1 - sums, 0)], axis=1)
    free = TOTAL - p.shape[1]
    if free < 0:
        raise ValueError(f"pmf rows of {p.shape[1] - 1} values do not fit counts out of {TOTAL}")
    share = p / p.sum(axis=1, keepdims=True) * free
    counts: NDArray[np.int64] = np.floor(share).astype(np.int64)
    by_remainder = np.argsort(counts - share, axis=1, kind="stable")
    rank = np.argsort(by_remainder, axis=1, kind="stable")
    counts += 1 + (rank < free - counts.sum(axis=1, keepdims=True))
    return counts


def _exact_model(counts: NDArray[np.int64]) -> stream.model.Categorical:
    """The native model whose 24-bit cumulative is exactly 256 * cumsum(counts).

    constriction 0.5 sets cumulative[i] = floor(sum(p[:i]) * ((2^24 - n) / sum(p))) + i for n entries. With
    p = 256 * count - 1, sum(p) is 2^24 - n, the factor 1 and all else an integer: exact in any float format.
    """
    return stream.model.Categorical((256 * counts - 1).astype(np.float64), perfect=False)


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ModelError(f"entropy tables: {name} are {array.dtype} {list(array.shape)}, not a row of integers")
    return array.astype(np.int64)
