"""Combined local-global flow (Bruhn, Weickert, Schnoerr 2005): a flow improved by the grey values around each pixel.

In tiles, so small that all maps of one stay in a core's cache, each with so much around it that what is computed at its
edges is of no account. Within a tile a map is therefore a row of numbers, [C, N], in which the neighbour below is a
tile's width away: each step is one pass over contiguous memory. Outside the picture its border is repeated.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.cores import beside
from mvcodec.nn.epipolar import Lines, Pull
from mvcodec.nn.warping import sample_along
from mvcodec.tiling import Span, spans

RELAXATIONS = 12
TILE, GPU_TILE = 256, 2048  # pixels a side; 176: a twentieth faster with one thread, half as slow again with two
HALO = 14  # relaxations, filters and the median reach 18; what lies beyond this moves no pixel by a hundredth
SMOOTHNESS = 4.0
EPIPOLAR = 8.0  # how strongly, in the units of the products of gradients
ROBUST = 14.0  # differences of local-contrast units (20 = one deviation) beyond which a pixel loses its say
MEANS = 4.0**-8  # of products of gradients, from smears of products of differences


def improve(main: Tensor, side: Tensor, flow: Tensor, lines: Lines | None) -> Tensor:
    """One linearisation of flows [B, 2, H, W] between grey values [B, 1, H, W]."""
    views, _, height, width = flow.shape
    together, most = (1, TILE) if flow.device.type == "cpu" else (views, GPU_TILE)
    improved = torch.empty_like(flow)
    tiles = list(product(_tiles(height, most), _tiles(width, most)))

    def improve_tile(tile: tuple[int, tuple[Span, Span]]) -> None:
        first, (rows, columns) = tile
        some = slice(first, first + together)
        seen, kept = ((some, slice(None), r, c) for r, c in ((rows.seen, columns.seen), (rows.kept, columns.kept)))
        part = flow[seen]
        warped = sample_along(side[some], part, top=rows.seen.start, left=columns.seen.start)
        pull = None if lines is None else lines.at(part, rows.seen, columns.seen, some)
        found = _solve(main[seen], warped, part, pull, _Edges.of(rows, columns))
        improved[kept] = found.transpose(0, 1)[..., HALO:-HALO, HALO:-HALO]

    beside(improve_tile, list(product(range(0, views, together), tiles)), flow.device)
    return improved


def _tiles(length: int, most: int) -> list[Span]:
    """Of one side, about equally long."""
    return list(spans(length, -(-length // -(-length // most)), HALO))


class _Edges(NamedTuple):
    """How many of the columns and rows around a tile lie outside the picture."""

    left: int
    right: int
    above: int
    below: int

    @staticmethod
    def of(rows: Span, columns: Span) -> "_Edges":
        (left, right), (above, below) = (
            (HALO - span.inside.start, HALO - (span.seen.stop - span.kept.stop)) for span in (columns, rows)
        )
        return _Edges(left, right, above, below)

    def extended(self, x: Tensor) -> Tensor:
        """What the picture has of a tile and its surroundings, [B, C, h, w] -> all of it, [C, B, h', w']."""
        return F.pad(x.transpose(0, 1), self, mode="replicate")

    def outside(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of x [.., h', w'] outside the picture, and the border beside each."""
        for dim, before, after in ((-1, self.left, self.right), (-2, self.above, self.below)):
            end = x.shape[dim] - after
            if before:
                yield x.narrow(dim, 0, before), x.narrow(dim, before, 1)
            if after:
                yield x.narrow(dim, end, after), x.narrow(dim, end - 1, 1)


