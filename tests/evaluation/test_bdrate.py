"""BD-rate is what its definition says, and silent about curves that cannot be compared."""

import numpy as np
import pytest

from mvcodec.errors import UsageError
from mvcodec.evaluation.bdrate import Curve, bd_rate

BPP = np.array([0.1, 0.2, 0.4, 0.8, 1.6])
DB = np.array([28.0, 31.0, 34.5, 37.0, 41.0])


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_curve_scaled_in_rate_differs_by_that_factor(factor):
    assert bd_rate(Curve(BPP, DB), Curve(factor * BPP, DB)) == pytest.approx(100 * (factor - 1), abs=1e-9)


def test_curves_may_be_sampled_elsewhere():
    # fidelity = 10 log2(rate): both curves lie on straight lines in log-rate, half the rate apart
    rates = np.geomspace(0.05, 2, 9)
    anchor = Curve(BPP, 10 * np.log2(BPP))
    assert bd_rate(anchor, Curve(rates / 2, 10 * np.log2(rates))) == pytest.approx(-50, abs=1e-6)


def test_better_fidelity_for_the_same_bits_is_fewer_bits():
    assert bd_rate(Curve(BPP, DB), Curve(BPP, DB + 0.5)) < 0 < bd_rate(Curve(BPP, DB), Curve(BPP, DB - 0.5))


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (Curve(BPP, DB + 20), "overlap over 0.00 dB"),
        (Curve(BPP, DB + 12.5), "overlap over 0.50 dB"),
        (Curve(BPP[:3], DB[:3]), "3 points"),
        (Curve(BPP, DB[[0, 2, 1, 3, 4]]), "does not rise"),
        (Curve(BPP[::-1], DB), "does not rise"),
        (Curve(BPP, [*DB[:4], np.nan]), "lacks values"),
    ],
)
def test_curves_that_say_nothing_are_refused(test, message):
    with pytest.raises(UsageError, match=message):
        bd_rate(Curve(BPP, DB), test)
