"""Hyper transforms h_a, h_s and the factorised prior of z (Eq. (1), (2))."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv, ConvTranspose
from mvcodec.nn.layers import leaky, start_at_unit_variance

LIKELIHOOD_BOUND = 2.0**-16  # the smallest probability in the coder's tables
LN_SIGMA_BOUND = -2.3  # just under the coder's lowest scale, 0.11
HYPER_START = 4.0  # initial magnification of z: rounded to zero, it would carry nothing to learn from

Whole = TypeVar("Whole", int, Tensor)


class HyperAnalysis(nn.Module):
    """h_a: y [B, M, H, W] -> z [B, N, H/4, W/4]. Sees asinh(y): magnitudes of 1 and of 200 alike in range."""

    def __init__(self, latent_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(latent_channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 5, stride=2, padding=2)
        self.conv3 = nn.Conv2d(channels, channels, 5, stride=2, padding=2)
        start_at_unit_variance(self)
        with torch.no_grad():
            self.conv3.weight *= HYPER_START

    def forward(self, y: Tensor) -> Tensor:
        return self.conv3(leaky(self.conv2(leaky(self.conv1(asinh(y))))))


def asinh(x: Tensor) -> Tensor:
    """torch's takes five times as long on a processor: it goes from number to number."""
    if x.requires_grad:
        return torch.asinh(x)
    return (x * x).add_(1).sqrt_().add_(x.abs()).log_().copysign_(x)


class HyperSynthesis(Block):
    """h_s: z_hat [B, N, h, w] -> Phi_h [B, C_h, 4h, 4w]."""

    def __init__(self, channels: int, channels_out: int) -> None:
        super().__init__()
        middle = channels * 3 // 2
        self.deconv1 = ConvTranspose(channels, channels)
        self.deconv2 = ConvTranspose(channels, middle)
        self.conv3 = Conv(middle, channels_out, 3)
        start_at_unit_variance(self)

    def forward(self, z_hat: Tensor) -> Tensor:
        a = self.arithmetic
        return self.conv3(a.leaky(self.deconv2(a.leaky(self.deconv1(a.enter(z_hat))))))


class FactorizedPrior(nn.Module):
    """psi of Eq. (2): each channel of z is a mixture of three logistics, integrated over unit bins.

    Closed form, so its tables need no search for quantiles; the usual monotone network fits no better here. z grows
    with the quality it is made at: each of `bands` parts of the scale has mixtures of its own (`band_of`), and its
    channels come after those of the band below.
    """

    def __init__(self, channels: int, components: int = 3, bands: int = 1) -> None:
        super().__init__()
        self.bands = bands
        channels *= bands
        self.logit = nn.Parameter(torch.zeros(components, channels, 1, 1))
        self.mean = nn.Parameter(torch.linspace(-2, 2, components)[:, None, None, None].repeat(1, channels, 1, 1))
        self.ln_scale = nn.Parameter(torch.zeros(components, channels, 1, 1))

    def likelihood(self, z: Tensor, t: Tensor) -> Tensor:
        """z [B, N, h, w], noisy or integer, of quality t [B] -> probability of the unit bin around it, same shape."""
        logit, mean, ln_scale = (self._of_band(values, t) for values in (self.logit, self.mean, self.ln_scale))
        inverse = torch.exp(-ln_scale.clamp(-4, 6))
        distance = (z[:, None] - mean).abs()
        # Upper tail minus upper tail, on |z - mean|: no cancellation far from the mean.
        mass = torch.sigmoid((0.5 - distance) * inverse) - torch.sigmoid((-0.5 - distance) * inverse)
        return lower_bound((logit.softmax(dim=1) * mass).sum(dim=1), LIKELIHOOD_BOUND)

    def _of_band(self, values: Tensor, t: Tensor) -> Tensor:
        """[components, bands N, 1, 1] -> [B, components, N, 1, 1]."""
        band = band_of((10000 * t).round().long(), self.bands)
        return values.unflatten(1, (self.bands, -1))[:, band].transpose(0, 1)

    @torch.no_grad()
    def pmf(self, bound: int) -> Tensor:
        """[bands N, 2 bound + 1] float64 probabilities of the integers -bound .. bound."""
        values = torch.arange(-bound, bound + 1, dtype=torch.float64, device=self.mean.device)
        prior = FactorizedPrior(self.mean.shape[1], self.mean.shape[0]).to(self.mean.device).double()
        prior.load_state_dict(self.state_dict())
        grid = values[None, None, :, None].expand(1, self.mean.shape[1], -1, 1)
        return prior.likelihood(grid, values.new_zeros(1))[0, :, :, 0]


def band_of(quality: Whole, bands: int) -> Whole:
    """Of so many equally spaced qualities the nearest, counted from 0. quality: in hundredths, as in a header."""
    return (2 * (bands - 1) * quality + 10000) // 20000


def gaussian_likelihood(residual: Tensor, ln_sigma: Tensor) -> Tensor:
    """P of the unit bin around residual = y - mu under N(0, sigma) (Eq. (3)), bounded away from zero."""
    sigma = torch.exp(ln_sigma.clamp(max=6))
    distance = residual.abs()
    upper = torch.special.ndtr((0.5 - distance) / sigma)
    lower = torch.special.ndtr((-0.5 - distance) / sigma)
    return lower_bound(upper - lower, LIKELIHOOD_BOUND)


class _LowerBound(torch.autograd.Function):
    """max(x, bound); the gradient passes where it would raise x, so that nothing is stuck below the bound."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x >= bound)
        return x.clamp(min=bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return gradient * (above | (gradient < 0)), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) with the gradient of `_LowerBound` (Balle et al.'s lower bound, as in CompressAI)."""
    return _LowerBound.apply(x, bound)


def bits(likelihood: Tensor) -> Tensor:
    """Total -log2 p per sample: [B, ...] -> [B]."""
    return -torch.log2(likelihood).flatten(1).sum(dim=1)


def gaussian_bits(residual: Tensor, symbols: Tensor, ln_sigma: Tensor) -> Tensor:
    """Bits per sample of the symbols that residual = y - mu is rounded to (Eq. (3)): [B, ...] -> [B].

    The value is that of the symbols, which is what a file costs, and so is sigma's gradient. The residual's
    gradient is that of the usual noisy relaxation. Noise in the value too would charge 0.13 bit for a certain zero.
    """
    exact = symbol_bits(symbols, ln_sigma)
    relaxed = symbol_bits(noisy(residual), ln_sigma.detach())
    return exact + relaxed - relaxed.detach()


def symbol_bits(symbols: Tensor, ln_sigma: Tensor) -> Tensor:
    """What they cost under Gaussians of these scales (Eq. (3)): [B, ...] -> [B]."""
    return bits(gaussian_likelihood(symbols, lower_bound(ln_sigma, LN_SIGMA_BOUND)))


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """rounded, with the gradient of x."""
    return x + (rounded - x).detach()


def noisy(x: Tensor) -> Tensor:
    """x + U(-1/2, 1/2): the differentiable stand-in for rounding in the rate."""
    return x + torch.empty_like(x).uniform_(-0.5, 0.5)
