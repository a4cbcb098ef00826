"""The aligned refinement starts as the identity, uses peers only where they agree, learns to use them."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mvcodec.nn import aligned_refinement
from mvcodec.nn.aligned_refinement import AlignedRefinement, Peer, _halve, _plane, _restore, fade, match_colours, see
from mvcodec.nn.alignment import Sight, sights
from mvcodec.training.preparation import CROP, examples
from mvcodec.training.refinement import batch_of, loss
from tests.test_alignment import grid, texture

SIZE = (64, 96)


def views() -> Tensor:
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


QUALITY = torch.tensor([0.3, 0.5, 0.7])


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_untrained_returns_its_input(count: int) -> None:
    pictures = views()[:count]
    refined = AlignedRefinement(width=8)(pictures, QUALITY[:count], maps=True)
    assert torch.equal(refined.pictures, pictures)
    torch.testing.assert_close(refined.weights.sum(1), torch.ones(count))
    assert refined.maps.shape == (count, count, *SIZE)
    torch.testing.assert_close(refined.maps.float().mean((2, 3)) / 255, refined.weights, atol=5e-3, rtol=0)


@torch.no_grad()
def test_one_view_is_the_same_as_no_peers() -> None:
    model, pictures = scrambled(), views()
    alone = model(pictures, QUALITY, peers=False)
    assert torch.equal(alone.weights, torch.eye(3))
    assert alone.maps is None
    for k in range(3):
        single = model(pictures[k : k + 1], QUALITY[k : k + 1]).pictures[0]
        torch.testing.assert_close(single, alone.pictures[k])
    assert not torch.allclose(model(pictures, QUALITY).pictures, alone.pictures, atol=1e-3)


@torch.no_grad()
def test_much_coarser_peers_are_left_out_and_finer_ones_are_not() -> None:
    model, pictures = scrambled(), views()
    quality = torch.tensor([0.1, 0.9, 0.15])
    alone, together = model(pictures, quality, peers=False), model(pictures, quality)
    assert torch.equal(together.pictures[1], alone.pictures[1])
    assert together.weights[1].tolist() == [0, 1, 0]
    assert (together.weights[0, 1:] > 0).all()


@torch.no_grad()
def test_of_what_peers_correct_less_is_believed_at_the_highest_qualities(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(fade(torch.tensor([0.0, 0.8, 0.9, 1.0])), torch.tensor([1.0, 1.0, 0.85, 0.7]))
    model, pictures, quality = scrambled(), 0.4 + 0.2 * views(), torch.tensor([0.9, 1.0, 0.8])  # nothing is clamped
    alone, found = model(pictures, quality, peers=False).pictures, model(pictures, quality)
    monkeypatch.setattr(aligned_refinement, "FADES", (0.8, 1.0))
    whole = model(pictures, quality)
    torch.testing.assert_close(found.weights, whole.weights)
    for k, share in enumerate((0.85, 0.7, 1.0)):
        torch.testing.assert_close(found.pictures[k], torch.lerp(alone[k], whole.pictures[k], share), atol=1e-4, rtol=0)


@torch.no_grad()
def test_order_of_views_does_not_matter() -> None:
    model, pictures, order = scrambled(), views(), [2, 0, 1]
    refined = model(pictures, QUALITY)
    permuted = model(pictures[order], QUALITY[order])
    torch.testing.assert_close(permuted.pictures, refined.pictures[order], atol=1e-3, rtol=0)
    torch.testing.assert_close(permuted.weights, refined.weights[order][:, order], atol=1e-2, rtol=0)


@torch.no_grad()
def test_one_peer_at_a_time_is_the_softmax_over_all_of_them() -> None:
    """The same written out with all peers in memory: Eq. 14-16 of the paper on aligned pixels."""
    model, pictures = scrambled(), views()
    main, quality, sight = pictures[:1], QUALITY[:1], next(sights(pictures))
    cleaned, features = model.clean(main, quality)
    side = see(pictures[1:], main.expand(2, -1, -1, -1), sight.flow, sight.consistency)
    peers = [Peer(side[n : n + 1], sight.consistency[n : n + 1], QUALITY[n + 1 : n + 2]) for n in range(2)]
    fused = model.fuse(cleaned, features, quality, iter(peers))

    difference = _halve(16 * sight.consistency * (side - cleaned))
    reliable = _halve(sight.consistency)
    qualities = _plane(torch.stack((QUALITY[1:], quality.expand(2)), 1), difference)
    x = model.pair(torch.cat((features.expand(2, -1, -1, -1), difference, reliable, qualities), 1))
    logit, feature = model.pair_out(x).split((4, 8), dim=1)
    votes = reliable * logit.exp()
    share = votes / (1 + votes.sum(0))
    weight = votes.mean(1, keepdim=True) / (1 + votes.sum(0).mean(0))
    parts = (
        (share.repeat(1, 3, 1, 1) * difference).sum(0),
        (weight * feature).sum(0),
        share.sum(0),
    )
    residual = model.head(torch.cat((features, *(part[None] for part in parts)), 1))
    expected = cleaned + _restore(reliable.amax(0).repeat(3, 1, 1) * residual, main)
    torch.testing.assert_close(fused.pictures, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused.shares.mean((0, 2, 3, 4)), share.mean((1, 2, 3)))
    torch.testing.assert_close(fused.shown, _restore(parts[0][None], main), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_inconsistent_peers_are_ignored_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = scrambled(), views()
    nothing = Sight([1, 2], torch.zeros(2, 2, *SIZE), torch.zeros(2, 1, *SIZE))
    alone = model(pictures, QUALITY, peers=False).pictures
    monkeypatch.setattr(aligned_refinement, "sights", lambda *_: [nothing])
    assert torch.equal(model(pictures, QUALITY, finish=lambda *_: pytest.fail("nothing is shown")).pictures, alone)
    # also without the per-pair switch: the gate is per pixel
    cleaned, features = model.clean(pictures[:1], QUALITY[:1])
    peers = [Peer(pictures[n : n + 1], torch.zeros(1, 1, *SIZE), QUALITY[n : n + 1]) for n in (1, 2)]
    fused = model.fuse(cleaned, features, QUALITY[:1], peers)
    assert not fused.shares.any()
    torch.testing.assert_close(fused.pictures[0].clamp(0, 1), alone[0])


@torch.no_grad()
def test_max_peers() -> None:
    weights = scrambled()(views(), QUALITY, max_peers=1).weights
    assert ((weights > 0).sum(1) == 2).all()  # itself and one more


@torch.no_grad()
def test_tiles_change_nothing() -> None:
    model, pictures = scrambled(), views()
    shown: list[tuple[int, Tensor]] = []
    whole, tiled = (
        model(pictures, QUALITY, maps=True, most=most, finish=lambda i, _, peers: shown.append((i, peers)))
        for most in (None, 80 * 80)
    )
    assert [i for i, _ in shown] == 2 * list(range(len(pictures)))
    assert all(x.abs().max() > 0.01 for _, x in shown)
    for (_, x), (_, in_tiles) in zip(shown[: len(pictures)], shown[len(pictures) :], strict=True):
        torch.testing.assert_close(in_tiles, x, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiled.pictures, whole.pictures, atol=1e-4, rtol=0)
    torch.testing.assert_close(tiled.weights, whole.weights, atol=1e-4, rtol=0)
    assert (tiled.maps.int() - whole.maps.int()).abs().max() <= 1


@torch.no_grad()
def test_odd_sizes() -> None:
    pictures = torch.rand(2, 3, 33, 47)
    assert scrambled()(pictures, QUALITY[:2]).pictures.shape == pictures.shape


@torch.no_grad()
def test_older_weights_with_a_learned_correction_of_the_flow_load() -> None:
    weights = scrambled().state_dict()
    AlignedRefinement(width=8).load_state_dict({**weights, "polish.first.weight": torch.zeros(32, 11, 3, 3)})
    with pytest.raises(RuntimeError, match="Unexpected"):
        AlignedRefinement(width=8).load_state_dict({**weights, "other.weight": torch.zeros(1)})


def test_colours_of_a_peer_are_matched() -> None:
    main = texture(grid(SIZE))
    side = 0.8 * main + 0.1
    torch.testing.assert_close(match_colours(side, main, torch.ones(1, 1, *SIZE)), main, atol=0.02, rtol=0)
    # nothing consistent: nothing to learn from, nothing blows up
    assert match_colours(side, main, torch.zeros(1, 1, *SIZE)).isfinite().all()


def learning_batch(side: int) -> dict[str, Tensor]:
    """Noisy main views and a cleaner peer."""
    position = grid((side, side)) + 1000 * torch.rand(4, 1, 1, 1)
    target = torch.cat([texture(p[None]) for p in position])
    return {
        "target": target,
        "decoded": target + 0.07 * torch.randn_like(target),
        "main": target + 0.05 * torch.randn_like(target),
        "peers": (target + 0.01 * torch.randn_like(target))[:, None],
        "consistency": torch.ones(4, 1, 1, side, side),
        "quality": torch.full((4,), 0.1),
        "peer_quality": torch.full((4, 1), 0.9),
    }


@pytest.mark.parametrize(("distortion", "side"), [("mse", 32), ("ms-ssim", 176)])
def test_learns_to_use_a_cleaner_peer(distortion: str, side: int) -> None:
    torch.manual_seed(0)
    model = AlignedRefinement(width=8)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    measured = []
    for _ in range(40):
        now = loss(model, learning_batch(side), distortion)
        optimiser.zero_grad()
        now.total.backward()
        optimiser.step()
        measured.append(float(now.joint))
    assert measured[0] == pytest.approx(1, abs=1e-3)
    assert measured[-1] < 0.8
    # the peerless part belongs to another stage
    assert not model.clean_out.weight.any()


def test_examples_show_one_place_through_all_views() -> None:
    """A codec without loss: main and target are equal, and so is the warped peer where it is consistent."""
    views = [texture(grid((208, 224)) + shift)[0].permute(1, 2, 0).mul(255).byte().numpy() for shift in (0, 6)]
    found = examples(views, lambda pictures, _: (pictures, pictures), np.random.default_rng(0), crops=2)
    assert found["target"].shape == (4, 3, CROP, CROP)
    assert found["peers"].shape == (4, 1, 3, CROP, CROP)
    assert torch.equal(found["main"], found["target"])
    assert torch.equal(found["decoded"], found["target"])
    sure = found["consistency"][:, 0] > 240
    assert sure.float().mean() > 0.7
    difference = (found["peers"][:, 0].float() - found["target"].float()).abs().amax(1, keepdim=True)
    assert difference[sure].mean() < 2


def test_batches_mix_scenes_of_few_and_many_views() -> None:
    """Peers come in any order; places that stay empty are not consistent."""
    shards = []
    for places in (1, 3):
        shards.append({
            "target": torch.full((2, 3, CROP, CROP), 50 * places, dtype=torch.uint8),
            "decoded": torch.full((2, 3, CROP, CROP), 50 * places, dtype=torch.uint8),
            "main": torch.full((2, 3, CROP, CROP), 50 * places, dtype=torch.uint8),
            "peers": torch.full((2, places, 3, CROP, CROP), 50 * places, dtype=torch.uint8),
            "consistency": torch.full((2, places, 1, CROP, CROP), 255, dtype=torch.uint8),
            "quality": torch.full((2,), 0.1 * places),
            "peer_quality": torch.full((2, places), 0.1 * places),
        })  # fmt: skip
    seen = set()
    for step in range(12):
        batch = batch_of(shards, 4, 128, seed=0, step=step)
        most = batch["peers"].shape[1]
        seen.add(most)
        few = batch["quality"] < 0.2
        assert not batch["consistency"][few, 1:].any()
        assert batch["peers"].shape[2:] == (3, 128, 128)
        torch.testing.assert_close(batch["target"][few].mean(), torch.tensor(50 / 255))
        again = batch_of(shards, 4, 128, seed=0, step=step)
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert seen == {1, 2, 3}
