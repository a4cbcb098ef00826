"""A size target is met exactly or refused, never overshot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvcodec.errors import MvcodecError
from mvcodec.rate_control import encode_within


@given(
    smallest=st.integers(10, 1000),
    growth=st.floats(1.0, 1.06),
    budget=st.integers(1, 100_000),
    noise=st.integers(0, 3),
)
def test_result_is_at_or_under_the_budget(smallest: int, growth: float, budget: int, noise: int) -> None:
    tried: list[float] = []

    def encode(quality: float) -> bytes:
        tried.append(quality)
        return bytes(int(smallest * growth**quality) + noise * (len(tried) % 2))

    if smallest + noise <= budget:
        data, quality = encode_within(encode, budget)
        assert len(data) <= budget
        assert abs(len(data) - smallest * growth**quality) <= noise + 1
        assert len(data) >= 0.99 * budget or quality > 99.8 or smallest * growth ** (quality + 0.2) > budget - noise
    elif smallest > budget:
        with pytest.raises(MvcodecError, match="at quality 0"):
            encode_within(encode, budget)
        assert len(tried) == 2
    assert len(tried) <= 13


def test_a_generous_budget_gives_the_best_quality_at_once() -> None:
    tried: list[float] = []
    data, quality = encode_within(lambda q: tried.append(q) or bytes(int(q) + 1), 10_000)
    assert (len(data), quality, tried) == (101, 100.0, [50.0, 100.0])
