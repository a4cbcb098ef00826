"""Alignment finds known motions to a fraction of a pixel, and says where there is nothing to find."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mvcodec.nn import alignment, local_flow, matching
from mvcodec.nn.alignment import sights
from mvcodec.nn.warping import pixel_grid, round_trip_error, warp

SIZE = (160, 224)


class Alignment(NamedTuple):
    """Every ordered pair: [i, j] is where view j shows what view i shows. The diagonal is zero."""

    flow: Tensor  # [K, K, 2, H, W]
    consistency: Tensor  # [K, K, 1, H, W]


def align(pictures: Tensor) -> Alignment:
    views, _, height, width = pictures.shape
    flow, consistency = torch.zeros(views, views, 2, height, width), torch.zeros(views, views, 1, height, width)
    for i, sight in enumerate(sights(pictures)):
        flow[i, sight.peers], consistency[i, sight.peers] = sight.flow, sight.consistency
    return Alignment(flow, consistency)


def texture(position: Tensor, seed: int = 0) -> Tensor:
    """A picture known everywhere: random waves of 6 to 120 pixels at [1, 2, H, W] -> [1, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    wavelength = 6 * 20 ** torch.rand(96, generator=generator)
    angle, phase = 2 * torch.pi * torch.rand(2, 96, 1, 1, generator=generator)
    frequency = 2 * torch.pi / wavelength.view(-1, 1, 1)
    x, y = position[0, 0], position[0, 1]
    waves = torch.cos(frequency * (x * angle.cos() + y * angle.sin()) + phase) / frequency**0.5
    grey = waves.sum(0) / waves.sum(0).std() / 6 + 0.5
    return grey.clamp(0, 1).repeat(1, 3, 1, 1)


def grid(size: tuple[int, int] = SIZE) -> Tensor:
    return pixel_grid(*size, like=torch.zeros(1))


def error_where_seen(flow: Tensor, truth: Tensor, margin: int = 8) -> Tensor:
    """Distances [N] at pixels whose true match lies at least `margin` inside the side view."""
    target = grid(truth.shape[-2:]) + truth
    limit = target.new_tensor([truth.shape[-1], truth.shape[-2]]).view(1, 2, 1, 1) - 1
    seen = ((target > margin) & (target < limit - margin)).all(dim=1)
    return (flow - truth).norm(dim=1)[seen]


@pytest.mark.parametrize("shift", [(0.0, 0.0), (3.25, -1.5), (-41.5, 17.0), (110.3, 4.0)])
def test_shift_is_found_to_sub_pixel(shift: tuple[float, float]) -> None:
    """The last one is half the width: far beyond what coarse-to-fine flow alone can follow."""
    main = grid()
    flow = torch.tensor(shift).view(1, 2, 1, 1).expand(1, 2, *SIZE)
    found = align(torch.cat((texture(main), texture(main - flow))))
    assert error_where_seen(found.flow[0, 1][None], flow).quantile(0.9) < 0.1
    assert error_where_seen(found.flow[1, 0][None], -flow).quantile(0.9) < 0.1


def test_homography_is_found() -> None:
    """Rotation by 8 degrees, scale 1.08 and some perspective: what a turned camera sees of a wall."""
    angle = torch.tensor(0.14)
    c, s = 1.08 * angle.cos(), 1.08 * angle.sin()
    turn = torch.tensor([[c, -s, 20.0], [s, c, -25.0], [1e-4, -8e-5, 1.0]])
    homogeneous = torch.cat((grid(), torch.ones(1, 1, *SIZE)), 1)
    seen_from_main = torch.einsum("ij,njhw->nihw", turn, homogeneous)
    truth = seen_from_main[:, :2] / seen_from_main[:, 2:] - grid()  # main -> side
    back = torch.einsum("ij,njhw->nihw", turn.inverse(), homogeneous)
    side = texture(back[:, :2] / back[:, 2:])
    found = align(torch.cat((texture(grid()), side)))
    error = error_where_seen(found.flow[0, 1][None], truth)
    assert error.median() < 0.1
    assert error.quantile(0.8) < 0.5


def test_exposure_does_not_matter() -> None:
    flow = torch.tensor([6.5, -3.0]).view(1, 2, 1, 1).expand(1, 2, *SIZE)
    main, side = texture(grid()), texture(grid() - flow)
    found = align(torch.cat((main, 0.6 * side + 0.1)))
    assert error_where_seen(found.flow[0, 1][None], flow).quantile(0.9) < 0.15


def test_consistency_is_high_where_matched_and_low_where_hidden() -> None:
    """A square moves 20 pixels over a still background: the strip it covers in the side view has no match."""
    main, side = texture(grid()), texture(grid())
    square = texture(grid() - 500, seed=1)[..., 40:110, 60:130]
    main[..., 40:110, 60:130] = square
    side[..., 40:110, 80:150] = square
    consistency = align(torch.cat((main, side))).consistency[0, 1, 0]
    assert consistency[50:100, 134:146].mean() < 0.3  # hidden behind the square in the side view
    assert consistency[50:100, 70:120].mean() > 0.9  # on the square
    assert consistency[120:, :].mean() > 0.9  # background


def test_different_places_are_not_consistent() -> None:
    consistency = align(torch.cat((texture(grid()), texture(grid(), seed=5)))).consistency
    assert consistency[0, 1].mean() < 0.1


def test_every_pair_and_odd_sizes() -> None:
    """Entry [i, j] belongs to main i and side j; nothing on the diagonal; any size will do."""
    size = (75, 101)
    shifts = torch.tensor([[0.0, 0.0], [9.0, 4.0], [-6.0, 2.0]]).view(3, 2, 1, 1)
    views = torch.cat([texture(grid(size) - shift) for shift in shifts])
    found = align(views)
    assert found.flow.shape == (3, 3, 2, *size)
    assert found.consistency.shape == (3, 3, 1, *size)
    for i in range(3):
        assert not found.flow[i, i].any()
        assert not found.consistency[i, i].any()
        for j in range(3):
            truth = (shifts[j] - shifts[i])[None].expand(1, 2, *size)
            assert error_where_seen(found.flow[i, j][None], truth, margin=12).median() < 0.1
    assert align(torch.rand(2, 3, 5, 3)).flow.isfinite().all()


def test_few_peers_are_the_most_consistent_and_aligned_as_ever() -> None:
    """Views 0 and 1 overlap wholly, 2 by half, 3 not at all."""
    other = texture(grid(), seed=7)
    views = torch.cat((texture(grid()), texture(grid() - 4.0), texture(grid() - 110.0), other))
    every, one = list(sights(views)), list(sights(views, max_peers=1))
    assert [sight.peers for sight in every] == [[j for j in range(4) if j != i] for i in range(4)]
    assert [sight.peers for sight in one[:2]] == [[1], [0]]
    assert one[2].peers in ([0], [1])
    for few, all_of_them in zip(one, every, strict=True):
        place = all_of_them.peers.index(few.peers[0])
        assert torch.equal(few.flow[0], all_of_them.flow[place])
        assert torch.equal(few.consistency[0], all_of_them.consistency[place])
    assert [sight.flow.shape for sight in sights(views[:1])] == [(0, 2, *SIZE)]


def test_views_come_one_by_one_and_a_pair_is_aligned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first view waits for its own pairs alone; in the end there was one alignment for both ways of each pair."""
    done = []
    align_pair = alignment._align_pair

    def counted(*inputs):  # type: ignore[no-untyped-def]
        done.append(1)
        return align_pair(*inputs)

    monkeypatch.setattr(alignment, "_align_pair", counted)
    stream = sights(torch.rand(4, 3, 33, 47))
    counts = []
    for _ in range(4):
        next(stream)
        counts.append(len(done))
    assert counts == [3, 5, 6, 6]


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.cat((texture(grid()), texture(grid() - 5.5)))
    whole = align(views)
    monkeypatch.setattr(local_flow, "TILE", 56)
    monkeypatch.setattr(matching, "CELLS", 100)
    for part, all_at_once in zip(align(views), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, atol=1e-2, rtol=0)


def test_warp_by_zero_is_the_identity_and_outside_is_inconsistent() -> None:
    picture = torch.rand(1, 3, 20, 30)
    still = torch.zeros(1, 2, 20, 30)
    torch.testing.assert_close(warp(picture, still), picture, atol=1e-4, rtol=0)
    away = still + 25
    assert round_trip_error(away, -away)[0, 0, 10, 10].isinf()
