"""Tables are integers, checked when loaded, and become the native coder's models without any rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from constriction import stream
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from mvcodec.entropy.tables import SIGMAS, TOTAL, Tables, counts_from_pmf, fitted_tables, gaussian_tables
from mvcodec.errors import ModelError


def rows(tables: Tables) -> list[NDArray[np.int64]]:
    return np.split(tables.counts, np.cumsum(tables.lengths)[:-1])


def test_gaussian_tables_follow_the_normal_distribution() -> None:
    tables = gaussian_tables()
    assert len(tables) == len(SIGMAS) == 64
    assert tables.skip_first
    for sigma, offset, row in zip(SIGMAS, tables.offsets, rows(tables), strict=True):
        k = np.arange(len(row) - 1) + offset
        cdf = [0.5 * math.erf((edge - 0.5) / (sigma * math.sqrt(2))) for edge in [*k, k[-1] + 1]]
        # 1 for every entry off the top, rounding to 1: nothing else separates counts from the integral.
        assert np.abs(row[:-1] - np.diff(cdf) * TOTAL).max() <= 1 + len(row) * np.diff(cdf).max()
        assert np.abs(row[:-1] - row[-2::-1]).max() <= 1, "symmetric up to the last unit"
        assert -offset == k[-1] >= 5 * sigma


def test_gaussian_tables_cost_almost_nothing_over_the_true_distribution() -> None:
    tables = gaussian_tables()
    for sigma, offset, row in list(zip(SIGMAS, tables.offsets, rows(tables), strict=True))[1:]:
        k = np.arange(len(row) - 1) + offset
        p = np.diff([0.5 * math.erf((edge - 0.5) / (sigma * math.sqrt(2))) for edge in [*k, k[-1] + 1]])
        p = np.maximum(p, 1e-300)
        excess = (p * (np.log2(p) - np.log2(row[:-1] / TOTAL))).sum()
        assert excess < 0.002 * max((p * -np.log2(p)).sum(), 0.1)


def test_gaussian_tables_follow_the_recipe_of_the_specification() -> None:
    """Up to one unit, which another libm may round elsewhere: that is why the integers are stored."""
    tables = gaussian_tables()
    assert tables.offsets[[0, 1, 20, 40, 63]].tolist() == [-3, -3, -9, -78, -1282]
    assert np.abs(rows(tables)[10] - [1, 1, 3, 6035, 53456, 6034, 3, 1, 1, 1]).max() <= 1


def test_fitted_tables_follow_what_was_seen_and_the_gaussian_where_nothing_was() -> None:
    rng = np.random.default_rng(0)
    seen = np.zeros((64, 201), dtype=np.int64)
    laplace = np.rint(rng.laplace(0, SIGMAS[20] / math.sqrt(2), 200_000)).astype(int)
    np.add.at(seen[20], laplace + 100, 1)
    fitted, gaussian = rows(fitted_tables(seen)), rows(gaussian_tables())
    assert all((fitted[i] == gaussian[i]).all() for i in range(64) if i != 20)

    def bits(row: NDArray[np.int64]) -> float:
        half = len(row) // 2 - 1
        entry = np.where(np.abs(laplace) <= half, laplace + half, len(row) - 1)
        return float(-np.log2(row[entry] / TOTAL).sum())

    p = np.bincount(laplace + 100) / len(laplace)
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * len(laplace)
    assert bits(fitted[20]) < 1.002 * entropy < 0.98 * bits(gaussian[20])
    assert fitted[20][-1] == pytest.approx((np.abs(laplace) > 9).mean() * TOTAL, abs=2), "the rest is the escape's"


def test_arrays_are_the_way_into_the_weights_file_and_back() -> None:
    tables = gaussian_tables()
    again = Tables(**tables.arrays(), skip_first=True)  # type: ignore[arg-type]
    assert all((a == b).all() for a, b in zip(rows(tables), rows(again), strict=True))
    assert (again.offsets == tables.offsets).all()
    assert sum(array.nbytes for array in tables.arrays().values()) < 50_000


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_native_model_has_exactly_our_counts(weights: list[int]) -> None:
    """Encode each entry alone: the interval of the first step is [scale * 256 C, scale * 256 (C + c))."""
    tables = Tables(counts_from_pmf(np.array(weights) / sum(weights))[0], [len(weights) + 1], [0])
    scale = (2**64 - 1) >> 24
    cumulative = np.concatenate([[0], np.cumsum(tables.counts)]).tolist()
    for entry in range(len(weights) + 1):
        encoder = stream.queue.RangeEncoder()
        encoder.encode(np.array([entry], dtype=np.int32), tables.models[0])
        words, (lower, span) = encoder.pos()
        assert span >> 32 * words == scale * 256 * (cumulative[entry + 1] - cumulative[entry])
        if words == 0:
            assert lower == scale * 256 * cumulative[entry]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_counts_from_pmf(weights: list[float]) -> None:
    total = sum(weights)
    if total < 1e-9:
        return
    pmf = np.array(weights) / max(total, 1.0)
    counts = counts_from_pmf(pmf)
    assert counts.shape == (1, len(weights) + 1)
    assert counts.sum() == TOTAL
    assert counts.min() >= 1
    share = np.append(pmf, max(1 - pmf.sum(), 0)) * (TOTAL - counts.size)
    assert np.abs(counts[0] - 1 - share).max() <= 1 + 1e-6


def test_rows_of_a_pmf_are_independent() -> None:
    pmf = np.random.default_rng(0).dirichlet(np.ones(20), size=5) * 0.99
    assert (counts_from_pmf(pmf)[3] == counts_from_pmf(pmf[3])[0]).all()


@pytest.mark.parametrize("pmf", [[[0.0, 0.0]], [[-0.1, 0.5]], [[np.nan, 0.5]], [[0.7, 0.7]], np.zeros((1, 70000))])
def test_bad_pmf_is_refused(pmf: ArrayLike) -> None:
    with pytest.raises(ValueError, match="pmf"):
        counts_from_pmf(pmf)


def test_too_many_values_for_the_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        counts_from_pmf(np.full((1, TOTAL), 1 / TOTAL))


@pytest.mark.parametrize(
    ("counts", "lengths", "offsets", "message"),
    [
        ([65535, 1], [2], [0, 0], "1 lengths, 2 offsets"),
        ([], [], [], "row of integers|need 1"),
        ([65536], [1], [0], "2 to 16384 entries"),
        ([65535, 1], [3], [0], "2 counts for lengths of 3"),
        ([65536, 0], [2], [0], "every count"),
        ([65537, -1], [2], [0], "every count"),
        ([65535, 2], [2], [0], "table 0 sum to 65537"),
        ([65535, 1, 65534, 1], [2, 2], [0, 0], "table 1 sum to 65535"),
        ([65535, 1], [2], [1], "hold the value 0"),
        ([65535, 1], [2], [-1], "hold the value 0"),
        ([65535.0, 1.0], [2], [0], "row of integers"),
        ([[65535, 1]], [2], [0], "row of integers"),
    ],
)
def test_bad_tables_are_refused(counts: ArrayLike, lengths: ArrayLike, offsets: ArrayLike, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tables(counts, lengths, offsets)
