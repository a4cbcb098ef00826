"""Dense sub-pixel alignment between decoded views: no weights, any device, linear in the number of pairs.

    picture -> grey pyramid of flattened light, gradient histograms       once per view
    histograms, all cells against all -> mutual matches -> filled flow    1/16: any shift, some rotation
    propagation and one-cell search on histograms                         1/8: PatchMatch (Barnes 2009)
    the same once more, the side view bent as found                       1/8: histograms do not slant or shrink
    all of it once more where the pair is turned or zoomed                turning.py
    combined local-global flow, coarse to fine                            1/8 .. 1: Bruhn, Weickert (2005)
    epipolar lines of that flow draw its last steps                       1/2, 1: epipolar.py
    both directions -> round-trip error -> consistency in [0, 1]

Measured on WebP-decoded real pairs: warps better than OpenCV's DIS (medium) and reaches where that finds
nothing (shifts beyond about a tenth of the width), at 0.5 s of one core per ordered pair of 1024x832.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.nn.epipolar import Lines, Pull, epipolar_lines
from mvcodec.nn.turning import find_turn, turn_back, turn_of, turned_view, worth_turning
from mvcodec.nn.warping import pixel_grid, round_trip_error, sample
from mvcodec.tiling import spans

FINE = 3  # level (1 / 2^level of the size) where histograms hand over to grey values
MAX_CELLS = 5000  # of the all-to-all match: 5000^2 floats are 100 MB
WARPS = {
    3: 3,
    2: 3,
    1: 3,
    0: 1,
}  # linearisations per level; the single one at full size is worth 15 % of the gain
RELAXATIONS = 12
UNSURE = 0.2  # mean consistency at 1/8 below which all turns and zooms of a pair are tried
AS_SURE = 0.9  # times as consistent a turned pair must be: what is left to find is smoother, too
BLURS = 24  # of the flow that bends the side view, [1 2 1] each: 3.5 cells
CELLS = 1 << 16  # compared at once
TILE, GPU_TILE = (128, 2048), (2048, 2048)  # rows, columns: of a size for the cache; few, for a GPU
HALO = 20  # what one linearisation reaches: 12 relaxations, filters, median
SMOOTHNESS = 4.0
SHARP = 1  # level whose last linearisation, and those of finer levels, are drawn to the epipolar lines
EPIPOLAR = 8.0  # how strongly, in the units of the products of gradients
ROBUST = 14.0  # differences of local-contrast units (20 = one deviation) beyond which a pixel loses its say
CONTRAST_FLOOR = 5.0  # of 255; keeps coding noise on walls and sky from being taken for texture
NEIGHBOURS = [(dx, dy) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dx, dy) != (0, 0)]


class Sight(NamedTuple):
    """One view and where its peers show the same: entry n belongs to view `peers[n]`, in order of index."""

    peers: list[int]
    flow: Tensor  # [S, 2, H, W] pixels, as in warping.py
    consistency: Tensor  # [S, 1, H, W] in [0, 1]: exp(-round-trip error in pixels), 0 where nothing matches


class _View(NamedTuple):
    """What is computed once per view; level n has 1 / 2^n of the padded picture's size."""

    luma: Tensor  # [1, 1, H, W], of 255
    quarter: Tensor  # the same at level 2
    grey: dict[int, Tensor]  # levels 0 .. FINE: [1, 1, h, w], light flattened
    descriptor: dict[int, Tensor]  # levels FINE .. coarsest: [1, 72, h, w], unit length


class _Meeting(NamedTuple):
    """Views a and b as histograms see them."""

    flow: Tensor  # level FINE, [2, 2, h, w]; of b turned, if it is
    turn: Tensor | None  # how b is turned to look like a, as in turning.py
    overlap: Tensor  # [2], mean consistency


