"""The quantiser's dead zone: a symbol of one that is not worth its bits becomes zero, in training as in use.

    symbol = 0  if |y - mu| < 1/2 + ACCEPTED * b(sigma) / WORTH,  else round(y - mu);   b = log2 P(0) - log2 P(1)

One instead of zero takes 2 |y - mu| - 1 off the squared error in units of the quantiser's step, and costs b bits; a bit
is worth (ln 2 / 6) of a step squared where rate is high (Sullivan, "Efficient scalar quantization of exponential and
Laplacian random variables", 1996, has the optimum for one variable alone). Here a zero also tells later symbols to
expect little, so only a part of that is accepted. The decoder knows nothing of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mvcodec.nn.hyperprior import gaussian_likelihood

ACCEPTED = 0.2
WORTH = 2 * 6 / math.log(2)  # bits that two steps squared are worth


def threshold(ln_sigma: Tensor) -> Tensor:
    """Of |y - mu|, under which a symbol is zero: from 1/2 at large sigma to 0.69. Same shape."""
    zero, one = (gaussian_likelihood(torch.full_like(ln_sigma, k), ln_sigma) for k in (0.0, 1.0))
    return 0.5 + ACCEPTED / WORTH * torch.log2(zero / one).clamp(min=0)


def rounded(residual: Tensor, zone: Tensor) -> Tensor:
    """residual y - mu in quantiser steps, zone its `threshold` -> integers, as floating point."""
    return torch.where(residual.abs() < zone, 0.0, residual.round())
