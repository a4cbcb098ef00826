"""Batches: the same crops however they are cut, other cameras' colours, sets made from one picture."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvcodec.training.config import TrainConfig
from mvcodec.training.data import load_scenes
from mvcodec.training.sampling import Batches, CropSampler, Part, other_camera
from tests.conftest import smooth_picture


@pytest.fixture
def batches(scenes_folder):
    config = TrainConfig(str(scenes_folder), "", "tiny", "joint", 5, batch=4, crop=64, max_views=4, synthesis=True)
    sampler = CropSampler(load_scenes(scenes_folder), (64, 64), 1, jitter=0.5, synthetic=0.5)
    return Batches(sampler, config)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_workers_cut_what_the_process_itself_would(batches):
    ahead = Batches(batches.sampler, replace(batches.config, workers=2))
    for (a, s), (b, t) in zip(batches.from_step(2), ahead.from_step(2), strict=True):
        assert a.dtype == torch.uint8
        assert torch.equal(a, b)
        assert torch.equal(s, t)


def test_two_processes_cut_one_batch(batches):
    for step in range(5):
        whole, quality = batches[step]
        halves = [replace(batches, rank=rank, world=2)[step] for rank in range(2)]
        if len(whole) > 1:
            assert torch.equal(torch.cat([pictures for pictures, _ in halves]), whole)
            assert torch.equal(torch.cat([t for _, t in halves]), quality)


def test_sets_have_one_to_max_views(batches):
    """With views made from one picture any number is at hand; without, as many as a scene holds."""
    assert {batches.views_at(step) for step in range(60)} == {1, 2, 3, 4}
    photographs = replace(batches, sampler=replace(batches.sampler, synthetic=0.0))
    assert {photographs.views_at(step) for step in range(60)} == {1, 2}
    fusions_alone = replace(batches, config=replace(batches.config, synthesis=False))
    assert {fusions_alone.views_at(step) for step in range(60)} == {2, 3, 4}
    single = replace(batches, config=replace(batches.config, stage="single"))
    assert {single.views_at(step) for step in range(60)} == {1}


def test_another_camera_changes_colours_alone():
    picture = smooth_picture(64, 64)
    seen = [other_camera(picture, np.random.default_rng(seed)) for seed in range(20)]
    changes = [np.abs(other.astype(int) - picture).mean() for other in seen]
    assert 3 < np.mean(changes) < 30
    for other in seen:
        for channel in range(3):  # darker stays darker: a curve per channel, nothing spatial
            order = picture[..., channel].argsort(axis=None)
            assert (np.diff(other[..., channel].ravel()[order].astype(int)) >= 0).all()


def test_jitter_is_per_view(batches):
    scenes = batches.sampler.scenes
    plain = CropSampler(scenes, (64, 64), 1).batch(0, Part.of(8, 0, 1), 2)
    jittered = CropSampler(scenes, (64, 64), 1, jitter=1.0).batch(0, Part.of(8, 0, 1), 2)
    change = (jittered.float() - plain).mean(dim=(2, 3, 4))
    assert (change != 0).all()
    assert (change[:, 0] - change[:, 1]).abs().mean() > 1


def test_scarce_sets_of_many_views_are_complemented(batches):
    sampler = batches.sampler
    scenes = [*sampler.scenes, replace(sampler.scenes[0], views=sampler.scenes[0].views * 2, shifts=((0, 0),) * 4)]
    sampler = replace(sampler, scenes=scenes, synthetic=0.3)
    assert sampler.share_made(sampler.usable(2)) == 0.3
    assert sampler.share_made(sampler.usable(4)) == 0.5  # 4 of 8 photographs are in such a scene
    assert sampler.share_made(sampler.usable(5)) == 1
    assert replace(sampler, synthetic=0.0).share_made(sampler.usable(4)) == 0
