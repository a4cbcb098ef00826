"""Epipolar lines are found from noisy flow, leave alone what moves, and steady the alignment of noisy views."""

import pytest
import torch
from torch import Tensor

from mvcodec.nn import alignment
from mvcodec.nn.alignment import sights
from mvcodec.nn.epipolar import Pull, epipolar_lines
from tests.test_alignment import grid, texture

SIZE = (160, 224)


def stereo() -> Tensor:
    """Flow both ways of a slanted, wavy surface before two cameras side by side, [2, 2, H, W]."""
    x, y = grid(SIZE)[0]
    there = 10 + 0.02 * y + 8 * torch.sin(x / 40)
    back = -there
    for _ in range(20):  # back(x + there(x)) = -there(x)
        back = -(10 + 0.02 * y + 8 * torch.sin((x + back) / 40))
    return torch.stack([torch.stack((d, torch.zeros_like(d))) for d in (there, back)])


def everywhere(flow: Tensor) -> Pull:
    lines = epipolar_lines(flow)
    return lines.at(flow, *(slice(0, length) for length in flow.shape[-2:]), slice(None))


def test_a_tile_is_drawn_as_the_whole_is() -> None:
    flow = stereo()
    lines = epipolar_lines(flow)
    for tile in ((slice(0, 84), slice(140, 224)), (slice(44, 150), slice(0, 31))):
        seen = (..., *tile)
        for part, whole in zip(lines.at(flow[seen], *tile, slice(None)), everywhere(flow), strict=True):
            torch.testing.assert_close(part, whole[seen], atol=1e-4, rtol=1e-5)


def test_noise_across_the_lines_is_told_from_noise_along_them() -> None:
    torch.manual_seed(0)
    noise = 0.3 * torch.randn(2, 2, *SIZE)
    lines = everywhere(stereo() + noise)
    upright = lines.normal[:, 1].abs()
    assert upright.min() > 0.98
    assert (lines.normal[:, 1] * lines.distance[:, 0] - noise[:, 1]).abs().mean() < 0.08
    assert lines.trust.mean() > 0.9


def test_any_direction_of_the_baseline() -> None:
    flow = stereo().transpose(-1, -2).flip(1)  # one camera above the other
    lines = everywhere(flow)
    assert lines.normal[:, 0].abs().min() > 0.98
    assert lines.distance.abs().mean() < 0.05


def test_what_moves_is_left_alone() -> None:
    flow = stereo()
    flow[:, 1, 40:80, 60:120] += torch.tensor([6.0, -6.0]).view(2, 1, 1)
    lines = everywhere(flow)
    assert lines.trust[0, 0, 44:76, 64:116].max() < 0.01
    assert lines.trust[0, 0, 100:].min() > 0.9


def test_flow_that_leads_nowhere_has_lines_that_draw_nothing() -> None:
    torch.manual_seed(0)
    for flow in (50 * torch.randn(2, 2, *SIZE), torch.zeros(2, 2, 16, 16)):  # the second: too few points
        pull = everywhere(flow)
        assert pull.trust.eq(0).all()
        assert all(part.isfinite().all() for part in pull)


def test_lines_steady_the_alignment_of_noisy_views(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    flow = stereo()
    views = torch.cat((texture(grid(SIZE)), texture(grid(SIZE) + flow[1:])))
    noisy = (views + 0.08 * torch.randn_like(views[:, :1])).clamp(0, 1)

    def error() -> float:
        found = next(sights(noisy)).flow[0, :, 16:-16, 16:-32]
        return float((found - flow[0, :, 16:-16, 16:-32]).norm(dim=0).mean())

    with_lines = error()
    monkeypatch.setattr(alignment, "SHARP", -1)
    assert with_lines < 0.85 * error()