@torch.no_grad()
def sights(pictures: Tensor, max_peers: int | None = None) -> Iterator[Sight]:
    """Align the views [K, 3, H, W] in [0, 1], of any size: one after the other, each with its peers.

    max_peers: only the most consistent ones of each view, judged at 1/8; others are not aligned at all.
    A pair is aligned once, both ways. What waits for its turn are the ways back: at most K^2 / 4 of them.
    """
    views, _, height, width = pictures.shape
    with _exact(pictures):
        prepared = [_prepare(picture[None].float()) for picture in pictures]
        pairs, overlap = {}, torch.full((views, views), -1.0)
        for i in range(views):
            for j in range(i + 1, views):
                pairs[i, j] = _meet(prepared[i], prepared[j])
                overlap[i, j], overlap[j, i] = pairs[i, j].overlap.cpu()
    count = min(views - 1, views if max_peers is None else max_peers)
    chosen = [sorted(overlap[i].argsort(descending=True)[:count].tolist()) for i in range(views)]
    waiting: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i in range(views):
        found = []
        for j in chosen[i]:
            if (i, j) not in waiting:
                pair = (min(i, j), max(i, j))
                with _exact(pictures):
                    flow = _align_pair(prepared[pair[0]], prepared[pair[1]], pairs.pop(pair))[..., :height, :width]
                    consistency = _consistency(flow, flow.flip(0))
                for n, key in enumerate((pair, pair[::-1])):
                    if key == (i, j) or key[1] in chosen[key[0]]:
                        # a copy: a slice would keep the other way alive
                        waiting[key] = (flow[n].clone(), consistency[n].clone())
            found.append(waiting.pop((i, j)))
        empty = (pictures.new_zeros(0, 2, height, width), pictures.new_zeros(0, 1, height, width))
        flows, consistencies = (torch.stack(x) for x in zip(*found, strict=True)) if found else empty
        yield Sight(chosen[i], flows, consistencies)


def _exact(like: Tensor) -> torch.autocast:
    """Positions and products of differences have no room in bfloat16."""
    return torch.autocast(like.device.type, enabled=False)


def _consistency(flow: Tensor, back: Tensor) -> Tensor:
    """[N, 2, H, W] each -> [N, 1, H, W]"""
    return torch.exp(-round_trip_error(flow, back))


# --- once per view ---


