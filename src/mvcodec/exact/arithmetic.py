"""FLOAT and FIXED: the operations of the entropy model's blocks, in real and in fixed-point numbers.

FLOAT is what one would write anyway; networks are trained with it and it is the oracle of the tests. FIXED does the
same on integers (units in fixed.py). A block asks for `self.arithmetic`, which `use` sets for a whole network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.exact import fixed
from mvcodec.exact.fixed import ACTIVATION_UNIT, WEIGHT_ONE

if TYPE_CHECKING:
    from mvcodec.exact.conv import ExactConvolution

LEAKY_SLOPE = 2.0**-3  # a power of two


class Float:
    """Real numbers, any float type."""

    def enter(self, x: Tensor) -> Tensor:
        """A quantity from outside (z_hat, y_hat / unit) as an activation."""
        return x

    def convolve(self, layer: ExactConvolution, x: Tensor) -> Tensor:
        return layer.convolve_float(x)

    def convolve_last(self, layer: ExactConvolution, x: Tensor) -> Tensor:
        """A convolution whose result leaves the network: real numbers, not rounded."""
        return layer.convolve_float(x)

    def leaky(self, x: Tensor) -> Tensor:
        """x must be a fresh tensor."""
        return F.leaky_relu(x, LEAKY_SLOPE) if torch.is_grad_enabled() else F.leaky_relu_(x, LEAKY_SLOPE)

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def scale(self, x: Tensor, gain: Tensor) -> Tensor:
        """x [.., C, H, W] times a parameter [C, 1, 1]."""
        return x * gain

    def mean(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        return x.mean(dim=(2, 3), keepdim=True)

    def select(self, logits: Tensor, choices: Tensor) -> Tensor:
        """Sum of choices [N, S, C, H, W] weighed by the softmax over S of logits [N, S, C, 1, 1]."""
        return (logits.softmax(dim=1) * choices).sum(dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """softmax(scale Q K^T) V: [B, P, C], [B, R, C], [B, R, D] -> [B, P, D]."""
        weight = ((query * scale) @ key.transpose(1, 2)).softmax(dim=-1)
        return weight.to(value.dtype) @ value

    def attend_both_ways(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """`attend`, and its consistency C_u = sum_j M_{v->u}[i,j] M_{u->v}[j,i] [B, P, 1] (Eq. (8)-(11))."""
        match = (query * scale) @ key.transpose(1, 2)
        forward, backward = match.softmax(dim=-1), match.softmax(dim=-2)
        return forward.to(value.dtype) @ value, (forward * backward).sum(dim=-1, keepdim=True)

    def widened(self, x: Tensor) -> Tensor:
        """As `attend_neighbours` wants keys and values, before each is copied to all its neighbours."""
        return x

    def attend_neighbours(self, query: Tensor, keys: Tensor, near: Tensor, position: Tensor) -> Tensor:
        """query [B, C, ..], keys and values [B, S, C, ..], position [S, 1, 1] -> [B, S, C, ..]: every value times its
        softmax weight times S. keys and near are `widened` and fresh."""
        products = (query[:, None] * keys).sum(dim=2)
        weights = (products * query.shape[1] ** -0.5 + position).softmax(dim=1) * keys.shape[1]
        weighted: Tensor = near * weights[:, :, None].to(near.dtype)
        return weighted

    def certain(self, like: Tensor) -> Tensor:
        """A consistency of 1 everywhere."""
        return torch.ones_like(like)

    def both(self, consistency: Tensor, other: Tensor) -> Tensor:
        """Product of two consistencies."""
        return consistency * other

    def blend(self, consistency: Tensor, features: Tensor) -> Tensor:
        """Eq. (15): features [S, N, C, H, W] weighed by the softmax over S of consistency [S, N, 1, H, W]."""
        return (consistency.softmax(dim=0).to(features.dtype) * features).sum(dim=0)


class Fixed:
    """Activations are integers of ACTIVATION_UNIT in float32; sums of products of two activations are float64.

    exp_table: [EXP_LENGTH] float64 integers from the weights file.
    """

    def __init__(self, exp_table: Tensor) -> None:
        self.exp_table = exp_table

    def enter(self, x: Tensor) -> Tensor:
        return fixed.to_activation(x)

    def convolve(self, layer: ExactConvolution, x: Tensor) -> Tensor:
        return layer.convolve_fixed(x)

    def convolve_last(self, layer: ExactConvolution, x: Tensor) -> Tensor:
        return layer.accumulate(x) / ACTIVATION_UNIT

    def leaky(self, x: Tensor) -> Tensor:
        # Rounded, not floored: half a unit less in every negative activation would add up over a layer's inputs.
        return fixed.round_half_up(F.leaky_relu(x, LEAKY_SLOPE) if x.requires_grad else F.leaky_relu_(x, LEAKY_SLOPE))

    def relu(self, x: Tensor) -> Tensor:
        return x.relu()

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return fixed.saturate(x + y)

    def scale(self, x: Tensor, gain: Tensor) -> Tensor:
        return fixed.saturate(fixed.round_half_up(x * gain.double())).float()

    def mean(self, x: Tensor) -> Tensor:
        total = x.double().sum(dim=(2, 3), keepdim=True)
        return fixed.divide(total, torch.full_like(total, x.shape[2] * x.shape[3])).float()

    def select(self, logits: Tensor, choices: Tensor) -> Tensor:
        # Weights of 8 bits: their products with activations are exact in float32.
        share = self._softmax(logits.double() / ACTIVATION_UNIT, dim=1)
        first = fixed.round_half_up(share[:, 0] * (256 / WEIGHT_ONE)).float()
        blend = first * choices[:, 0] + (256 - first) * choices[:, 1]
        return fixed.round_half_up(blend * (1 / 256))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        match = query.double() @ key.double().mT
        weight = fixed.exp_below_maximum(match, self.exp_table, dim=-1, unit=_score_unit(scale))
        return fixed.divide(weight @ value.double(), weight.sum(dim=-1, keepdim=True)).float()

    def attend_both_ways(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        match, unit = query.double() @ key.double().mT, _score_unit(scale)
        forward = fixed.exp_below_maximum(match, self.exp_table, dim=-1, unit=unit)
        total = forward.sum(dim=-1, keepdim=True)
        feature = fixed.divide(forward @ value.double(), total)
        backward = fixed.exp_below_maximum(match, self.exp_table, dim=-2, unit=unit)
        share = fixed.divide(torch.full_like(total.mT, WEIGHT_ONE**2), backward.sum(dim=-2, keepdim=True))
        both = (forward * backward) @ share.mT  # sums below 2^51
        return feature.float(), fixed.divide(both * (1 / WEIGHT_ONE), total).float()

    def widened(self, x: Tensor) -> Tensor:
        return x.double()

    def attend_neighbours(self, query: Tensor, keys: Tensor, near: Tensor, position: Tensor) -> Tensor:
        wide_query = query.double()[:, None]
        products = (keys * wide_query if keys.requires_grad else keys.mul_(wide_query)).sum(dim=2)
        scores = products * _score_unit(query.shape[1] ** -0.5) + position.double()
        weights = self._softmax(scores, dim=1) * (keys.shape[1] / WEIGHT_ONE)
        spread = weights[:, :, None]
        weighted = fixed.round_half_up(
            near * spread if near.requires_grad or spread.requires_grad else near.mul_(spread)
        )
        return fixed.saturate(weighted.float())

    def certain(self, like: Tensor) -> Tensor:
        return torch.full_like(like, WEIGHT_ONE)

    def both(self, consistency: Tensor, other: Tensor) -> Tensor:
        return fixed.floor(consistency.double() * other.double() / WEIGHT_ONE).float()

    def blend(self, consistency: Tensor, features: Tensor) -> Tensor:
        weight = fixed.exp_below_maximum(consistency.double() / WEIGHT_ONE, self.exp_table, dim=0)
        total = features[0].double() * weight[0]
        for further, share in zip(features[1:], weight[1:], strict=True):  # a third of the time of one product and sum
            total.addcmul_(further.double(), share)
        return fixed.divide(total, weight.sum(dim=0)).float()

    def _softmax(self, scores: Tensor, dim: int) -> Tensor:
        """Integers out of WEIGHT_ONE, each rounded on its own."""
        weight = fixed.exp_below_maximum(scores, self.exp_table, dim)
        return fixed.divide(weight * WEIGHT_ONE, weight.sum(dim=dim, keepdim=True))


def _score_unit(scale: float) -> float:
    """What a product of two activations is worth as a score; scale (C^-1/2, say) is rounded to a fraction of 2^15."""
    return round(scale * WEIGHT_ONE) / (WEIGHT_ONE * ACTIVATION_UNIT**2)


Arithmetic = Float | Fixed
FLOAT = Float()


class Block(nn.Module):
    """A module whose forward is written in operations of its `arithmetic`."""

    arithmetic: Arithmetic = FLOAT


def use(arithmetic: Arithmetic, network: nn.Module) -> None:
    """Let every block of `network` count in `arithmetic`."""
    for module in network.modules():
        if isinstance(module, Block):
            module.arithmetic = arithmetic
