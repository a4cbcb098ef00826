"""Small filters of maps [N, C, H, W], border repeated: slices, on a CPU many times faster than pooling and the like."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _pairs(x: Tensor, dim: int, sign: int) -> Tensor:
    """x[i + 1] + sign x[i - 1]."""
    length = x.shape[dim]
    inner = length - 2
    if inner <= 0 or x.is_cuda:  # few launches
        before, _, after = _shifts(x, dim)
        return after + before if sign > 0 else after - before
    out = torch.empty_like(x)
    for place, after, before in (
        (out.narrow(dim, 1, inner), x.narrow(dim, 2, inner), x.narrow(dim, 0, inner)),
        (out.narrow(dim, 0, 1), x.narrow(dim, 1, 1), x.narrow(dim, 0, 1)),
        (out.narrow(dim, length - 1, 1), x.narrow(dim, length - 1, 1), x.narrow(dim, inner, 1)),
    ):
        torch.add(after, before, alpha=sign, out=place)
    return out


def smear(x: Tensor, dim: int) -> Tensor:
    """[1 2 1]."""
    return _pairs(x, dim, 1).add_(x, alpha=2)


def neighbour_sum(x: Tensor) -> Tensor:
    """Sum over 3x3."""
    for dim in (-1, -2):
        x = _pairs(x, dim, 1).add_(x)
    return x


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[i + 1] - x[i - 1] along rows and along columns."""
    return _pairs(x, -1, -1), _pairs(x, -2, -1)


def _shifts(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x[i - 1], x[i], x[i + 1] along the last (-1) or last but one (-2) dimension."""
    padded = F.pad(x, (1, 1, 0, 0) if dim == -1 else (0, 0, 1, 1), mode="replicate")
    return padded.narrow(dim, 0, x.shape[dim]), x, padded.narrow(dim, 2, x.shape[dim])


def local_mean(x: Tensor) -> Tensor:
    """3x3 mean."""
    if x.is_cuda:
        return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return neighbour_sum(x).mul_(1 / 9)


def blur(x: Tensor) -> Tensor:
    """[1 2 1] / 4 both ways."""
    if x.is_cuda:
        return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 2, 1), 2, 1)
    return smear(smear(x, -1), -2).mul_(1 / 16)


def median(x: Tensor) -> Tensor:
    """Median of three along rows, then along columns."""
    for dim in (-1, -2):
        before, here, after = _shifts(x, dim)
        x = here.clamp(torch.minimum(before, after), torch.maximum(before, after))
    return x


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences d/dx, d/dy."""
    along, down = differences(x)
    return along.div_(2), down.div_(2)


def enlarge(x: Tensor, times: int) -> Tensor:
    """Bilinear, an even number of times as large: `interpolate`, on a processor in a fifth of its time."""
    if x.is_cuda:
        return F.interpolate(x, scale_factor=times, mode="bilinear", align_corners=False)
    for dim in (-1, -2):
        before, here, after = _shifts(x, dim)
        shape = list(x.shape)
        shape[dim] *= times
        out = x.new_empty(shape)
        for n in range(times):
            share = (n + 0.5) / times
            near = torch.lerp(here, after, share - 0.5) if share > 0.5 else torch.lerp(before, here, share + 0.5)
            out.unflatten(dim, (-1, times)).select(dim, n).copy_(near)
        x = out
    return x
