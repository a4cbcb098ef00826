"""Which cell of one view looks like which of another: gradient histograms, and what their best matches say together.

Batch entry 0 of a flow is a -> b, entry 1 is b -> a; flows are in cells.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.cores import beside
from mvcodec.nn.filters import blur, gradient, local_mean, median
from mvcodec.nn.warping import pixel_grid, sample

CELLS = 1 << 14  # compared at once: few long steps, between which threads wait for each other
ROWS = 4  # of cells, for the cache
NEIGHBOURS = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dx, dy) != (0, 0)]


def orientations(grey: Tensor) -> Tensor:
    """Gradient strength shared out over eight signed orientations, [N, 8, h, w]."""
    dx, dy = gradient(grey)
    angle = torch.arange(8, device=grey.device) * (torch.pi / 4)
    along = dx * angle.cos().view(1, -1, 1, 1) + dy * angle.sin().view(1, -1, 1, 1)
    return blur(along.clamp_min(0) ** 3 / (dx * dx + dy * dy + 1e-3))


def describe(histograms: Tensor, cell: int) -> Tensor:
    """Histograms of 3x3 cells, normalised for contrast (Dalal, Triggs 2005): [N, 72, h/cell, w/cell]."""
    pooled = F.avg_pool2d(histograms, cell)
    height, width = pooled.shape[-2:]
    stacked = F.unfold(F.pad(pooled, (1, 1, 1, 1), mode="replicate"), 3).view(len(pooled), -1, height, width)
    return F.normalize(stacked.sqrt(), dim=1, eps=1e-3)


def match_globally(a: Tensor, b: Tensor) -> Tensor:
    """Every cell's best match in the other view where it is mutual, the rest filled: [2, 2, h, w]."""
    height, width = a.shape[-2:]
    to_b, to_a = _best_matches(_consensus(a[0], b[0]))
    flow = torch.stack([_displacement(match, width) for match in (to_b, to_a)])  # [2, 2, cells]
    home = torch.stack([_displacement(back[match], width) for match, back in ((to_b, to_a), (to_a, to_b))])
    mutual = home.abs().amax(dim=1, keepdim=True) <= 1
    flow = flow.view(2, 2, height, width).to(a.dtype)
    return fill(flow, _vote(flow, mutual.view(2, 1, height, width).to(a.dtype)))


