"""Combined local-global flow (Bruhn, Weickert, Schnoerr 2005): a flow improved by the grey values around each pixel."""

from itertools import product

import torch
from torch import Tensor

from mvcodec.nn.epipolar import Lines, Pull
from mvcodec.nn.filters import differences, median, neighbour_sum, smear
from mvcodec.nn.warping import pixel_grid, sample
from mvcodec.tiling import spans

RELAXATIONS = 12
TILE, GPU_TILE = (128, 2048), (2048, 2048)  # rows, columns: of a size for the cache; few, for a GPU
HALO = 20  # what one linearisation reaches: 12 relaxations, filters, median
SMOOTHNESS = 4.0
EPIPOLAR = 8.0  # how strongly, in the units of the products of gradients
ROBUST = 14.0  # differences of local-contrast units (20 = one deviation) beyond which a pixel loses its say


def improve(main: Tensor, side: Tensor, flow: Tensor, lines: Lines | None) -> Tensor:
    """One linearisation, in tiles: they stay in the cache, and memory stays bounded."""
    height, width = flow.shape[-2:]
    down, across = TILE if flow.device.type == "cpu" else GPU_TILE
    improved = torch.empty_like(flow)
    for rows, columns in product(spans(height, down, HALO), spans(width, across, HALO)):
        seen = (..., rows.seen, columns.seen)
        part = flow[seen]
        here = pixel_grid(part.shape[-2], part.shape[-1], part, rows.seen.start, columns.seen.start)
        pull = None if lines is None else lines.at(part, rows.seen, columns.seen)
        found = _solve(main[seen], sample(side, here + part), part, pull)
        improved[..., rows.kept, columns.kept] = found[..., rows.inside, columns.inside]
    return improved


def _solve(main: Tensor, warped: Tensor, flow: Tensor, pull: Pull | None = None) -> Tensor:
    """One linearisation: min over d of d'S d + 2 b'd + smoothness |grad (flow + d)|, by Jacobi steps.

    S and b sum robust-weighted products of gradients over a window; the smoothness resembles total variation.
    """
    dt = warped - main
    trust = (dt * dt + ROBUST**2).rsqrt_()
    both = warped + main
    dx, dy = (side.mul_(1 / 4) for side in differences(both))  # mean of both pictures' central differences
    tx, ty = trust * dx, trust.mul_(dy)
    products = torch.cat((tx * dx, tx * dy, ty * dy, tx.mul_(dt), ty.mul_(dt)), 1)
    for dim in (-1, -2):  # blur, blur, and blur two pixels apart
        for reach in (1, 1, 2):
            products = smear(products, dim, reach)
    xx, xy, yy, xt, yt = products.mul_(4.0**-6).split(1, 1)
    if pull is not None:  # one more equation per pixel: normal . d + distance = 0
        nx, ny = pull.normal.split(1, 1)
        weight = EPIPOLAR * pull.trust
        along_x, along_y = weight * nx, weight * ny
        for total, a, b in (
            (xx, along_x, nx),
            (xy, along_x, ny),
            (yy, along_y, ny),
            (xt, along_x, pull.distance),
            (yt, along_y, pull.distance),
        ):
            total.addcmul_(a, b)

    fx, fy = differences(flow)
    steep = fx.square_().add_(fy.square_()).sum(1, keepdim=True)
    smooth = steep.mul_(1 / 4).add_(0.01).rsqrt_()  # low across motion edges
    pull_back = smooth * (2 * SMOOTHNESS)
    xx += pull_back
    yy += pull_back
    # With m the neighbours' mean of the new flow, weighed by `smooth`, and f the old flow, a step is
    #     new = f + clamp(P (m - f) - Q, +-2),     P = pull_back / D (yy -xy; -xy xx),     D = xx yy - xy xy.
    # All of it is multiplied by `smooth` beforehand, so that a step is two sums over neighbours and two products.
    weight = smooth / (xx * yy).addcmul_(xy, xy, value=-1)
    gain = torch.cat((yy, xx), 1) * (weight * pull_back)
    cross = xy * (weight * pull_back)
    start = flow * smooth
    rest = torch.cat(((xy * yt).addcmul_(yy, xt, value=-1), (xy * xt).addcmul_(xx, yt, value=-1)), 1).mul_(weight)
    rest.add_(start).addcmul_(gain, flow, value=-1).addcmul_(cross, flow.flip(1))
    around = neighbour_sum(smooth).reciprocal_()
    gain, cross = gain.mul_(around), cross.mul_(around)
    lowest, highest = start - 2 * smooth, start + 2 * smooth
    weighted = start
    for _ in range(RELAXATIONS):
        neighbours = neighbour_sum(weighted)
        weighted = torch.addcmul(rest, gain, neighbours).addcmul_(cross, neighbours.flip(1), value=-1)
        weighted = torch.clamp(weighted, lowest, highest, out=weighted)
    return median(weighted.div_(smooth))