def _solve(main: Tensor, warped: Tensor, flow: Tensor, pull: Pull | None, edges: _Edges) -> Tensor:
    """One linearisation: min over d of d'S d + 2 b'd + smoothness |grad (flow + d)|, by Jacobi steps.

    S and b sum robust-weighted products of gradients over a window; the smoothness resembles total variation.
    [B, C, h, w] -> [2, B, h', w'], whose outermost HALO means nothing.
    """
    extended = edges.extended(flow)
    shape, below = extended.shape[1:], extended.shape[-1]
    flow = extended.flatten(1)
    main, warped = (edges.extended(x).flatten(1) for x in (main, warped))
    apart = (warped - main).mul_(4)
    trust = (apart * apart).mul_(1 / (4 * MEANS) ** 2).add_((ROBUST / MEANS) ** 2).rsqrt_()
    both = warped.add_(main)
    dx, dy = _pairs(both, 1, -1), _pairs(both, below, -1)
    tx, ty = trust * dx, trust.mul_(dy)
    products = flow.new_empty(5, flow.shape[1])
    spare = torch.zeros_like(products)
    for row, a, b in zip(products.split(1), (tx, tx, ty, tx, ty), (dx, dy, dy, apart, apart), strict=True):
        torch.mul(a, b, out=row)
    for beyond, border in edges.outside(products.view(5, *shape)):
        beyond.copy_(border)
    for by in (1, below):  # blur, blur, and blur two pixels apart
        for reach in (1, 1, 2):
            products, spare = _pairs(products, by * reach, 1, spare).add_(products, alpha=2), products
    xx, xy, yy, xt, yt = products.split(1)
    if pull is not None:  # one more equation per pixel: normal . d + distance = 0
        normal, distance, sure = (edges.extended(x).flatten(1) for x in pull)
        nx, ny = normal.split(1)
        weight = EPIPOLAR * sure
        along_x, along_y = weight * nx, weight * ny
        for total, a, b in (
            (xx, along_x, nx),
            (xy, along_x, ny),
            (yy, along_y, ny),
            (xt, along_x, distance),
            (yt, along_y, distance),
        ):
            total.addcmul_(a, b)

    fx, fy = _pairs(flow, 1, -1), _pairs(flow, below, -1)
    steep = fx.square_().addcmul_(fy, fy).sum(0, keepdim=True)
    smooth = steep.mul_(1 / 4).add_(0.01).rsqrt_()  # low across motion edges
    pull_back = smooth * (2 * SMOOTHNESS)
    xx += pull_back
    yy += pull_back
    # With m the neighbours' mean of the new flow, weighed by `smooth`, and f the old flow, a step is
    #     new = f + clamp(P (m - f) - Q, +-2),     P = pull_back / D (yy -xy; -xy xx),     D = xx yy - xy xy.
    # All of it is multiplied by `smooth` beforehand, so that a step is two sums over neighbours and two products.
    for beyond, _ in edges.outside(smooth.view(shape)):
        beyond.zero_()  # and so is all that follows, there: what is outside has no say
    weight = (xx * yy).addcmul_(xy, xy, value=-1).reciprocal_().mul_(smooth)
    start = flow * smooth
    rest = torch.empty_like(flow)
    torch.mul(xy, yt, out=rest[:1]).addcmul_(yy, xt, value=-1)
    torch.mul(xy, xt, out=rest[1:]).addcmul_(xx, yt, value=-1)
    rest.mul_(weight).add_(start)
    weight.mul_(pull_back)
    gain, cross = torch.cat((yy, xx)).mul_(weight), weight.mul_(xy)
    rest.addcmul_(gain, flow, value=-1)
    rest[:1].addcmul_(cross, flow[1:])
    rest[1:].addcmul_(cross, flow[:1])
    sums = _Sums(smooth, below)
    around = sums.of_neighbours().clamp_min_(1e-6).reciprocal_()
    gain, cross = gain.mul_(around), cross.mul_(around)
    farthest = 2 * smooth
    lowest, highest = start - farthest, start + farthest
    weighted = start
    sums = _Sums(weighted, below)
    for _ in range(RELAXATIONS):
        neighbours = sums.of_neighbours()
        torch.addcmul(rest, gain, neighbours, out=weighted)
        weighted[:1].addcmul_(cross, neighbours[1:], value=-1)
        weighted[1:].addcmul_(cross, neighbours[:1], value=-1)
        torch.clamp(weighted, lowest, highest, out=weighted)
    flow = weighted.div_(smooth).view(2, *shape)
    for beyond, border in edges.outside(flow):
        beyond.copy_(border)
    return _median_(flow.flatten(1), below).view(2, *shape)


def _pairs(x: Tensor, by: int, sign: int, out: Tensor | None = None) -> Tensor:
    """x[i + by] + sign x[i - by]."""
    out = torch.zeros_like(x) if out is None else out
    torch.add(x[:, 2 * by :], x[:, : -2 * by], alpha=sign, out=out[:, by:-by])
    return out


class _Sums:
    """Sums over 3x3 of a map [C, N], again and again while it changes in its place."""

    def __init__(self, x: Tensor, below: int) -> None:
        along, both = torch.zeros(2, x.numel(), dtype=x.dtype, device=x.device)
        flat = x.view(-1)  # the ends of rows of numbers are outermost, too
        self.sums = both.view_as(x)
        self.steps = [
            (part[: -2 * by], part[by:-by], part[2 * by :], out[by:-by])
            for part, out, by in ((flat, along, 1), (along, both, below))
        ]

    def of_neighbours(self) -> Tensor:
        """In a tensor that the next call overwrites."""
        for before, here, after, out in self.steps:
            torch.add(before, after, out=out).add_(here)
        return self.sums


def _median_(x: Tensor, below: int) -> Tensor:
    """As in filters.py: what lies between its neighbours stays."""
    for by in (1, below):
        before, here, after = x[:, : -2 * by], x[:, by:-by], x[:, 2 * by :]
        low, high = torch.minimum(before, after), torch.maximum(before, after)
        torch.clamp(here, low, high, out=here)
    return x
