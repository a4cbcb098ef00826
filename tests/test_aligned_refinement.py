"""The aligned refinement starts as the identity, uses peers only where they agree, learns to use them."""

import numpy as np
import pytest
import torch

from mvcodec.nn.aligned_refinement import AlignedRefinement, match_colours
from mvcodec.nn.alignment import Alignment
from mvcodec.training.refinement import CROP, SIDES, examples, loss
from tests.test_alignment import grid, texture

SIZE = (64, 96)


def views() -> torch.Tensor:
    """Three noisy views of one texture, shifted by a few pixels."""
    torch.manual_seed(0)
    shifts = torch.tensor([[0.0, 0.0], [5.0, 2.0], [-7.0, 1.0]]).view(3, 2, 1, 1)
    pictures = torch.cat([texture(grid(SIZE) - shift) for shift in shifts])
    return (pictures + 0.02 * torch.randn_like(pictures)).clamp(0, 1)


def scrambled() -> AlignedRefinement:
    """No zero start: every path carries something."""
    torch.manual_seed(1)
    model = AlignedRefinement(width=8)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


QUALITY = torch.tensor([0.2, 0.5, 0.8])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_untrained_returns_its_input(count: int) -> None:
    pictures = views()[:count]
    refined = AlignedRefinement(width=8)(pictures, QUALITY[:count])
    assert torch.equal(refined.pictures, pictures)
    torch.testing.assert_close(refined.weights.sum(1), torch.ones(count, 1, *SIZE))


@torch.no_grad()
def test_one_view_is_the_same_as_no_peers() -> None:
    model, pictures = scrambled(), views()
    alone = model(pictures, QUALITY, peers=False)
    for k in range(3):
        single = model(pictures[k : k + 1], QUALITY[k : k + 1]).pictures[0]
        torch.testing.assert_close(single, alone.pictures[k])
    assert not torch.allclose(model(pictures, QUALITY).pictures, alone.pictures, atol=1e-3)


@torch.no_grad()
def test_order_of_views_does_not_matter() -> None:
    model, pictures, order = scrambled(), views(), [2, 0, 1]
    refined = model(pictures, QUALITY)
    permuted = model(pictures[order], QUALITY[order])
    torch.testing.assert_close(permuted.pictures, refined.pictures[order], atol=1e-3, rtol=0)
    torch.testing.assert_close(permuted.weights, refined.weights[order][:, order], atol=1e-2, rtol=0)


@torch.no_grad()
def test_inconsistent_peers_are_ignored_exactly() -> None:
    model, pictures = scrambled(), views()
    nothing = Alignment(torch.zeros(3, 3, 2, *SIZE), torch.zeros(3, 3, 1, *SIZE))
    alone = model(pictures, QUALITY, peers=False).pictures
    assert torch.equal(model(pictures, QUALITY, alignment=nothing).pictures, alone)
    # also without the per-pair switch: the gate is per pixel
    fused, same, share = model.fuse(
        pictures[:1], QUALITY[:1], pictures[None, 1:], torch.zeros(1, 2, 1, *SIZE), QUALITY[None, 1:]
    )
    assert not share.any()
    torch.testing.assert_close(fused[0].clamp(0, 1), alone[0])
    torch.testing.assert_close(same[0].clamp(0, 1), alone[0])


@torch.no_grad()
def test_max_peers_keeps_the_most_consistent() -> None:
    consistency = torch.zeros(3, 3, 1, *SIZE)
    consistency[0, 1], consistency[0, 2] = 0.3, 0.9
    alignment = Alignment(torch.zeros(3, 3, 2, *SIZE), consistency)
    weights = scrambled()(views(), QUALITY, alignment=alignment, max_peers=1).weights
    assert not weights[0, 1].any()
    assert (weights[0, 2] > 0).all()


@torch.no_grad()
def test_odd_sizes() -> None:
    pictures = torch.rand(2, 3, 33, 47)
    assert scrambled()(pictures, QUALITY[:2]).pictures.shape == pictures.shape


def test_colours_of_a_peer_are_matched() -> None:
    main = texture(grid(SIZE))[0]
    side = (0.8 * main + 0.1)[None]
    torch.testing.assert_close(match_colours(side, main, torch.ones(1, 1, *SIZE))[0], main, atol=0.02, rtol=0)
    # nothing consistent: nothing to learn from, nothing blows up
    assert match_colours(side, main, torch.zeros(1, 1, *SIZE)).isfinite().all()


def test_learns_to_use_a_cleaner_peer() -> None:
    """Forty steps: more is gained with an aligned peer of better quality than without."""
    torch.manual_seed(0)
    model = AlignedRefinement(width=8)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    ratios = []
    for _ in range(40):
        target = torch.cat([texture(grid((32, 32)) + 1000 * torch.rand(1)) for _ in range(4)])
        batch = {
            "target": target,
            "main": target + 0.05 * torch.randn_like(target),
            "peers": (target + 0.01 * torch.randn_like(target))[:, None],
            "consistency": torch.ones(4, 1, 1, 32, 32),
            "quality": torch.full((4,), 0.1),
            "peer_quality": torch.full((4, 1), 0.9),
        }
        value, clean, joint = loss(model, batch)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        ratios.append((float(clean), float(joint)))
    assert ratios[0] == pytest.approx((1, 1), abs=1e-3)
    clean, joint = ratios[-1]
    assert joint < 0.7
    assert joint < clean - 0.1


def test_examples_show_one_place_through_all_views() -> None:
    """A codec without loss: main and target are equal, and so is the warped peer where it is consistent."""
    views = [texture(grid((208, 224)) + shift)[0].permute(1, 2, 0).mul(255).byte().numpy() for shift in (0, 6)]
    found = examples(views, lambda pictures, _: pictures, np.random.default_rng(0), crops=2)
    assert found["target"].shape == (4, 3, CROP, CROP)
    assert found["peers"].shape == (4, SIDES, 3, CROP, CROP)
    assert torch.equal(found["main"], found["target"])
    assert not found["consistency"][:, 1:].any()  # two views: one peer, the other places stay empty
    sure = found["consistency"][:, 0] > 240
    assert sure.float().mean() > 0.7
    difference = (found["peers"][:, 0].float() - found["target"].float()).abs().amax(1, keepdim=True)
    assert difference[sure].mean() < 2
