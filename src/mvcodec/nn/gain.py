"""One model for all rates: per-channel gains, log-linear between quality knots.

Asymmetric gain units (Cui et al., CVPR 2021): y is multiplied by gain(t) before quantisation and y_hat by its own
inverse gain(t) after, t in [0, 1] continuous, both learned at `knots` points and interpolated in the log domain.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# lambda of loss = bpp + lambda * 255^2 * MSE at t = 0 and t = 1, geometric in between.
LAMBDA_RANGE = (0.00023, 0.07)


def rate_distortion_lambda(t: Tensor) -> Tensor:
    """lambda(t) in CompressAI's 255^2 convention (Eq. (6) divides the paper's by 255^2). t [..] in [0, 1]."""
    low, high = LAMBDA_RANGE
    return low * (high / low) ** t


def hat_basis(t: Tensor, knots: int) -> Tensor:
    """t [B] in [0, 1] -> [B, knots]: weights of linear interpolation between equally spaced knots.

    Uses only + - * and clamp, so that every machine computes the same float64 bits.
    """
    position = t[:, None] * (knots - 1)
    knot = torch.arange(knots, device=t.device, dtype=t.dtype)
    return (1 - (position - knot).abs()).clamp(min=0)


class QualityGain(nn.Module):
    """log gain of each channel at each knot; starts at the high-rate optimum of an orthonormal transform.

    A step of Delta = sqrt(26 / (lambda 255^2)) minimises rate + lambda 255^2 MSE of an orthonormal transform of RGB in
    [0, 1] at high rate, so gain = 1 / Delta.
    """

    def __init__(self, channels: int, knots: int) -> None:
        super().__init__()
        lambdas = rate_distortion_lambda(torch.linspace(0, 1, knots, dtype=torch.float64))
        start = 0.5 * torch.log(lambdas * 255**2 / 26)
        self.log_gain = nn.Parameter(start.float()[:, None].repeat(1, channels))
        self.log_inverse = nn.Parameter(-start.float()[:, None].repeat(1, channels))

    def gain(self, basis: Tensor) -> Tensor:
        """basis [B, knots] -> gain [B, C, 1, 1]."""
        return _exp(basis, self.log_gain)

    def inverse(self, basis: Tensor) -> Tensor:
        """basis [B, knots] -> inverse gain [B, C, 1, 1]."""
        return _exp(basis, self.log_inverse)


def _exp(basis: Tensor, logarithms: Tensor) -> Tensor:
    """basis [B, knots], logarithms [knots, C] -> [B, C, 1, 1].

    In float32 even under autocast, where training runs: half a per cent of a coefficient can be several steps.
    """
    with torch.autocast(basis.device.type, enabled=False):
        return torch.exp(basis @ logarithms)[:, :, None, None]


def log_gain_reference(t: float) -> float:
    """ln(1 / Delta(t)) of the untrained gain: the entropy model's quality-dependent prior of ln sigma."""
    low, high = LAMBDA_RANGE
    return 0.5 * (math.log(low * 255**2 / 26) + t * math.log(high / low))


# The same for the exact path, where no logarithm may be computed: at t = 0 and t = 1, in units of 2^-16.
LN_GAIN = (-18121, 169252)


def exact_log_gain(t: float) -> float:
    """`log_gain_reference` of a quality as headers store it (a multiple of 1 / 10000), on a grid of 2^-16."""
    hundredths = round(t * 10000)
    first, last = LN_GAIN
    return ((first * (10000 - hundredths) + last * hundredths) // 10000) / 65536
