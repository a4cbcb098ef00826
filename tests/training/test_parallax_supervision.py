"""OPAM learns from the flow where the same surface is; a lone view teaches nothing."""

import pytest
import torch
from torch import nn

from mvcodec.nn.para_jd import ParaJD
from mvcodec.training.parallax_supervision import ParallaxSupervision
from tests.test_alignment import grid, texture

STRIDE = 8


class Pool(nn.Module):
    """Stands for a synthesis stage: same size, nothing learned."""

    def forward(self, x, quality):
        return x


def scene(down: float, right: float) -> torch.Tensor:
    shift = torch.tensor([right, down]).view(1, 2, 1, 1)
    return torch.cat((texture(grid((128, 128))), texture(grid((128, 128)) - shift)))[None]  # [1, 2, 3, H, W]


def latents(pictures: torch.Tensor) -> torch.Tensor:
    """The grey values of a position's own 8 x 8 pixels: enough to know it again."""
    return nn.functional.pixel_unshuffle(pictures[0, :, :1] - 0.5, STRIDE)[None]


def fused(para_jd: ParaJD, pictures: torch.Tensor) -> ParallaxSupervision:
    with ParallaxSupervision(para_jd) as parallax:
        para_jd(latents(pictures), torch.zeros(1, 2, 1))
    return parallax


@pytest.fixture
def para_jd() -> ParaJD:
    torch.manual_seed(0)
    return ParaJD(Pool(), Pool(), (64, 64), (32, 32), "opam")


def test_attention_learns_where_to_look(para_jd: ParaJD) -> None:
    pictures = scene(down=16.0, right=-24.0)
    optimiser = torch.optim.Adam(para_jd.parameters(), lr=6e-3)
    losses = []
    for _ in range(10):
        loss = fused(para_jd, pictures).loss(pictures)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.3)  # looks everywhere alike
    assert losses[-1] < 0.9 * losses[0]


def test_the_target_is_the_match_and_nothing_else(para_jd: ParaJD) -> None:
    """An attention built to be right has no loss, one that is off by a position has a large one."""
    pictures = scene(down=8.0, right=16.0)  # the side view shows it one row lower, two columns to the right
    parallax = fused(para_jd, pictures)
    calls = parallax.seen[0]
    size = 128 // STRIDE
    place = torch.eye(size) * 10
    across, down = (
        x[None].expand(2, -1, -1, -1)
        for x in (place[:, None].expand(-1, size, -1), place[:, :, None].expand(-1, -1, size))
    )

    def loss(rows: int, columns: int) -> float:
        moved = [
            call._replace(
                scale=1.0,
                main=call.main._replace(row_key=across[:1], column_key=down[:1]),
                side=call.side._replace(row_key=across[:1].roll(sign * columns, -1)),
                column_key=down[:1].roll(sign * rows, -2),
            )
            for call, sign in zip(calls, (1, -1), strict=True)
        ]
        parallax.seen = [moved]
        return float(parallax.loss(pictures))

    assert loss(1, 2) < 0.3 * min(loss(0, 2), loss(1, 1), loss(1, 3), loss(2, 2))


def test_each_set_of_views_weighs_alike(para_jd: ParaJD) -> None:
    """So that processes that have some of them each find together what one finds that has all."""
    with torch.no_grad():
        for weight in para_jd.parameters():
            weight *= 2  # no attention looks everywhere alike
    sets = [scene(8.0, 16.0), scene(-16.0, 40.0)]
    alone = [fused(para_jd, pictures).loss(pictures).item() for pictures in sets]
    both = torch.cat(sets)
    with ParallaxSupervision(para_jd) as parallax:
        para_jd(torch.cat([latents(pictures) for pictures in sets]), torch.zeros(2, 2, 1))
    assert abs(alone[0] - alone[1]) > 1e-3
    assert parallax.loss(both).item() == pytest.approx(sum(alone) / 2, rel=1e-4)


def test_nothing_is_watched_afterwards_and_lone_views_teach_nothing(para_jd: ParaJD) -> None:
    pictures = scene(0.0, 0.0)
    parallax = fused(para_jd, pictures)
    calls = [len(seen) for seen in parallax.seen]
    para_jd(latents(pictures), torch.zeros(1, 2, 1))
    assert [len(seen) for seen in parallax.seen] == calls == [2, 2]
    with ParallaxSupervision(para_jd) as alone:
        para_jd(latents(pictures)[:, :1], torch.zeros(1, 1, 1))
    assert float(alone.loss(pictures[:, :1])) == 0
    strangers = torch.cat((pictures[:, :1], texture(grid((128, 128)), seed=3)[None]), 1)
    far = fused(para_jd, strangers).loss(strangers)
    assert torch.isfinite(far)
