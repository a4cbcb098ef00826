"""What two cameras may see of a still scene at all: along a line. Flow across it is coding noise.

    flow both ways, where it returns home --reweighted eight-point algorithm (Hartley 1997)--> b' F a = 0
    flow, F --> distance from each pixel's epipolar line, less what of it is smooth --> a pull for the flow's solver

Smooth is what lenses and rolling shutters bend. Far from the line is what moves: it is left alone. A camera that only
turns leaves F undetermined, and any F that its flow obeys is as good.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.graphs import Code
from mvcodec.nn.filters import enlarge
from mvcodec.nn.warping import farthest, pixel_grid, sample

SPACING = 8  # of the points that F is found from, in pixels
ROUNDS = 10
WIDE, NARROW = 4.0, 0.3  # pixels: an outlier's distance from its line in the first round and in the last
MOVING = 2.0  # pixels from the line beyond which a pixel is left alone
BEND = 2  # points: what bends lines is smooth over about so many either way, and twice that
FEWEST = 50  # points, for nine numbers
NOWHERE = 1e6  # pixels: an offset that no flow is drawn to


class Pull(NamedTuple):
    """Where the targets of a flow [2, 2, h, w] (a -> b, b -> a) lie from their epipolar lines."""

    normal: Tensor  # [2, 2, h, w], unit length
    distance: Tensor  # [2, 1, h, w] pixels along the normal
    trust: Tensor  # [2, 1, h, w] in [0, 1]


class Lines(NamedTuple):
    """A pixel's line in the other view: normal . flow + offset = 0. Both are smooth, so few points are enough."""

    points: Tensor  # [2, 3, H / SPACING, W / SPACING]: normal, offset

    def at(self, flow: Tensor, rows: slice, columns: slice, ways: slice) -> Pull:
        """For a tile of the flow, of both ways or one."""
        # one point more on either side, to interpolate between
        near = [slice(max(part.start // SPACING - 1, 0), -(-part.stop // SPACING) + 1) for part in (rows, columns)]
        smooth = enlarge(self.points[ways, :, near[0], near[1]], SPACING)
        top, left = rows.start - SPACING * near[0].start, columns.start - SPACING * near[1].start
        smooth = smooth[..., top : top + flow.shape[-2], left : left + flow.shape[-1]]
        normal = smooth[:, :2]
        distance = (normal * flow).sum(1, keepdim=True).add_(smooth[:, 2:])
        return Pull(normal, distance, (distance / MOVING).square_().neg_().exp_())


def least_direction(_: int, like: Tensor, products: Tensor) -> Tensor:
    """As `like` [3, 3]: what is nearest to orthogonal to all that were multiplied and summed to products [9, 9].

    On a processor: nothing for a GPU, whose solver is slow to begin.
    """
    _, vectors = torch.linalg.eigh(products.cpu())
    return vectors[:, 0].view(3, 3).to(like)


def epipolar_lines(flow: Tensor, least: Code = least_direction) -> Lines:
    """Lines of a pair of views from its flow [2, 2, H, W] (a -> b, b -> a); far away if there is too little to go by.

    H and W are multiples of SPACING.
    """
    height, width = flow.shape[-2:]
    first = SPACING // 2 - 1  # points stand in the middle of cells, between pixels, as `interpolate` has it
    thin = F.avg_pool2d(flow[..., first:, first:], 2, SPACING)
    here = SPACING * pixel_grid(thin.shape[-2], thin.shape[-1], flow) + first + 0.5
    there = here + thin
    home = sample(flow.flip(0), there) + thin
    limit = farthest(height, width, there)
    inside = ((there >= 0) & (there <= limit)).all(1, keepdim=True)
    weight = torch.exp(-home.norm(dim=1, keepdim=True)) * inside

    scale = max(height, width) / 2
    start, end = (_homogeneous((points.expand_as(there) - limit / 2) / scale) for points in (here, there))
    a, b = torch.cat((start[0], end[1])), torch.cat((end[0], start[1]))
    matrix = _fundamental(a, b, weight.flatten().double(), scale, least)
    # the lines of b's pixels in a are those of the transposed matrix
    line = torch.stack((start[0] @ matrix.T, start[1] @ matrix)).mT.unflatten(-1, thin.shape[-2:]).to(flow)
    length = line[:, :2].norm(dim=1, keepdim=True).clamp_min(1e-6)
    normal = line[:, :2] / length
    offset = (normal * (here - limit / 2)).sum(1, keepdim=True) + scale * line[:, 2:] / length
    distance = (normal * thin).sum(1, keepdim=True) + offset
    still = weight * torch.exp(-((distance / (MOVING / 2)) ** 2))
    bent = _wide(torch.cat((still * distance, still), 1))
    offset = offset - bent[:, :1] / (bent[:, 1:] + 0.02)
    offset = torch.where((weight > 0.3).sum() < FEWEST, NOWHERE, offset)
    return Lines(torch.cat((normal, offset), 1))


def _homogeneous(points: Tensor) -> Tensor:
    """[2, 2, h, w] -> [2, h w, 3]"""
    flat = points.flatten(2).mT.double()
    return torch.cat((flat, torch.ones_like(flat[..., :1])), -1)


def _wide(x: Tensor) -> Tensor:
    for _ in range(2):
        x = F.avg_pool2d(x, 2 * BEND + 1, stride=1, padding=BEND, count_include_pad=False)
    return x


def _fundamental(a: Tensor, b: Tensor, weight: Tensor, scale: float, least: Code) -> Tensor:
    """3x3 with b' F a = 0 for most of the points [n, 3], weights [n]; least Sampson distance, outliers fade out."""
    # points along rows, contiguous: a product with their weights is then one pass
    a, b = a.T.contiguous(), b.T.contiguous()
    equations = (b[:, None] * a).flatten(0, 1)
    current = weight
    for n in range(ROUNDS):
        products = (equations * current) @ equations.T
        matrix = least(n, products[:3, :3], products)
        to_b, to_a = matrix @ a, matrix.T @ b
        slope = (to_b[:2].square().sum(0) + to_a[:2].square().sum(0)).clamp_min(1e-12)
        distance = scale * (b * to_b).sum(0) / slope.sqrt()
        limit = WIDE * (NARROW / WIDE) ** (n / (ROUNDS - 1))
        current = weight / (1 + (distance / limit) ** 2) / slope * slope.mean()
    return matrix
