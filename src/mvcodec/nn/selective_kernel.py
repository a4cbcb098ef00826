"""Selective kernel module, SKM (SKNet, Li et al. 2019; Q and K of Eq. (7)). No batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv


class SelectiveKernel(Block):
    """3x3 and 5x5 branches weighed per channel by a softmax over the branches. [B, C, H, W] -> same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 6, 8)
        self.conv3 = Conv(channels, channels, 3)
        self.conv5 = Conv(channels, channels, 5)
        self.squeeze = Conv(channels, squeezed, 1)
        self.select = Conv(squeezed, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.arithmetic
        small, large = self.conv3(x), self.conv5(x)
        pooled = a.mean(a.add(small, large))
        logits = self.select(a.relu(self.squeeze(pooled)))  # [B, 2C, 1, 1]
        return a.select(logits.unflatten(1, (2, -1)), torch.stack([small, large], dim=1))
