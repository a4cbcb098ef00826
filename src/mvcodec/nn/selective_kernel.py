"""Selective kernel module, SKM (SKNet, Li et al. 2019; Q and K of Eq. (7)). No batch normalisation."""

from __future__ import annotations

from torch import Tensor, nn


class SelectiveKernel(nn.Module):
    """3x3 and 5x5 branches weighed per channel by a softmax over the branches. [B, C, H, W] -> same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = max(channels // 6, 8)
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv5 = nn.Conv2d(channels, channels, 5, padding=2)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.select = nn.Conv2d(squeezed, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        small, large = self.conv3(x), self.conv5(x)
        pooled = (small + large).mean(dim=(2, 3), keepdim=True)
        logits = self.select(self.squeeze(pooled).relu())  # [B, 2C, 1, 1]
        weight = logits.unflatten(1, (2, -1)).softmax(dim=1)  # over the two branches
        return weight[:, 0] * small + weight[:, 1] * large
