"""Generalised divisive normalisation, GDN (Balle et al., 2016), of the paper's transforms.

Own code and not CompressAI's, whose import takes five seconds; tests compare the two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.hyperprior import lower_bound

BETA_LEAST = 1e-6
PEDESTAL = 2.0**-36  # beta and gamma are learned as square roots; it keeps their gradient finite at zero


class GDN(nn.Module):
    """x / sqrt(beta + gamma x^2), gamma mixing the channels; inverse=True multiplies. [B, C, H, W] -> same shape."""

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(channels) + PEDESTAL).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(channels) + PEDESTAL).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        beta = lower_bound(self.beta, (BETA_LEAST + PEDESTAL) ** 0.5).square() - PEDESTAL
        gamma = lower_bound(self.gamma, PEDESTAL**0.5).square() - PEDESTAL
        norm = F.conv2d(x.square(), gamma[:, :, None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())
