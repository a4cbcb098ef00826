"""The highest quality whose file stays within a budget, by bisection over the quality scale. No torch."""

from __future__ import annotations

from collections.abc import Callable

from mvcodec.errors import MvcodecError

STEPS = 1000  # of the scale 0 .. 100: a tenth of a quality moves the size by about 0.3 %
CLOSE_ENOUGH = 0.99  # of the budget


def encode_within(encode: Callable[[float], bytes], budget_bytes: int) -> tuple[bytes, float]:
    """Encode at the highest quality that gives at most `budget_bytes`; -> (file, quality).

    Every candidate is a real file, so the promise holds exactly; about eight encodings are made. Stops early
    within one per cent under the budget. Raises MvcodecError where even quality 0 is too large.
    """
    best: tuple[bytes, float] | None = None
    low, high = -1, STEPS + 1  # low fits, high does not; both outside the scale until tried
    candidate = STEPS // 2
    while high - low > 1:
        quality = 100 * candidate / STEPS
        data = encode(quality)
        if len(data) <= budget_bytes:
            best, low = (data, quality), candidate
            if len(data) >= CLOSE_ENOUGH * budget_bytes:
                break
        else:
            high = candidate
            if candidate == 0:
                raise MvcodecError(f"needs {len(data)} bytes at quality 0, the target is {budget_bytes}")
        candidate = 0 if low < 0 else STEPS if high > STEPS else (low + high) // 2
    assert best is not None  # the loop ends without one only by raising
    return best
