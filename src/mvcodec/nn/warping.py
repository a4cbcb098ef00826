"""Sampling a side view where a flow points, and asking whether two flows agree.

A flow is `[N, 2, H, W]` in pixels, (dx, dy): pixel (x, y) of the main view shows what the side view shows at
(x + dx, y + dy). Pixels are addressed by their centres (`align_corners=True`), so flow 0 is the identity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BAND_PIXELS = 1 << 20
CACHED_PIXELS = 1 << 15  # of several maps that stay in a core's cache


def pixel_grid(height: int, width: int, like: Tensor, top: int = 0, left: int = 0) -> Tensor:
    """Return x and y of every pixel of a tile, [1, 2, H, W]; its first one stands at (left, top)."""
    y, x = torch.meshgrid(
        torch.arange(top, top + height, device=like.device, dtype=like.dtype),
        torch.arange(left, left + width, device=like.device, dtype=like.dtype),
        indexing="ij",
    )
    return torch.stack((x, y))[None]


def farthest(height: int, width: int, like: Tensor) -> Tensor:
    """Where the last pixel stands, [1, 2, 1, 1]; made where it is used, not brought there."""
    return torch.cat([like.new_full((1, 1, 1, 1), side - 1) for side in (width, height)], 1)


def sample(picture: Tensor, position: Tensor, mode: str = "bilinear") -> Tensor:
    """Values of picture [N, C, H, W] at positions [N, 2, h, w] -> [N, C, h, w]; the border is repeated."""
    grid = position.new_empty(len(position), *position.shape[-2:], 2)
    for n, axis in enumerate((-1, -2)):
        torch.mul(position[:, n], 2 / max(picture.shape[axis] - 1, 1), out=grid[..., n])
    grid.sub_(1)
    return F.grid_sample(picture, grid, mode=mode, padding_mode="border", align_corners=True)


def sample_along(picture: Tensor, flow: Tensor, mode: str = "bilinear", top: int = 0, left: int = 0) -> Tensor:
    """`sample` where a flow [N, 2, h, w] points from a tile whose first pixel stands at (left, top)."""
    grid = flow.new_empty(len(flow), *flow.shape[-2:], 2)
    for n, (axis, first) in enumerate(((-1, left), (-2, top))):
        scale = 2 / max(picture.shape[axis] - 1, 1)
        here = torch.arange(first, first + flow.shape[axis], device=flow.device, dtype=flow.dtype) * scale - 1
        torch.add(here if axis == -1 else here[:, None], flow[:, n], alpha=scale, out=grid[..., n])
    return F.grid_sample(picture, grid, mode=mode, padding_mode="border", align_corners=True)


def bands(like: Tensor, pixels: int = BAND_PIXELS) -> list[slice]:
    """Rows of a map [.., H, W] that are worked on at a time, so that memory is bounded."""
    height, width = like.shape[-2:]
    rows = max(1, pixels // width)
    return [slice(top, min(top + rows, height)) for top in range(0, height, rows)]


def warp(picture: Tensor, flow: Tensor, mode: str = "bicubic") -> Tensor:
    """The side picture [N, C, H, W] as the main view would see it.

    Bicubic by default: bilinear sampling at half pixels is a low-pass filter and eats what fusion could gain.
    """
    return _joined([sample_along(picture, flow[..., rows, :], mode, rows.start) for rows in bands(flow)])


def round_trip_error(flow: Tensor, back: Tensor) -> Tensor:
    """How far from home a pixel lands after main -> side -> main, [N, 1, H, W]; inf outside the side."""
    limit = farthest(flow.shape[-2], flow.shape[-1], flow)
    errors = []
    for rows in bands(flow):
        part, there = flow[..., rows, :], _targets(flow, rows)
        dx, dy = sample_along(back, part, top=rows.start).add_(part).square_().split(1, dim=1)
        outside = ((there < 0) | (there > limit)).any(1, keepdim=True)
        errors.append((dx + dy).sqrt_().masked_fill_(outside, float("inf")))  # `norm` is a hundred times slower
    return _joined(errors)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _targets(flow: Tensor, rows: slice) -> Tensor:
    """Where the flow of some rows points."""
    return pixel_grid(rows.stop - rows.start, flow.shape[-1], flow, rows.start) + flow[..., rows, :]
