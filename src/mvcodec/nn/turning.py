"""Which turn and zoom shows one view as another sees it: cameras held upright and sideways, near and far.

    both views at about 1/4 -> for each of 12 turns and 5 zooms: cells of gradient histograms, mutual best matches,
    votes for one shift (Hough; Lowe 2004) -> the turn with most votes -> similarity through its matches

Histograms of gradients bear some 15 degrees and a quarter of zoom, dense alignment little more. So a pair that
hardly matches is looked at once more, turned; what is left after that, alignment finds as it always does.
"""

import math
from collections.abc import Callable
from itertools import product
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.nn.warping import pixel_grid, sample

TURNS = [math.radians(30 * n) for n in range(12)]
ZOOMS = [0.5, 0.7, 1.0, 1.4, 2.0]
CELLS = 600  # of a view in the search, at most; on a grid 4 times finer histograms are gathered
SIGNIFICANT, FEWEST = 3.0, 12  # votes: times those of an arbitrary turn (the median; chance gives the best of 60 2.3)
NEAR = 10  # pixels of the search; shifts closer than this vote for each other
ROUNDS = 5  # of reweighting

# grey picture [1, 1, h, w] and the side of a cell in its pixels -> descriptors of its cells [1, C, h/cell, w/cell]
Describe = Callable[[Tensor, int], Tensor]


def find_turn(main: Tensor, side: Tensor, describe: Describe) -> Tensor | None:
    """The similarity [2, 3] that takes pixels (x, y, 1) of `main` to those of `side` that show the same.

    main, side: grey, [1, 1, H, W], of one size. None if no turn finds matches that agree on a shift.
    """
    height, width = main.shape[-2:]
    scale = math.ceil(math.sqrt(height * width / (16 * CELLS)))  # pixels to one of the search
    main, side = (F.avg_pool2d(x, scale) for x in (main, side))
    size = (main.shape[-2] // 4 * 4, main.shape[-1] // 4 * 4)
    cells = describe(main[..., : size[0], : size[1]], 4).flatten(2)[0]
    here = 4 * pixel_grid(size[0] // 4, size[1] // 4, main).flatten(2)[0] + 1.5
    tried = []
    for zoom, turn in product(ZOOMS, TURNS):
        guess = _about_centre(turn, zoom, main)
        turned = describe(turned_view(side, guess)[..., : size[0], : size[1]], 4).flatten(2)[0]
        similarity = cells.T @ turned
        there, back = similarity.max(1).indices, similarity.max(0).indices
        mutual = back[there] == torch.arange(len(there), device=there.device)
        from_, to = here[:, mutual], here[:, there[mutual]]
        votes = _agreeing(to - from_)
        tried.append((float(votes.sum()), from_, _apply(guess, to), votes))
    count, from_, to, votes = max(tried, key=lambda found: found[0])
    if count < max(FEWEST, SIGNIFICANT * median(found[0] for found in tried)):
        return None
    return _enlarged(_fit(from_, to, votes), scale)


def turn_of(flow: Tensor, consistency: Tensor, scale: int) -> Tensor:
    """The similarity [2, 3], in pixels, nearest to a flow [2, h, w] found at 1/`scale` of the size."""
    points = pixel_grid(flow.shape[-2], flow.shape[-1], flow).flatten(2)[0]
    return _enlarged(_fit(points, points + flow.flatten(1), consistency.flatten()), scale)


def worth_turning(turn: Tensor) -> bool:
    """Turned by 4 degrees or zoomed by a twelfth? Alignment does not mind less; zooms beyond 4 are errors."""
    turn = turn.cpu()  # one wait
    zoom, angle = float(torch.linalg.det(turn[:, :2]).sqrt()), float(torch.atan2(turn[1, 0], turn[0, 0]))
    return 1 / 4 < zoom < 4 and (abs(angle) > math.radians(4) or abs(math.log(zoom)) > math.log(13 / 12))


def turned_view(side: Tensor, turn: Tensor) -> Tensor:
    """Side view [1, C, H, W] seen through a similarity [2, 3], on the main view's grid; border repeated."""
    height, width = side.shape[-2:]
    fine = (pixel_grid(2 * height, 2 * width, side) - 0.5) / 2  # four samples a pixel: zooming out must not alias
    return F.avg_pool2d(sample(side, _apply(turn, fine.flatten(2)[0]).view_as(fine)), 2)


def turn_back(flow: Tensor, turn: Tensor) -> Tensor:
    """Flows between main and turned side view, [2, 2, H, W] (there, back), as flows between main and side view."""
    grid = pixel_grid(flow.shape[-2], flow.shape[-1], flow)
    there = _apply(turn, (grid + flow[:1]).flatten(2)[0]).view_as(grid) - grid
    upright = _apply(_inverse(turn), grid.flatten(2)[0]).view_as(grid)
    back = upright + sample(flow[1:], upright) - grid
    return torch.cat((there, back))


def _enlarged(matrix: Tensor, scale: int) -> Tensor:
    """The same similarity on a grid `scale` times finer, whose pixels have their centres elsewhere."""
    offset = (scale - 1) / 2
    shift = scale * matrix[:, 2] + offset - matrix[:, :2].sum(1) * offset
    return torch.cat((matrix[:, :2], shift[:, None]), dim=1)


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """[2, 3] on points [2, N]."""
    return matrix[:, :2] @ points + matrix[:, 2:]


def _inverse(matrix: Tensor) -> Tensor:
    linear = torch.linalg.inv(matrix[:, :2])
    return torch.cat((linear, -linear @ matrix[:, 2:]), dim=1)


def _about_centre(turn: float, zoom: float, like: Tensor) -> Tensor:
    centre = like.new_tensor([(like.shape[-1] - 1) / 2, (like.shape[-2] - 1) / 2])
    cos, sin = zoom * math.cos(turn), zoom * math.sin(turn)
    linear = like.new_tensor([[cos, -sin], [sin, cos]])
    return torch.cat((linear, (centre - linear @ centre)[:, None]), dim=1)


def _agreeing(shift: Tensor) -> Tensor:
    """[2, N] -> weights [N] of the matches near the shift that most of them share."""
    if shift.shape[1] == 0:
        return shift.new_zeros(0)
    near = (torch.cdist(shift.T, shift.T) < NEAR).to(shift.dtype)
    return near[near.sum(1).argmax()]


def _fit(main: Tensor, side: Tensor, weight: Tensor) -> Tensor:
    """Similarity [2, 3] through points [2, N], those far from it ever less counted."""
    matrix, given = main.new_zeros(2, 3), weight
    for _ in range(ROUNDS):
        share = weight / weight.sum()
        middle, aim = (main * share).sum(1, keepdim=True), (side * share).sum(1, keepdim=True)
        x, y = main - middle, side - aim
        strength = (share * (x * x).sum(0)).sum()
        cos = (share * (x * y).sum(0)).sum() / strength
        sin = (share * (x[0] * y[1] - x[1] * y[0])).sum() / strength
        linear = torch.stack((torch.stack((cos, -sin)), torch.stack((sin, cos))))
        matrix = torch.cat((linear, aim - linear @ middle), dim=1)
        weight = given / (1 + (_apply(matrix, main) - side).square().sum(0) / 4)
    return matrix
