"""Back into the quantiser's cells: a decoded picture, analysed again, must give about the integers it was decoded from.

    picture --g_a, gain--> y --less y_hat--> how far from the middle of its cell --learned curve--> astray
    picture - (the KLT's inverse of what is astray, gain undone)

    astray = slope apart + share (apart - clamp(apart, +-reach)),     apart = y - y_hat

The picture that was encoded lies in its cells, |y - y_hat| <= 1/2 for each coefficient: a convex set if g_a were
linear, and projection onto a convex set brings a picture nearer to every point of it (Zakhor, "Iterative procedures for
reduction of blocking effects in transform image coding", 1992). Coefficients near the border of their cell are mostly
wrong, so the cells are made narrower (Park and Kim, "Theory of projection onto the narrow quantization constraint set",
1999). How narrow, what share of the excess goes back, and how wrong what lies inside is, differ from channel to channel
and with quality: three numbers each, learned by stage `decoder` on lone views. No peer needs to be trusted for this: it
bounds what they may do. What peers have changed was drawn back before, and errs otherwise: the `plain` curve serves it.

Where the weights hold them, networks that know more of each coefficient than its channel follow the curve of lone
views, and take the plain one's place (coefficient_estimate.py; stage `cells`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.coefficient_estimate import REACH, CoefficientEstimate, Told
from mvcodec.nn.transforms import BLOCK, KltSynthesisCoarse

# The plain curve, where all channels begin: on training scenes the mean of y - y_hat, given where the decoded picture
# has its y, turns back from about REACH.
SHARE = (0.7, 1.15)  # of the excess, at quality 0 and 1


class QuantisationConstraint(nn.Module):
    """The curve of each channel at each quality knot, [knots, M] each; linear between knots."""

    def __init__(self, channels: int, knots: int) -> None:
        super().__init__()
        for name, values in _beginning(channels, knots).items():
            self.register_parameter(name, nn.Parameter(values))
        # Weights that hold them bring them along, as they do `AlignedRefinement.steady`.
        self.alone: CoefficientEstimate | None
        self.helped: CoefficientEstimate | None
        self.register_module("alone", None)
        self.register_module("helped", None)

    log_reach: Tensor
    share: Tensor
    slope: Tensor

    def forward(self, apart: Tensor, basis: Tensor, told: Told, quality: Tensor) -> Tensor:
        """What is astray in y [K, M, h, w] of decoded pictures that is `apart` from the y_hat they were decoded from.

        basis [K, knots]: of `gain.hat_basis`, for quality [K] in [0, 1].
        """
        astray = self.curve(apart, basis)
        return astray if self.alone is None else astray - self.alone(told, quality, apart - astray, apart)

    def curve(self, apart: Tensor, basis: Tensor) -> Tensor:
        """The same by the curve of each channel alone."""
        log_reach, share, slope = (
            (basis @ values)[:, :, None, None] for values in (self.log_reach, self.share, self.slope)
        )
        return slope * apart + share * _excess(apart, log_reach.exp())

    @staticmethod
    def plain(apart: Tensor, quality: Tensor) -> Tensor:
        """The same by the curve that all channels begin with, for what peers have changed; quality [K] in [0, 1]."""
        low, high = SHARE
        share = (low + (high - low) * quality)[:, None, None, None]
        return share * _excess(apart, REACH)

    def estimate(self, helped: bool) -> CoefficientEstimate:
        """The network for pictures that peers have helped, or for those of lone views; a new one if there is none."""
        found = self.helped if helped else self.alone
        if found is None:
            found = CoefficientEstimate(self.share.shape[1], helped).to(self.share.device)
            if helped:
                self.helped = found
            else:
                self.alone = found
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Older weights have all channels as they begin, and no networks."""
        if not any(name.startswith(prefix) for name in state_dict):
            knots, channels = self.share.shape
            found = _beginning(channels, knots)
            state_dict.update({f"{prefix}{name}": values for name, values in found.items()})
        for helped, part in enumerate(("alone", "helped")):
            if any(name.startswith(f"{prefix}{part}.") for name in state_dict):
                self.estimate(bool(helped))
            else:
                self.register_module(part, None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _excess(apart: Tensor, reach: Any) -> Tensor:
    """What is beyond reach, a number or [K, M, 1, 1]."""
    return apart - apart.clamp(-reach, reach)


def _beginning(channels: int, knots: int) -> dict[str, Tensor]:
    share = torch.linspace(*SHARE, knots)[:, None].repeat(1, channels)
    return {"log_reach": torch.full_like(share, REACH).log(), "share": share, "slope": torch.zeros_like(share)}


def correction(coarse: KltSynthesisCoarse, astray: Tensor, inverse_gain: Tensor) -> Tensor:
    """What to subtract from pictures [K, 3, 16 h, 16 w].

    astray: [K, M, h, w] in quantiser steps; inverse_gain [K, M, 1, 1].
    """
    blocks = F.conv2d(inverse_gain * astray, coarse.klt.weight)
    return F.pixel_shuffle(F.pixel_shuffle(blocks, 2), BLOCK)