def _prepare(picture: Tensor) -> _View:
    coarsest = FINE + 1
    while picture[0, 0].numel() > MAX_CELLS * 4**coarsest:
        coarsest += 1
    luma = 255 * (picture * picture.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    height, width = luma.shape[-2:]
    return _levels(F.pad(luma, (0, -width % 2**coarsest, 0, -height % 2**coarsest), mode="replicate"), coarsest)


def _levels(luma: Tensor, coarsest: int) -> _View:
    grey = {0: luma}
    for level in range(1, FINE + 1):
        grey[level] = F.avg_pool2d(blur(grey[level - 1]), 2)
    histograms = _orientations(grey[2])
    descriptor = {level: _describe(histograms, 2 ** (level - 2)) for level in range(FINE, coarsest + 1)}
    return _View(luma, grey[2], {level: _flatten_light(x) for level, x in grey.items()}, descriptor)


def _flatten_light(grey: Tensor) -> Tensor:
    """Local mean 0, contrast 20: exposure and shading differ between views, and faint texture counts too."""
    centred = grey - blur(blur(_mean(grey)))
    return 20 * centred / (blur(blur(_mean(centred * centred))) + CONTRAST_FLOOR**2).sqrt()


def _orientations(grey: Tensor) -> Tensor:
    """Gradient strength shared out over eight signed orientations, [N, 8, h, w]."""
    dx, dy = gradient(grey)
    angle = torch.arange(8, device=grey.device) * (torch.pi / 4)
    along = dx * angle.cos().view(1, -1, 1, 1) + dy * angle.sin().view(1, -1, 1, 1)
    return blur(along.clamp_min(0) ** 3 / (dx * dx + dy * dy + 1e-3))


def _describe(histograms: Tensor, cell: int) -> Tensor:
    """Histograms of 3x3 cells, normalised for contrast (Dalal, Triggs 2005): [N, 72, h/cell, w/cell]."""
    pooled = F.avg_pool2d(histograms, cell)
    height, width = pooled.shape[-2:]
    stacked = F.unfold(F.pad(pooled, (1, 1, 1, 1), mode="replicate"), 3).view(len(pooled), -1, height, width)
    return F.normalize(stacked.sqrt(), dim=1, eps=1e-3)


# --- once per pair; batch entry 0 is a -> b, entry 1 is b -> a, so flip(0) is the way back ---


def _meet(a: _View, b: _View) -> _Meeting:
    """Flow from histograms; of b turned and zoomed if that is what it takes."""
    upright = _meeting(a, b)
    if upright.overlap.mean() < UNSURE:
        turn = find_turn(a.luma, b.luma, lambda grey, cell: _describe(_orientations(grey), cell))
    else:
        there, back = upright.flow, upright.flow.flip(0)
        turn = turn_of(there[0], _consistency(there, back)[0, 0], 2**FINE)
    if turn is None or not worth_turning(turn):
        return upright
    turned = _meeting(a, _turned(b, turn), turn)
    return turned if turned.overlap.mean() > AS_SURE * upright.overlap.mean() else upright


def _meeting(a: _View, b: _View, turn: Tensor | None = None) -> _Meeting:
    coarsest = max(a.descriptor)
    flow = _match_globally(a.descriptor[coarsest], b.descriptor[coarsest])
    for level in range(coarsest - 1, FINE - 1, -1):
        cells = torch.cat((a.descriptor[level], b.descriptor[level]))
        flow = _propagate(cells, cells.flip(0), _double(flow))
    second = _look_again(a, b, flow)
    before, after = (_mean(_mean(_consistency(x, x.flip(0)))) for x in (flow, second))
    flow = torch.where(after >= before, second, flow)  # where little is right, bending by it makes it worse
    return _Meeting(flow, turn, _consistency(flow, flow.flip(0)).mean((1, 2, 3)))


def _turned(view: _View, turn: Tensor) -> _View:
    return _levels(turned_view(view.luma, turn), max(view.descriptor))


def _look_again(a: _View, b: _View, flow: Tensor) -> Tensor:
    """Propagation on the side view bent by the flow, smoothed: slanted and shrunk surfaces look alike then."""
    weight = torch.exp(-0.5 * round_trip_error(flow, flow.flip(0)))
    bend, weight = _fill(flow, weight), weight + 0.02
    total = bend * weight
    for _ in range(BLURS):
        total, weight = blur(total), blur(weight)
    bend = total / weight
    fine = _double(bend)  # as the quarters
    side = sample(torch.cat((b.quarter, a.quarter)), pixel_grid(fine.shape[-2], fine.shape[-1], fine) + fine)
    main = torch.cat((a.descriptor[FINE], b.descriptor[FINE]))
    rest = _propagate(main, _describe(_orientations(side), 2 ** (FINE - 2)), flow - bend)
    return rest + sample(bend, pixel_grid(rest.shape[-2], rest.shape[-1], rest) + rest)


def _align_pair(a: _View, b: _View, meeting: _Meeting) -> Tensor:
    """Flow at full padded size, [2, 2, H, W]."""
    start, turn, _ = meeting
    if turn is not None:
        b = _turned(b, turn)
    flow = _fill(start, torch.exp(-0.5 * round_trip_error(start, start.flip(0))))
    for level, warps in WARPS.items():
        if level < FINE:
            flow = _double(flow)
        grey = torch.cat((a.grey[level], b.grey[level]))
        for n in range(warps):
            lines = epipolar_lines(flow) if level <= SHARP and n == warps - 1 else None
            flow = _improve(grey, grey.flip(0), flow, lines)
    return flow if turn is None else turn_back(flow, turn)


def _double(flow: Tensor) -> Tensor:
    """The same flow on a grid of half the spacing."""
    return 2 * F.interpolate(flow, scale_factor=2, mode="bilinear", align_corners=False)


def _match_globally(a: Tensor, b: Tensor) -> Tensor:
    """Every cell's best match in the other view where it is mutual, the rest filled: [2, 2, h, w]."""
    height, width = a.shape[-2:]
    cells = height * width
    similarity = a.flatten(2)[0].T @ b.flatten(2)[0]
    similarity = _consensus(similarity.view(height, width, height, width)).view(cells, cells)
    to_b, to_a = similarity.max(dim=1).indices, similarity.max(dim=0).indices
    flow = torch.stack([_displacement(match, width) for match in (to_b, to_a)])  # [2, 2, cells]
    home = torch.stack([_displacement(back[match], width) for match, back in ((to_b, to_a), (to_a, to_b))])
    mutual = home.abs().amax(dim=1, keepdim=True) <= 1
    flow = flow.view(2, 2, height, width).to(a.dtype)
    return _fill(flow, _vote(flow, mutual.view(2, 1, height, width).to(a.dtype)))


def _displacement(target: Tensor, width: int) -> Tensor:
    """From each cell to the cell it names: [2, cells]."""
    here = torch.arange(target.numel(), device=target.device)
    return torch.stack((target % width - here % width, target // width - here // width))


def _consensus(similarity: Tensor) -> Tensor:
    """Sum over a 3x3 neighbourhood moving in both views at once (Rocco et al. 2018)."""
    height, width = similarity.shape[:2]
    total = similarity.clone()
    for dx, dy in NEIGHBOURS:
        to_y, to_x = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
        from_y, from_x = slice(max(-dy, 0), height + min(-dy, 0)), slice(max(-dx, 0), width + min(-dx, 0))
        total[to_y, to_x, to_y, to_x] += similarity[from_y, from_x, from_y, from_x]
    return total


def _vote(flow: Tensor, weight: Tensor) -> Tensor:
    """Weights of matches, lower the further they are from their neighbours' weighted mean."""
    for _ in range(3):
        mean = _mean(_mean(flow * weight)) / (_mean(_mean(weight)) + 1e-6)
        weight = weight / (1 + (flow - mean).square().sum(1, keepdim=True) / 2)
    return weight


def _fill(flow: Tensor, weight: Tensor) -> Tensor:
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


def _propagate(main: Tensor, side: Tensor, flow: Tensor) -> Tensor:
    """Each cell tries the flows of cells 3, 2, 1 away, and steps around its own; the best match stays."""
    grid = pixel_grid(flow.shape[-2], flow.shape[-1], flow)
    here, there = (x.permute(0, 2, 3, 1).flatten(0, 2).contiguous() for x in (main, side))

    def score(candidate: Tensor) -> Tensor:
        # what `sample` does, with an index and a weight for all 72 channels together
        corners = zip(here.split(CELLS), *(x.split(CELLS) for x in _corners(grid + candidate)), strict=True)
        found = [(own * F.embedding_bag(i, there, per_sample_weights=w, mode="sum")).sum(1) for own, i, w in corners]
        return _mean(torch.cat(found).view_as(candidate[:, :1]))

    best = score(flow)
    for reach, step in ((3, 1.0), (2, 1.0), (1, 0.5)):
        for dx, dy in NEIGHBOURS:
            flow, best = _better(flow, best, torch.roll(flow, (dy * reach, dx * reach), dims=(-2, -1)), score)
        for dx, dy in NEIGHBOURS:
            flow, best = _better(flow, best, flow + flow.new_tensor([dx, dy]).view(1, 2, 1, 1) * step, score)
    return _median(flow)


def _corners(position: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each position [N, 2, h, w] and their bilinear weights, [N h w, 4] each."""
    views, _, height, width = position.shape
    x, y = position[:, 0].clamp(0, width - 1), position[:, 1].clamp(0, height - 1)
    left, top = x.floor(), y.floor()
    right_share, low_share = x - left, y - top
    view = torch.arange(views, device=position.device).view(-1, 1, 1) * (height * width)
    corner = view + top.long() * width + left.long()
    right, below = (left < width - 1).long(), (top < height - 1).long() * width
    index = torch.stack((corner, corner + right, corner + below, corner + below + right), -1)
    low, high = torch.stack((1 - right_share, right_share), -1), torch.stack((1 - low_share, low_share), -1)
    return index.view(-1, 4), (high[..., :, None] * low[..., None, :]).reshape(-1, 4)


def _better(flow, best, candidate, score):  # type: ignore[no-untyped-def]
    new = score(candidate)
    return torch.where(new > best, candidate, flow), torch.maximum(new, best)


def _improve(main: Tensor, side: Tensor, flow: Tensor, lines: Lines | None) -> Tensor:
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
    dx, dy = (side.mul_(1 / 4) for side in _differences(both))  # mean of both pictures' central differences
    tx, ty = trust * dx, trust.mul_(dy)
    products = torch.cat((tx * dx, tx * dy, ty * dy, tx.mul_(dt), ty.mul_(dt)), 1)
    for dim in (-1, -2):  # blur, blur, and blur two pixels apart
        for reach in (1, 1, 2):
            products = _smear(products, dim, reach)
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

    fx, fy = _differences(flow)
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
    around = _around(smooth).reciprocal_()
    gain, cross = gain.mul_(around), cross.mul_(around)
    lowest, highest = start - 2 * smooth, start + 2 * smooth
    weighted = start
    for _ in range(RELAXATIONS):
        neighbours = _around(weighted)
        weighted = torch.addcmul(rest, gain, neighbours).addcmul_(cross, neighbours.flip(1), value=-1)
        weighted = torch.clamp(weighted, lowest, highest, out=weighted)
    return _median(weighted.div_(smooth))


# --- small filters: slices, many times faster than pooling or depthwise convolution on CPU; the border is repeated ---


def _pairs(x: Tensor, dim: int, reach: int, sign: int) -> Tensor:
    """x[i + reach] + sign x[i - reach]."""
    length = x.shape[dim]
    inner = length - 2 * reach
    if inner <= 0:
        before, _, after = _shifts(x, dim, reach)
        return after + before if sign > 0 else after - before
    out = torch.empty_like(x)
    for place, after, before in (
        (out.narrow(dim, reach, inner), x.narrow(dim, 2 * reach, inner), x.narrow(dim, 0, inner)),
        (out.narrow(dim, 0, reach), x.narrow(dim, reach, reach), x.narrow(dim, 0, 1)),
        (out.narrow(dim, length - reach, reach), x.narrow(dim, length - 1, 1), x.narrow(dim, inner, reach)),
    ):
        torch.add(after, before, alpha=sign, out=place)
    return out


def _smear(x: Tensor, dim: int, reach: int = 1) -> Tensor:
    """[1 2 1], `reach` pixels apart."""
    return _pairs(x, dim, reach, 1).add_(x, alpha=2)


def _around(x: Tensor) -> Tensor:
    """Sum over 3x3."""
    for dim in (-1, -2):
        x = _pairs(x, dim, 1, 1).add_(x)
    return x


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[i + 1] - x[i - 1] along rows and along columns."""
    return _pairs(x, -1, 1, -1), _pairs(x, -2, 1, -1)


def _shifts(x: Tensor, dim: int, reach: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return x[i - reach], x[i], x[i + reach] along the last (-1) or last but one (-2) dimension."""
    padded = F.pad(x, (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach), mode="replicate")
    return padded.narrow(dim, 0, x.shape[dim]), x, padded.narrow(dim, 2 * reach, x.shape[dim])


def _mean(x: Tensor) -> Tensor:
    """3x3 mean."""
    return _around(x).mul_(1 / 9)


def blur(x: Tensor) -> Tensor:
    """[1 2 1] / 4 both ways."""
    return _smear(_smear(x, -1), -2).mul_(1 / 16)


def _median(x: Tensor) -> Tensor:
    """Median of three along rows, then along columns."""
    for dim in (-1, -2):
        before, here, after = _shifts(x, dim)
        low, high = torch.minimum(before, here), torch.maximum(before, here)
        x = torch.minimum(high, after, out=high).maximum(low)
    return x


def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences d/dx, d/dy."""
    along, down = _differences(x)
    return along.div_(2), down.div_(2)
