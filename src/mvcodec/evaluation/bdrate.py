"""Bjontegaard delta rate: the mean difference in rate of two codecs at equal fidelity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mvcodec.errors import UsageError

METHOD = "akima"  # piecewise, through every point: one bad point spoils no other (Herglotz et al. 2022)
MIN_POINTS = 4
MIN_OVERLAP = 0.25  # of the shorter curve's range of fidelity: a sliver says nothing about the whole


class Curve(NamedTuple):
    """Rate and fidelity of one codec at rising settings; bits per pixel, decibels."""

    bpp: Sequence[float]
    fidelity_db: Sequence[float]


def bd_rate(anchor: Curve, test: Curve) -> float:
    """Percent more bits (negative: fewer) that `test` needs than `anchor`, over the fidelity both reach.

    log-rate as a function of fidelity, `METHOD` interpolation, by the `bjontegaard` package. Raises UsageError where
    the curves say nothing about each other: too few points, not rising, or hardly overlapping.
    """
    for name, curve in (("anchor", anchor), ("test", test)):
        if len(curve.bpp) < MIN_POINTS:
            raise UsageError(f"the {name} curve has {len(curve.bpp)} points, BD-rate needs {MIN_POINTS}")
        if not np.isfinite([*curve.bpp, *curve.fidelity_db]).all():
            raise UsageError(f"the {name} curve lacks values")
        if not (np.diff(curve.bpp) > 0).all() or not (np.diff(curve.fidelity_db) > 0).all():
            raise UsageError(f"the {name} curve does not rise from point to point")
    low = max(min(c.fidelity_db) for c in (anchor, test))
    high = min(max(c.fidelity_db) for c in (anchor, test))
    shorter = min(max(c.fidelity_db) - min(c.fidelity_db) for c in (anchor, test))
    if high - low < MIN_OVERLAP * shorter:
        raise UsageError(
            f"the curves overlap over {max(0.0, high - low):.2f} dB only, BD-rate needs {MIN_OVERLAP:.0%} of a curve"
        )
    import bjontegaard  # late: it imports matplotlib

    return float(bjontegaard.bd_rate(*anchor, *test, method=METHOD, require_matching_points=False, min_overlap=0))
