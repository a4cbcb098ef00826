"""Steadied flow: nothing happens without weights, tiles are not seen, and coding noise can be learned away."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mvcodec.nn import steady_flow
from mvcodec.nn.aligned_refinement import AlignedRefinement
from mvcodec.nn.alignment import sights
from mvcodec.nn.steady_flow import SteadyFlow
from mvcodec.nn.warping import warp
from mvcodec.training import steadying
from tests.test_alignment import grid, texture

SIZE = (64, 96)
QUALITY = torch.tensor([0.3, 0.5])


def views(noise: float = 0.0, size: tuple[int, int] = SIZE) -> Tensor:
    """Two views of one texture, [2, 3, H, W]."""
    torch.manual_seed(0)
    pictures = torch.cat([texture(grid(size)), texture(grid(size) - 3.4)])
    return (pictures + noise * torch.randn_like(pictures)).clamp(0, 1)


def scrambled(width: int = 8) -> SteadyFlow:
    torch.manual_seed(1)
    network = SteadyFlow(width)
    torch.nn.init.normal_(network.last.weight, std=0.1)
    return network.requires_grad_(False)


def flows(network: SteadyFlow | None, pictures: Tensor) -> Tensor:
    return torch.cat([sight.flow for sight in sights(pictures, steady=network, quality=QUALITY)])


@pytest.mark.parametrize("size", [SIZE, (61, 83)])
def test_untrained_returns_the_flow(size: tuple[int, int]) -> None:
    pictures = views(0.05, size)
    assert torch.equal(flows(SteadyFlow().requires_grad_(False), pictures), flows(None, pictures))
    assert not torch.equal(flows(scrambled(), pictures), flows(None, pictures))


def test_tiles_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = views(0.05, (48, 400))
    whole = flows(scrambled(), pictures)
    monkeypatch.setattr(steady_flow, "TILE", 136)
    torch.testing.assert_close(flows(scrambled(), pictures), whole, atol=1e-3, rtol=0)


@torch.no_grad()
def test_weights_bring_it_along_and_others_switch_it_off() -> None:
    model = AlignedRefinement(width=8)
    without = model.state_dict()
    assert not any(name.startswith("steady.") for name in without)
    with_it = {**without, **{f"steady.{name}": value for name, value in scrambled(32).state_dict().items()}}
    model.load_state_dict(with_it)
    assert model.steady is not None
    assert torch.equal(model.steady.last.weight, scrambled(32).last.weight)
    model.load_state_dict(without)
    assert model.steady is None


def test_a_lesson_mirrored_is_a_lesson() -> None:
    lesson = steadying.lesson(views(), lambda x, _: x, np.random.default_rng(0))
    assert lesson is not None
    straight, mirrored = (
        steadying.one_way(lesson, 0, *how) for how in (((False, False), False), ((True, False), True))
    )
    seen = warp(mirrored["side"], mirrored["flow"], "bilinear")
    torch.testing.assert_close(seen, warp(straight["side"], straight["flow"], "bilinear").flip(-1).mT, atol=0.1, rtol=0)


def test_views_that_do_not_overlap_teach_nothing() -> None:
    apart = torch.cat((texture(grid(SIZE)), texture(grid(SIZE), seed=5)))
    assert steadying.lesson(apart, lambda x, _: x, np.random.default_rng(0)) is None


def test_learns_to_undo_what_noise_does(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steadying, "TRIES", 2)
    monkeypatch.setattr(steadying, "STEPS", 25)

    def coder(pictures: Tensor, _: list[float]) -> Tensor:
        return (pictures + 0.1 * torch.randn_like(pictures)).clamp(0, 1)

    files = steadying.prepare(lambda _: views(), tmp_path, coder, seed=0, progress=False, made=lambda: None)
    assert len(files) == 2
    torch.manual_seed(0)
    network = SteadyFlow()
    steadying.learn(network, files, seed=0, progress=False)
    held_back = steadying.lesson(texture(grid(SIZE), seed=3).repeat(2, 1, 1, 1), coder, np.random.default_rng(9))
    assert held_back is not None
    way = steadying.one_way(held_back, 0, (False, False), False)
    assert steadying.loss(network, way) < 0.95 * steadying.loss(SteadyFlow(), way)


def test_a_try_that_gave_no_lesson_is_not_made_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steadying, "TRIES", 2)
    monkeypatch.setattr(steadying, "lesson", lambda views, *_: {"flow": views})
    drawn, tries = [torch.ones(2, 3, 8, 8), None], []
    for _ in range(2):
        files = steadying.prepare(
            lambda _: drawn.pop(), tmp_path, lambda x, _: x, seed=0, progress=False, made=lambda: tries.append(1)
        )
        assert [file.name for file in files] == ["1.safetensors"]
    assert len(tries) == 2