def _displacement(target: Tensor, width: int) -> Tensor:
    """From each cell to the cell it names: [2, cells]."""
    here = torch.arange(target.numel(), device=target.device)
    return torch.stack((target % width - here % width, target // width - here // width))


def _consensus(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of cells, summed over a 3x3 neighbourhood moving in both views at once (Rocco et al. 2018).

    a, b [C, h, w] -> [h, w, h, w]; a few rows at a time, for the cache.
    """
    height, width = a.shape[-2:]
    total = a.new_empty(height, width, height, width)
    rows = ROWS if a.device.type == "cpu" else height
    for top in range(0, height, rows):
        end = min(top + rows, height)
        first, last = max(top - 1, 0), min(end + 1, height)
        similarity = (a[:, first:last].flatten(1).T @ b.flatten(1)).view(last - first, width, height, width)
        along = similarity.clone()
        along[:, 1:, :, 1:] += similarity[:, :-1, :, :-1]
        along[:, :-1, :, :-1] += similarity[:, 1:, :, 1:]
        part = total[top:end].copy_(along[top - first : end - first])
        above, below = along[: end - 1 - first], along[top + 1 - first :]
        part[len(part) - len(above) :, :, 1:] += above[:, :, :-1]
        part[: len(below), :, :-1] += below[:, :, 1:]
    return total


def _best_matches(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Of cells [h, w, h, w]: to which of b each of a goes, and the way back; both [h w].

    First the row, then the place in it: looking for a maximum's place takes ten times as long as for its value.
    """
    height, width = similarity.shape[:2]
    cells = torch.arange(height * width, device=similarity.device)
    of_a, of_b = similarity.view(-1, height, width), similarity.view(height, width, -1)
    row = of_a.amax(2).argmax(1)
    to_b = row * width + of_a[cells, row].argmax(1)
    row = of_b.amax(1).argmax(0)
    return to_b, row * width + of_b[row, :, cells].argmax(1)


def _vote(flow: Tensor, weight: Tensor) -> Tensor:
    """Weights of matches, lower the further they are from their neighbours' weighted mean."""
    for _ in range(3):
        mean = local_mean(local_mean(flow * weight)) / (local_mean(local_mean(weight)) + 1e-6)
        weight = weight / (1 + (flow - mean).square().sum(1, keepdim=True) / 2)
    return weight


def fill(flow: Tensor, weight: Tensor) -> Tensor:
    """Where the weight is low, take the flow of ever wider surroundings (push-pull, Gortler et al. 1996)."""
    levels = [(flow * weight, weight)]
    while min(levels[-1][1].shape[-2:]) > 1:
        weighted, weight = levels[-1]
        levels.append((F.avg_pool2d(weighted, 2, ceil_mode=True), F.avg_pool2d(weight, 2, ceil_mode=True)))
    weighted, weight = levels.pop()
    filled = weighted / (weight + 1e-6)
    for weighted, weight in reversed(levels):
        below = F.interpolate(filled, size=weight.shape[-2:], mode="bilinear", align_corners=False)
        filled = (weighted + 0.05 * below) / (weight + 0.05)
    return filled


def propagate(main: Tensor, side: Tensor, flow: Tensor) -> Tensor:
    """Each cell tries the flows of cells 3, 2, 1 away, and steps around its own; the best match stays.

    Descriptors main, side [B, 72, h, w] and flow [B, 2, h, w], none of which meets the others.
    """
    if flow.is_cuda:  # few launches
        return _propagated(main, side, flow)
    ways = list(zip(*(x.split(1) for x in (main, side, flow)), strict=True))
    return torch.cat(beside(lambda way: _propagated(*way), ways, flow.device))


def _propagated(main: Tensor, side: Tensor, flow: Tensor) -> Tensor:
    grid = pixel_grid(flow.shape[-2], flow.shape[-1], flow)
    alike = _by_sampling(main, side) if flow.is_cuda else _by_rows(main, side)

    def score(candidate: Tensor) -> Tensor:
        return local_mean(alike(grid + candidate))

    best = score(flow)
    for reach, step in ((3, 1.0), (2, 1.0), (1, 0.5)):
        for dx, dy in NEIGHBOURS:
            flow, best = _better(flow, best, torch.roll(flow, (dy * reach, dx * reach), dims=(-2, -1)), score)
        for dx, dy in NEIGHBOURS:
            moved = torch.stack((flow[:, 0] + dx * step, flow[:, 1] + dy * step), 1)
            flow, best = _better(flow, best, moved, score)
    return median(flow)


def _by_sampling(main: Tensor, side: Tensor) -> Callable[[Tensor], Tensor]:
    """How much cells of `main` look like those of `side` at positions [N, 2, h, w] of it: [N, 1, h, w]."""
    return lambda position: sample(side, position).mul_(main).sum(1, keepdim=True)


def _by_rows(main: Tensor, side: Tensor) -> Callable[[Tensor], Tensor]:
    """The same on a processor: an index and a weight for all 72 channels of a cell together."""
    width = main.shape[-1]
    here, there = (x.permute(0, 2, 3, 1).flatten(0, 2).contiguous() for x in (main, side))
    there = F.pad(there, (0, 0, 0, width + 1))  # corners beyond the last row and column weigh nothing

    def alike(position: Tensor) -> Tensor:
        corners = zip(here.split(CELLS), *(x.split(CELLS) for x in _corners(position)), strict=True)
        found = [F.embedding_bag(i, there, per_sample_weights=w, mode="sum").mul_(own).sum(1) for own, i, w in corners]
        return torch.cat(found).view_as(position[:, :1])

    return alike


def _corners(position: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each position [N, 2, h, w] and their bilinear weights, [N h w, 4] each."""
    views, _, height, width = position.shape
    x, y = position[:, 0].clamp(0, width - 1), position[:, 1].clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    right_share, low_share = x.sub_(left).flatten(), y.sub_(top).flatten()
    view = torch.arange(views, device=position.device).view(-1, 1, 1) * (height * width)
    corner = (top.mul_(width).add_(left).long() + view).flatten()
    both = right_share * low_share
    right, low = right_share - both, low_share - both
    # one column after the other: a third of what stacking along the last dimension takes
    index, weight = corner.new_empty(len(corner), 4), both.new_empty(len(both), 4)
    for n, (step, share) in enumerate(((0, 1 - low_share - right), (1, right), (width, low), (width + 1, both))):
        index[:, n], weight[:, n] = corner + step, share
    return index, weight


def _better(flow, best, candidate, score):  # type: ignore[no-untyped-def]
    new = score(candidate)
    return torch.where(new > best, candidate, flow), torch.maximum(new, best)
