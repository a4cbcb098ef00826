"""Dense sub-pixel alignment between decoded views: no weights but the last step's, any device, linear in the pairs.

    picture -> grey pyramid of flattened light, gradient histograms       once per view
    histograms, all cells against all -> mutual matches -> filled flow    1/16: any shift, some rotation; matching.py
    propagation and one-cell search on histograms                         1/8: PatchMatch (Barnes 2009)
    the same once more, the side view bent as found                       1/8: histograms do not slant or shrink
    all of it once more where the pair is turned or zoomed                turning.py
    combined local-global flow, coarse to fine                            1/8 .. 1: local_flow.py
    epipolar lines of that flow draw its last steps                       1/2, 1: epipolar.py
    both directions -> round-trip error -> consistency in [0, 1]
    a small network steadies what it knows to be noise                    1/4 of the size: steady_flow.py

Warps better than OpenCV's DIS (medium) on WebP-decoded real pairs, and reaches where that finds nothing (shifts beyond
about a tenth of the width). What it costs: docs/joint.md.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.cores import beside
from mvcodec.graphs import PLAIN, Code, Graphs
from mvcodec.nn.epipolar import epipolar_lines, least_direction
from mvcodec.nn.filters import blur, enlarge, local_mean
from mvcodec.nn.local_flow import improve
from mvcodec.nn.matching import describe, fill, match_globally, orientations, propagate
from mvcodec.nn.steady_flow import SteadyFlow
from mvcodec.nn.turning import find_turn, turn_back, turn_of, turned_view, worth_turning
from mvcodec.nn.warping import pixel_grid, round_trip_error, sample

FINE = 3  # level (1 / 2^level of the size) where histograms hand over to grey values
MAX_CELLS = 5000  # of the all-to-all match: 5000^2 floats are 100 MB
WARPS = {
    3: 3,
    2: 3,
    1: 3,
    0: 1,
}  # linearisations per level; the single one at full size is worth 15 % of the gain
UNSURE = 0.2  # mean consistency at 1/8 below which all turns and zooms of a pair are tried
AS_SURE = 0.9  # times as consistent a turned pair must be: what is left to find is smoother, too
BLURS = 24  # of the flow that bends the side view, [1 2 1] each: 3.5 cells
SHARP = 1  # level whose last linearisation, and those of finer levels, are drawn to the epipolar lines
CONTRAST_FLOOR = 5.0  # of 255; keeps coding noise on walls and sky from being taken for texture


class Sight(NamedTuple):
    """One view and where its peers show the same: entry n belongs to view `peers[n]`, in order of index."""

    peers: list[int]
    flow: Tensor  # [S, 2, H, W] pixels, as in warping.py
    consistency: Tensor  # [S, 1, H, W] in [0, 1]: exp(-round-trip error in pixels), 0 where nothing matches


class _Cells(NamedTuple):
    """What histograms see of a view; level n has 1 / 2^n of the padded picture's size."""

    quarter: Tensor  # grey values of level 2, of 255
    descriptors: tuple[Tensor, ...]  # levels FINE .. coarsest: [1, 72, h, w], unit length


class _View(NamedTuple):
    """What is computed once per view."""

    luma: Tensor  # [1, 1, H, W], of 255
    grey: tuple[Tensor, ...]  # levels 0 .. FINE: [1, 1, h, w], light flattened
    cells: _Cells


class _Meeting(NamedTuple):
    """Views a and b as histograms see them."""

    flow: Tensor  # level FINE, [2, 2, h, w]; of b turned, if it is
    turn: Tensor | None  # how b is turned to look like a, as in turning.py
    overlap: Sequence[float]  # mean consistency of a -> b and b -> a

    @property
    def sure(self) -> float:
        return sum(self.overlap) / 2


