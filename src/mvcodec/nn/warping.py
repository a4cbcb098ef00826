"""Sampling a side view where a flow points, and asking whether two flows agree.

A flow is `[N, 2, H, W]` in pixels, (dx, dy): pixel (x, y) of the main view shows what the side view shows at
(x + dx, y + dy). Pixels are addressed by their centres (`align_corners=True`), so flow 0 is the identity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_grid(height: int, width: int, like: Tensor, top: int = 0, left: int = 0) -> Tensor:
    """Return x and y of every pixel of a tile, [1, 2, H, W]; its first one stands at (left, top)."""
    y, x = torch.meshgrid(
        torch.arange(top, top + height, device=like.device, dtype=like.dtype),
        torch.arange(left, left + width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack((x, y))[None]


def sample(picture: Tensor, position: Tensor, mode: str = "bilinear") -> Tensor:
    """Values of picture [N, C, H, W] at positions [N, 2, h, w] -> [N, C, h, w]; the border is repeated."""
    height, width = picture.shape[-2:]
    scale = position.new_tensor([2 / max(width - 1, 1), 2 / max(height - 1, 1)])
    grid = (position.permute(0, 2, 3, 1) * scale).sub_(1)
    return F.grid_sample(picture, grid, mode=mode, padding_mode="border", align_corners=True)


def warp(picture: Tensor, flow: Tensor, mode: str = "bicubic") -> Tensor:
    """The side picture [N, C, H, W] as the main view would see it.

    Bicubic by default: bilinear sampling at half pixels is a low-pass filter and eats what fusion could gain.
    """
    return sample(picture, pixel_grid(flow.shape[-2], flow.shape[-1], flow) + flow, mode)


def inside(flow: Tensor) -> Tensor:
    """[N, 1, H, W] bool: does the flow point into the side picture?"""
    height, width = flow.shape[-2:]
    position = pixel_grid(height, width, flow) + flow
    x, y = position[:, :1], position[:, 1:]
    return (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)


def round_trip_error(flow: Tensor, back: Tensor) -> Tensor:
    """How far from home a pixel lands after main -> side -> main, [N, 1, H, W]; inf outside the side."""
    dx, dy = warp(back, flow, "bilinear").add_(flow).square_().split(1, dim=1)  # `norm` is a hundred times slower
    return (dx + dy).sqrt_().masked_fill_(~inside(flow), float("inf"))
