"""Pairs that are turned or zoomed against each other are turned before they are aligned; others are left alone."""

import math

import pytest
import torch

from mvcodec.graphs import PLAIN
from mvcodec.nn import alignment, matching
from mvcodec.nn.alignment import sights
from mvcodec.nn.turning import find_turn, turn_back, turn_of, turned_view, worth_turning
from mvcodec.nn.warping import round_trip_error
from tests.test_alignment import SIZE, error_where_seen, grid, texture


def similarity(degrees: float, zoom: float) -> torch.Tensor:
    """About a place near the centre: main pixels -> side pixels, [2, 3]."""
    angle = math.radians(degrees)
    linear = zoom * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    centre = torch.tensor([[SIZE[1] / 2], [SIZE[0] / 2]])
    return torch.cat((linear, centre + torch.tensor([[5.0], [-3.0]]) - linear @ centre), dim=1)


def seen_through(turn: torch.Tensor) -> torch.Tensor:
    """What a side view shows if main pixels x are found at turn(x): [1, 3, H, W]."""
    inverse = torch.linalg.inv(turn[:, :2])
    return texture((inverse @ (grid().flatten(2)[0] - turn[:, 2:])).view(1, 2, *SIZE))


def truth(turn: torch.Tensor) -> torch.Tensor:
    points = grid().flatten(2)[0]
    return (turn[:, :2] @ points + turn[:, 2:] - points).view(1, 2, *SIZE)


@pytest.mark.parametrize(("degrees", "zoom"), [(40, 1.0), (90, 1.0), (180, 1.0), (-15, 1.5)])
def test_turned_views_are_aligned_both_ways(degrees: float, zoom: float) -> None:
    turn = similarity(degrees, zoom)
    there, back = sights(torch.cat((texture(grid()), seen_through(turn))))
    assert error_where_seen(there.flow, truth(turn), margin=16).median() < 0.3
    home = round_trip_error(back.flow, there.flow)
    assert home[home.isfinite()].median() < 0.3
    assert there.consistency.mean() > 0.2


def test_flow_and_similarity_say_the_same() -> None:
    turn = similarity(12, 1.2)
    flow = truth(turn)
    torch.testing.assert_close(turn_of(flow[0], torch.ones(SIZE), 1), turn, atol=1e-3, rtol=0)
    still = torch.zeros(2, 2, *SIZE)
    torch.testing.assert_close(turn_back(still, turn)[:1], flow, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        turned_view(texture(grid()), similarity(0, 1.0))[0, 0, 20, 30], texture(grid())[0, 0, 17, 35], atol=0.02, rtol=0
    )
    assert worth_turning(turn)
    assert not worth_turning(similarity(2, 1.02))


def test_nothing_in_common_has_no_turn_and_level_pairs_are_not_turned() -> None:
    def luma(picture: torch.Tensor) -> torch.Tensor:
        return 255 * picture[:, :1]

    def describe(grey: torch.Tensor, cell: int) -> torch.Tensor:
        return matching.describe(matching.orientations(grey), cell)

    assert find_turn(luma(texture(grid())), luma(texture(grid(), seed=5)), describe) is None
    assert find_turn(torch.zeros(1, 1, 9, 7), torch.zeros(1, 1, 9, 7), describe) is None
    level = [alignment._prepare(x) for x in (texture(grid()), texture(grid() - 6.0))]
    assert alignment._meet(*level, PLAIN).turn is None


def test_steep_surfaces_are_found() -> None:
    """A floor seen from two heights: what is 1.0 wide in one is 0.6 to 1.6 wide in the other."""
    x, y = grid()[:, :1], grid()[:, 1:]
    stretch = 0.6 + y / SIZE[0]
    middle = SIZE[1] / 2
    side = texture(torch.cat((middle + (x - middle) / stretch, y), 1))
    found = next(sights(torch.cat((texture(grid()), side))))
    flow = torch.cat(((x - middle) * (stretch - 1), 0 * y), 1)
    assert error_where_seen(found.flow, flow).quantile(0.75) < 0.5