@torch.no_grad()
def sights(
    pictures: Tensor,
    max_peers: int | None = None,
    steady: SteadyFlow | None = None,
    quality: Tensor | None = None,
    tiles: int | None = None,
    call: Graphs = PLAIN,
) -> Iterator[Sight]:
    """Align the views [K, 3, H, W] in [0, 1], of any size: one after the other, each with its peers.

    max_peers: only the most consistent ones of each view, judged at 1/8; others are not aligned at all.
    steady: the network of the last step, which also needs the views' qualities [K]; it takes so many tiles at a time.
    call: what a GPU does between two decisions can be replayed.
    A pair is aligned once, both ways. What waits for its turn are the ways back: at most K^2 / 4 of them.
    """
    views, _, height, width = pictures.shape
    with _exact(pictures):
        prepared = beside(lambda picture: call(_prepare, picture[None].float()), list(pictures), pictures.device)
        those = list(combinations(range(views), 2))
        met = beside(lambda pair: _meet(prepared[pair[0]], prepared[pair[1]], call), those, pictures.device)
        pairs, overlap = dict(zip(those, met, strict=True)), torch.full((views, views), -1.0)
        for (i, j), meeting in pairs.items():
            overlap[i, j], overlap[j, i] = meeting.overlap
    count = min(views - 1, views if max_peers is None else max_peers)
    chosen = [sorted(overlap[i].argsort(descending=True)[:count].tolist()) for i in range(views)]
    waiting: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for i in range(views):
        found = []
        for j in chosen[i]:
            if (i, j) not in waiting:
                pair = (min(i, j), max(i, j))
                a, b = (prepared[k] for k in pair)
                flow = _align_pair(a, b, pairs.pop(pair), call)
                which = None if steady is None or quality is None else torch.stack([quality[k] for k in pair])
                flow, consistency = call(_settled, a.grey[0], b.grey[0], flow, (height, width), steady, which, tiles)
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
    luma = _luma(picture)
    height, width = luma.shape[-2:]
    return _levels(F.pad(luma, (0, -width % 2**coarsest, 0, -height % 2**coarsest), mode="replicate"), coarsest)


def _luma(pictures: Tensor) -> Tensor:
    red, green, blue = pictures.split(1, 1)
    return (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).mul_(255)


def grey_values(pictures: Tensor) -> Tensor:
    """What the flow at full size compares: [N, 3, H, W] in [0, 1] -> [N, 1, H, W], local mean 0, contrast 20."""
    return _flatten_light(_luma(pictures))


def _levels(luma: Tensor, coarsest: int) -> _View:
    grey = [luma]
    for _ in range(FINE):
        grey.append(F.avg_pool2d(blur(grey[-1]), 2))
    histograms = orientations(grey[2])
    descriptors = tuple(describe(histograms, 2 ** (level - 2)) for level in range(FINE, coarsest + 1))
    return _View(luma, tuple(map(_flatten_light, grey)), _Cells(grey[2], descriptors))


def _flatten_light(grey: Tensor) -> Tensor:
    """Local mean 0, contrast 20: exposure and shading differ between views, and faint texture counts too."""
    centred = grey - blur(blur(local_mean(grey)))
    return 20 * centred / (blur(blur(local_mean(centred * centred))) + CONTRAST_FLOOR**2).sqrt()


# --- once per pair; batch entry 0 is a -> b, entry 1 is b -> a, so flip(0) is the way back ---


def _meet(a: _View, b: _View, call: Graphs) -> _Meeting:
    """Flow from histograms; of b turned and zoomed if that is what it takes."""
    flow, overlap, turn = call(_meeting, a.cells, b.cells)
    upright = _Meeting(flow, None, overlap.tolist())
    if upright.sure < UNSURE:
        turn = find_turn(a.luma, b.luma, lambda grey, cell: describe(orientations(grey), cell))
    if turn is None or not worth_turning(turn):
        return upright
    flow, overlap, _ = call(_meeting, a.cells, _turned(b, turn).cells)
    turned = _Meeting(flow, turn, overlap.tolist())
    return turned if turned.sure > AS_SURE * upright.sure else upright


