"""Small layers shared by every block.

What the entropy model uses is a `Block`: it counts in the arithmetic it is told to, real or fixed-point (exact/). So
it is made of convolutions, sums and a leaky slope that is a power of two; no normalisation layer, no GELU.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from mvcodec.exact.arithmetic import FLOAT, LEAKY_SLOPE, Block
from mvcodec.exact.conv import Conv

Layer = TypeVar("Layer", bound=nn.Module)
BRANCH_GAIN = 0.1  # Adam moves all 1,728 weights behind an output at once: a full-size branch overshoots the KLT start


def leaky(x: Tensor) -> Tensor:
    """LeakyReLU with slope 1/8. x must be a fresh tensor."""
    return FLOAT.leaky(x)


@torch.no_grad()
def start_at_unit_variance(module: nn.Module) -> None:
    """He initialisation of every convolution below, biases zero.

    torch's default shrinks activations by more than half per layer; behind ten layers Adam's steps then move the
    output of a zero-initialised last layer by a thousandth, and the entropy model takes an age to begin.
    """
    for layer in module.modules():
        if not isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        fan_in = layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        if isinstance(layer, nn.ConvTranspose2d):
            fan_in //= layer.stride[0] * layer.stride[1]
        nn.init.normal_(layer.weight, std=(2 / (1 + LEAKY_SLOPE**2) / fan_in) ** 0.5)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class ResidualBlock(Block):
    """RB: 3x3, LeakyReLU, 3x3, LeakyReLU, skip. [B, C_in, H, W] -> [B, C_out, H, W] (LDMIC's fusion network)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out, 3)
        self.conv2 = Conv(channels_out, channels_out, 3)
        self.skip = Conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.arithmetic
        return a.add(self.skip(x), a.leaky(self.conv2(a.leaky(self.conv1(x)))))


class DepthResidualBlock(Block):
    """DepthRB: 1x1, LeakyReLU, depthwise 3x3, LeakyReLU, 1x1, skip (MLIC's depth-wise residual bottleneck)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.expand = Conv(channels_in, channels_out, 1)
        self.depthwise = Conv(channels_out, channels_out, 3, groups=channels_out)
        self.project = Conv(channels_out, channels_out, 1)
        self.skip = Conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.arithmetic
        return a.add(self.skip(x), self.project(a.leaky(self.depthwise(a.leaky(self.expand(x))))))


class QualityBranch(nn.Module):
    """Residual branch with features of its own: 3x3 to `width`, scaled and shifted by quality, RB x depth, 3x3 back.

    The last convolution begins at zero; `scale` and BRANCH_GAIN as in QualityBlock. For the fine resolutions, whose
    few channels are too narrow a place to think in: one weight there serves every pixel of a block.
    """

    scale: Tensor

    def __init__(self, channels: int, width: int, depth: int, quality_knots: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.film = nn.Linear(quality_knots, 2 * width, bias=False)
        self.blocks = nn.Sequential(*(ResidualBlock(width, width) for _ in range(depth)))
        start_at_unit_variance(self)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.film.weight)

    def forward(self, x: Tensor, quality: Tensor, order: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], quality [B, knots] (hat weights of `gain.hat_basis`) -> [B, C, H, W].

        order [C]: where channels of x are among the layer's; only where the layer `folds`.
        """
        if folds(quality):
            enter, leave = _folded(self.enter, self.leave, self.film, self.scale, quality, order)
            features = self.blocks(leaky(substituted(self.enter, enter)(x)))
            return _add(substituted(self.leave, leave)(features), x)
        gain, shift = self.film(quality)[:, :, None, None].chunk(2, dim=1)
        features = self.blocks(leaky(self.enter(x / self.scale) * (1 + gain) + shift))
        return x + self.leave(features) * (BRANCH_GAIN * self.scale)


class QualityBlock(nn.Module):
    """Residual block 3x3, 3x3 whose hidden layer is scaled and shifted by the view's quality. Zero at the start.

    The second convolution begins at zero, so a stack of these leaves its input alone until trained: that is what lets
    the `fast` transforms start as the KLT codec. `scale` [C] brings channels of very different variance to unit size
    before the branch, and its output back; without it dense blocks diverge from the KLT start.
    """

    scale: Tensor

    def __init__(self, channels: int, hidden: int, quality_knots: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1)
        self.film = nn.Linear(quality_knots, 2 * hidden, bias=False)
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.film.weight)

    def forward(self, x: Tensor, quality: Tensor, order: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], quality [B, knots] (hat weights of `gain.hat_basis`) -> [B, C, H, W]; order: see above."""
        if folds(quality):
            first, second = _folded(self.conv1, self.conv2, self.film, self.scale, quality, order)
            return _add(substituted(self.conv2, second)(leaky(substituted(self.conv1, first)(x))), x)
        gain, shift = self.film(quality)[:, :, None, None].chunk(2, dim=1)
        hidden = leaky(self.conv1(x / self.scale) * (1 + gain) + shift)
        return x + self.conv2(hidden) * (BRANCH_GAIN * self.scale)


def folds(quality: Tensor) -> bool:
    """Whether layers compute with weights made for the quality at hand: in use, for one view's [1, knots]."""
    return len(quality) == 1 and not torch.is_grad_enabled()


def substituted(layer: Layer, parameters: Mapping[str, Tensor | None]) -> Layer:
    """A layer with other parameters. Unlike torch's `functional_call` it leaves the layer itself to other threads."""
    twin = copy.copy(layer)
    twin.__dict__["_parameters"] = dict(parameters)
    return twin


def _folded(
    first: nn.Conv2d, last: nn.Conv2d, film: nn.Linear, scale: Tensor, quality: Tensor, order: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters of a branch's first and last convolution for one quality, with all that is linear around them.

    What training writes as passes over whole maps (x / scale, FiLM, the way back, another order of channels) is
    nothing but other weights.
    """
    assert first.bias is not None
    assert last.bias is not None
    with torch.autocast(quality.device.type, enabled=False):
        gain, shift = film(quality)[0, :, None, None, None].chunk(2)  # [width, 1, 1, 1] each
        back = BRANCH_GAIN * scale[..., None]  # [C, 1, 1, 1]
        enter, leave, bias = first.weight / scale * (1 + gain), last.weight * back, last.bias * back.flatten()
        if order is not None:
            enter, leave, bias = enter[:, order], leave[order], bias[order]
        return (
            {"weight": enter, "bias": first.bias * (1 + gain).flatten() + shift.flatten()},
            {"weight": leave, "bias": bias},
        )


def _add(branch: Tensor, x: Tensor) -> Tensor:
    """x + branch in the precision of x. branch must be a fresh tensor."""
    return branch.to(x.dtype).add_(x)
