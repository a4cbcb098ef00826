"""Numbers on grids: how the exact path rounds, saturates and exponentiates. All functions serve training, too."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ACTIVATION_UNIT = 256  # an activation of 1.0 is the integer 256
ACTIVATION_LIMIT = 32767  # and none is larger than this: 16 bits
PARAMETER_GRID = 1 << 16  # parameters that are not weights of a convolution are multiples of 1 / PARAMETER_GRID
WEIGHT_ONE = 1 << 15  # attention weights and consistencies: integers in units of 1 / WEIGHT_ONE
EXP_STEPS = 128  # the table of exp(-x) has so many entries per unit of x
EXP_LENGTH = 11 * EXP_STEPS  # exp(-11) is less than half of 1 / WEIGHT_ONE


def floor(x: Tensor) -> Tensor:
    """floor, in place where no gradient is wanted; else the gradient passes straight through."""
    if x.requires_grad:
        return x + (x.detach().floor() - x.detach())
    return x.floor_()


def saturate(x: Tensor) -> Tensor:
    """Clamp to the range of activations. Integers stay integers."""
    if x.requires_grad:
        return x.clamp(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    return x.clamp_(-ACTIVATION_LIMIT, ACTIVATION_LIMIT)


def to_activation(x: Tensor) -> Tensor:
    """Real numbers -> activations [float32 integers]. x must be a fresh tensor."""
    return saturate(round_half_up(x * ACTIVATION_UNIT)).float()


def round_half_up(x: Tensor) -> Tensor:
    """floor(x + 1/2). x must be a fresh tensor."""
    return floor(x + 0.5) if x.requires_grad else x.add_(0.5).floor_()


def exp_table() -> NDArray[np.int32]:
    """round(WEIGHT_ONE exp(-i / EXP_STEPS)). For export only: it calls exp; the weights file holds the integers."""
    table: NDArray[np.int32] = np.rint(WEIGHT_ONE * np.exp(-np.arange(EXP_LENGTH) / EXP_STEPS)).astype(np.int32)
    return table


def exp_below_maximum(scores: Tensor, table: Tensor, dim: int, unit: float = 1.0) -> Tensor:
    """exp(scores - max) as integers out of WEIGHT_ONE.

    scores: float64, in multiples of `unit`, a positive number of 16 bits at most, so that no product rounds; table:
    [EXP_LENGTH] float64 integers.
    """
    below = scores.amax(dim, keepdim=True) - scores
    below = below * (EXP_STEPS * unit) if below.requires_grad else below.mul_(EXP_STEPS * unit)
    # Conversion to integers truncates, and below >= 0.
    index = below.detach().int().clamp_(max=EXP_LENGTH - 1)
    values = table.index_select(0, index.flatten()).view_as(index)
    if scores.requires_grad:
        smooth = WEIGHT_ONE * torch.exp(-below / EXP_STEPS)
        return smooth + (values - smooth.detach())
    return values


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """|numerator| < 2^52, 1 <= denominator <= 2^28, |quotient| < 2^20, in float64 -> the quotient rounded half up.

    Of integers it is a multiple of 1/2 or at least 2^-29 away from one: float64's error of 2^-33 moves none across.
    """
    return round_half_up(numerator / denominator)