def _meeting(a: _Cells, b: _Cells) -> tuple[Tensor, Tensor, Tensor]:
    """Flow at level FINE, [2, 2, h, w], mean consistency [2], and the turn that the flow is nearest to."""
    flow = match_globally(a.descriptors[-1], b.descriptors[-1])
    for one, other in zip(a.descriptors[-2::-1], b.descriptors[-2::-1], strict=True):
        cells = torch.cat((one, other))
        flow = propagate(cells, cells.flip(0), _double(flow))
    second = _look_again(a, b, flow)
    before, after = (local_mean(local_mean(_consistency(x, x.flip(0)))) for x in (flow, second))
    flow = torch.where(after >= before, second, flow)  # where little is right, bending by it makes it worse
    consistency = _consistency(flow, flow.flip(0))
    return flow, consistency.mean((1, 2, 3)), turn_of(flow[0], consistency[0, 0], 2**FINE)


def _turned(view: _View, turn: Tensor) -> _View:
    return _levels(turned_view(view.luma, turn), FINE + len(view.cells.descriptors) - 1)


def _look_again(a: _Cells, b: _Cells, flow: Tensor) -> Tensor:
    """Propagation on the side view bent by the flow, smoothed: slanted and shrunk surfaces look alike then."""
    weight = torch.exp(-0.5 * round_trip_error(flow, flow.flip(0)))
    bend, weight = fill(flow, weight), weight + 0.02
    total = bend * weight
    for _ in range(BLURS):
        total, weight = blur(total), blur(weight)
    bend = total / weight
    fine = _double(bend)  # as the quarters
    side = sample(torch.cat((b.quarter, a.quarter)), pixel_grid(fine.shape[-2], fine.shape[-1], fine) + fine)
    main = torch.cat((a.descriptors[0], b.descriptors[0]))
    rest = propagate(main, describe(orientations(side), 2 ** (FINE - 2)), flow - bend)
    return rest + sample(bend, pixel_grid(rest.shape[-2], rest.shape[-1], rest) + rest)


def _align_pair(a: _View, b: _View, meeting: _Meeting, call: Graphs) -> Tensor:
    """Flow at full padded size, [2, 2, H, W]."""
    start, turn, _ = meeting
    with _exact(start):
        if turn is None:
            return call(_refined, a.grey, b.grey, start, code=least_direction)
        return turn_back(call(_refined, a.grey, _turned(b, turn).grey, start, code=least_direction), turn)


def _refined(a: tuple[Tensor, ...], b: tuple[Tensor, ...], start: Tensor, least: Code) -> Tensor:
    """Grey values of all levels and the flow at level FINE -> flow at level 0."""
    flow = fill(start, torch.exp(-0.5 * round_trip_error(start, start.flip(0))))
    for level, warps in WARPS.items():
        if level < FINE:
            flow = _double(flow)
        grey = torch.cat((a[level], b[level]))
        for n in range(warps):
            lines = epipolar_lines(flow, least) if level <= SHARP and n == warps - 1 else None
            flow = improve(grey, grey.flip(0), flow, lines)
    return flow


def _settled(
    a: Tensor,
    b: Tensor,
    flow: Tensor,
    size: tuple[int, int],
    steady: SteadyFlow | None,
    quality: Tensor | None,
    tiles: int | None,
) -> tuple[Tensor, Tensor]:
    """Padded grey values and flow -> flow and consistency of the pictures' size, the flow steadied if it can be."""
    height, width = size
    with _exact(flow):
        inner = flow[..., :height, :width]
        consistency = _consistency(inner, inner.flip(0))
    if steady is None or quality is None:
        return inner, consistency
    grey = torch.cat((a, b))
    # Nothing is known of consistency in the padding.
    known = F.pad(consistency, (0, flow.shape[-1] - width, 0, flow.shape[-2] - height))
    quality = torch.stack((quality, quality.flip(0))).to(flow)
    flow = steady.steady(grey, grey.flip(0), flow, known, quality, tiles)  # a small change: bfloat16 will do
    return flow[..., :height, :width], consistency


def _double(flow: Tensor) -> Tensor:
    """The same flow on a grid of half the spacing."""
    return enlarge(flow, 2).mul_(2)
