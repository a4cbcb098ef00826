"""A small network that steadies the flow between two decoded views: what coding noise moved by parts of a pixel.

    grey values, flow, way back --> normal equations, flow smoothed, at 1/4, each over three widths      35 maps
    dilated convolutions --> shares of the smoothed flows, a correction, how much detail is kept         6 maps
    flow + (share) (mean over 4x4 - flow) + sum of shares (smoothed - mean) + correction

Learned from the flow found between the uncoded views (training/steadying.py). Windows whose size follows from what is
in them are Okutomi and Kanade's (1994); the solutions of the normal equations are Lucas and Kanade's (1981). Zero
start: an untrained network returns the flow it was given. Weights without it switch it off.
"""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.cores import beside
from mvcodec.nn.filters import blur, differences, enlarge
from mvcodec.nn.warping import sample_along
from mvcodec.tiling import Span, spans

CELL = 4
WINDOWS = (1, 4, 16)  # blurs of the normal equations of 4x4 cells
SMOOTHED = (1, 3, 12)  # blurs of the flow
MAPS = 5 * len(WINDOWS) + 2 * len(SMOOTHED) + 14
DILATIONS = (1, 2, 4, 2, 1)
TILE = 1024  # pixels a side; the maps at full size would otherwise cost 70 bytes a pixel (tiling.py counts tiles)
HALO = 120  # pixels, a multiple of CELL: 16 blurs, 11 cells of convolutions, interpolation
ROBUST = 14.0  # as in local_flow.py
FLOOR = 0.3  # in the units of the products of gradients


class Evidence(NamedTuple):
    """What is known of a flow [B, 2, H, W], at 1/4."""

    maps: Tensor  # [B, MAPS, H/4, W/4]
    mean: Tensor  # [B, 2, H/4, W/4], of the flow, weighted by consistency
    smoothed: Tensor  # [B, 2 len(SMOOTHED), H/4, W/4], less the mean


class SteadyFlow(nn.Module):
    """See the module's docstring."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(MAPS, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.last = nn.Conv2d(width, 1 + len(SMOOTHED) + 2, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, flow: Tensor, evidence: Evidence) -> Tensor:
        """[B, 2, H, W] pixels -> the same, steadied; H and W are multiples of 4. Autocast is for the convolutions."""
        # Channels last: dilated convolutions take half the time on a processor, and in bfloat16 a fifth.
        x = F.leaky_relu(self.first(evidence.maps.contiguous(memory_format=torch.channels_last)), 0.1, inplace=True)
        for conv in self.body:
            x = x + F.leaky_relu(conv(x), 0.1, inplace=True)
        coarse, shares, correction = self.last(x).float().split((1, len(SMOOTHED), 2), dim=1)
        for share, smoothed in zip(shares.split(1, 1), evidence.smoothed.split(2, 1), strict=True):
            correction = correction + share * smoothed
        coarse, mean, correction = _full(torch.cat((coarse, evidence.mean, correction), 1)).split((1, 2, 2), dim=1)
        return torch.lerp(flow, mean, coarse) + correction

    def steady(
        self,
        main: Tensor,
        side: Tensor,
        flow: Tensor,
        consistency: Tensor,
        quality: Tensor,
        at_once: int | None = None,
    ) -> Tensor:
        """Both ways of a pair, in tiles, on a processor no more than so many at a time.

        main, side: flattened grey values [2, 1, H, W]; flow [2, 2, H, W], of which each is the other's way back;
        consistency [2, 1, H, W]; quality [2, 2] in [0, 1], of main and side. H and W are multiples of 4.
        """
        height, width = flow.shape[-2:]
        steadied = torch.empty_like(flow)

        def steady_tile(tile: tuple[int, Span, Span]) -> None:
            n, rows, columns = tile
            one, other = slice(n, n + 1), slice(1 - n, 2 - n)
            seen = (..., rows.seen, columns.seen)
            part, first = flow[one][seen], (rows.seen.start, columns.seen.start)
            found = evidence(main[one][seen], side[one], part, flow[other], consistency[one][seen], quality[one], first)
            kept = (..., rows.kept, columns.kept)
            steadied[one][kept] = self(part, found)[..., rows.inside, columns.inside]

        tiles = product(range(len(flow)), spans(height, TILE, HALO), spans(width, TILE, HALO))
        beside(steady_tile, list(tiles), flow.device, at_once)
        return steadied


@torch.no_grad()
def evidence(
    main: Tensor,
    side: Tensor,
    flow: Tensor,
    back: Tensor,
    consistency: Tensor,
    quality: Tensor,
    first: tuple[int, int] = (0, 0),
) -> Evidence:
    """What the network sees of flow [B, 2, h, w]; main and consistency are of its size, whose corner `first` tells.

    side [B, 1, H, W] and the way back [B, 2, H, W] are whole.
    """
    warped = sample_along(side, flow, "bilinear", *first)
    apart = warped - main
    trust = (apart * apart).add_(ROBUST**2).rsqrt_()
    dx, dy = (x.mul_(1 / 4) for x in differences(warped + main))
    tx, ty = trust * dx, trust.mul_(dy)
    products = torch.cat([_cells(x) for x in (tx * dx, tx * dy, ty * dy, tx.mul_(apart), ty.mul_(apart))], 1)
    maps: list[Tensor] = []
    for products_there in _blurred(products, WINDOWS):
        xx, xy, yy, xt, yt = products_there.split(1, 1)
        a, b, steep = xx + FLOOR, yy + FLOOR, xx + yy
        step = torch.cat((xy * yt - b * xt, xy * xt - a * yt), 1) / (a * b - xy * xy)
        maps += [step.clamp_(-2, 2), torch.log1p(steep) / 2, (xx - yy) / (steep + FLOOR), 2 * xy / (steep + FLOOR)]
    weight = _cells(consistency).add_(0.02)
    mean = _cells(flow * (consistency + 0.02)).div_(weight)
    weighted = _blurred(torch.cat((mean * weight, weight), 1), SMOOTHED)
    smoothed = [x[:, :2] / x[:, 2:] - mean for x in weighted]
    maps += [x.clamp(-3, 3) for x in smoothed]
    along, down = _full(mean).sub_(flow).square_().split(1, dim=1)
    detail = _cells(along + down).sqrt_().clamp_max_(3)
    astray = _cells(sample_along(back, flow, "bilinear", *first).add_(flow).clamp_(-2, 2))
    own, others = (x[:, :, None, None].expand_as(weight) for x in quality.split(1, 1))
    maps += [detail, weight - 0.02, astray, own, others - own]
    maps += [F.pixel_unshuffle(F.avg_pool2d(x, 2), 2) / 20 for x in (main, apart)]
    return Evidence(torch.cat(maps, 1), mean, torch.cat(smoothed, 1))


def _cells(x: Tensor) -> Tensor:
    """Means of 4x4: slices, as in filters.py, a third of what pooling takes on a processor."""
    rows = (x[..., 0::CELL, :] + x[..., 1::CELL, :]).add_(x[..., 2::CELL, :]).add_(x[..., 3::CELL, :])
    total = (rows[..., 0::CELL] + rows[..., 1::CELL]).add_(rows[..., 2::CELL]).add_(rows[..., 3::CELL])
    return total.mul_(1 / CELL**2)


def _full(x: Tensor) -> Tensor:
    return enlarge(x, CELL)


def _blurred(x: Tensor, times: tuple[int, ...]) -> list[Tensor]:
    """Blurred so many times altogether."""
    found = []
    for n in range(1, max(times) + 1):
        x = blur(x)
        if n in times:
            found.append(x)
    return found
