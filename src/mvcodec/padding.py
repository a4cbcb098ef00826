"""What lies beyond a picture's edge, where the codec's grid goes on: cheap to code, and seen by nobody.

A decoder cuts it off, so only what it costs and what it does to the picture's own latents count.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcodec.latents import LATENT_STRIDE

Pixels = NDArray[Any]  # unsigned integers [H, W] or [H, W, 3]


def extended(pixels: Pixels, below: int, right: int) -> Pixels:
    """Pixels, and so many rows and columns more: the last one, smoothed further with every pixel outwards.

    Replicated as it is, its detail would go on as stripes, and be coded in all latents that hold an edge.
    """
    if right:
        columns = _fading(pixels[:, -1], right).swapaxes(0, 1)
        pixels = np.concatenate((pixels, columns), axis=1)
    if below:
        pixels = np.concatenate((pixels, _fading(pixels[-1], below)), axis=0)
    return pixels


def _fading(edge: Pixels, count: int) -> Pixels:
    """Line d = 1 .. count beyond an edge [n] or [n, 3]: the mean of its 2 d + 1 nearest samples -> [count, n, ..]."""
    n = len(edge)
    sums = np.concatenate((np.zeros_like(edge[:1], dtype=np.int64), edge.cumsum(axis=0, dtype=np.int64)))
    reach = np.arange(1, count + 1)[:, None]
    first, stop = (np.arange(n) - reach).clip(min=0), (np.arange(n) + reach + 1).clip(max=n)
    size = (stop - first).reshape(count, n, *[1] * (edge.ndim - 1))
    lines: Pixels = ((sums[stop] - sums[first] + size // 2) // size).astype(edge.dtype)
    return lines


def shown(size: tuple[int, int], y: Tensor) -> Tensor | None:
    """Of latents y [.., h, w], which hold any of a picture of this height and width, or of the line beyond: 1, else 0.

    The line beyond, because synthesis takes pixels beside a latent's border from both sides. [1, 1, h, w], None if all
    do.
    """
    rows, columns = (min(side // LATENT_STRIDE + 1, n) for side, n in zip(size, y.shape[-2:], strict=True))
    if (rows, columns) == y.shape[-2:]:
        return None
    mask = torch.zeros(1, 1, *y.shape[-2:])
    mask[..., :rows, :columns] = 1
    return mask
