"""Why no back end can lose a bit: bounds on the sums of a convolution, from its integer weights alone.

A float format holds every integer up to 2^24 (float32) or 2^53 (float64). If no partial sum of a convolution can be
larger, in whatever order a kernel adds and whatever threads do, then no addition rounds and all orders agree. Random
inputs cannot show this (an excess is too rare); the bound can, and the input that attains it can be constructed.
Bias and rounding constant are part of the bound. On CUDA float64 serves all layers: there, kernels may not be what
they seem.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT32_BOUND = 1 << 24
FLOAT64_BOUND = 1 << 53
HALF_LIMIT = 128  # |high half|, |low half| of a 16-bit activation: a = 256 high + low


class Backend(str, Enum):
    """How a convolution is computed exactly."""

    FLOAT32 = "float32"  # one float32 convolution
    SPLIT = "split"  # two: of the inputs' high and low bytes
    FLOAT64 = "float64"  # one float64 convolution


def largest_sum(weight: NDArray[Any], stride: int = 1, transposed: bool = False) -> NDArray[np.int64]:
    """Sum of |integer weights| behind one output, per output channel.

    weight: [out, in, k, k], or [in, out, k, k] if transposed: there an output meets every `stride`-th tap only.
    """
    magnitude = np.abs(weight.astype(np.int64))
    if not transposed:
        dense: NDArray[np.int64] = magnitude.sum(axis=(1, 2, 3))
        return dense
    phases = [magnitude[:, :, i::stride, j::stride].sum(axis=(0, 2, 3)) for i in range(stride) for j in range(stride)]
    found: NDArray[np.int64] = np.max(phases, axis=0)
    return found


def choose_backend(
    sums: NDArray[np.int64], bias: NDArray[np.int64], input_limit: int, fraction_bits: NDArray[np.int64]
) -> Backend | None:
    """The cheapest back end whose bound holds in every output channel, None if there is none.

    sums: of |weights| (`largest_sum`); bias: integers on the accumulator's grid, which has `fraction_bits` below one
    unit of activation; input_limit: the largest |input|.
    """
    half = np.left_shift(1, np.maximum(fraction_bits, 1)) // 2  # the rounding constant travels with the bias
    offset = np.abs(bias) + half
    whole = input_limit * sums + offset
    if whole.max() < FLOAT32_BOUND:
        return Backend.FLOAT32
    # The bias is divided among the halves as the input is: multiples of 256 to one, the rest to the other.
    high = HALF_LIMIT * sums + offset // 256 + 1
    low = HALF_LIMIT * sums + 256
    if input_limit <= 32767 and max(high.max(), low.max()) < FLOAT32_BOUND:
        return Backend.SPLIT
    return Backend.FLOAT64 if whole.max() < FLOAT64_BOUND else None
