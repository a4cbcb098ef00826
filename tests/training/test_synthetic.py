"""Synthetic views obey geometry: stillness, the displacement asked for, the nearer layer in front."""

import numpy as np
import pytest
import torch

from mvcodec.training.synthetic import LAYERS, Camera, layer_index, random_camera, render, smooth_field, synthetic_views
from tests.conftest import smooth_picture

SIZE = 64
CROP = (SIZE, SIZE)
INNER = slice(16, 80)  # the crop within a picture of 96


def tensor(picture):
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (96, 96, 3)).astype(np.uint8)


@pytest.fixture
def square():
    """A near square [32:64, 32:64] before a far wall."""
    index = np.zeros((96, 96), np.int64)
    index[32:64, 32:64] = 1
    return index


def moved(down, right):
    return Camera(np.eye(3), (down, right))


@pytest.mark.parametrize("side", [96, 97])
def test_a_camera_that_stands_still_sees_the_picture_itself(side):
    picture = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    index = layer_index(smooth_field(side, side, np.random.default_rng(1)))
    assert set(np.unique(index)) == set(range(LAYERS))
    seen = render(tensor(picture), index, [0.0, 0.5, 1.0], Camera.still(), CROP)
    top = (side - SIZE) // 2
    assert any(
        np.array_equal(seen, picture[r : r + SIZE, c : c + SIZE]) for r in (top, top + 1) for c in (top, top + 1)
    )


def test_each_layer_moves_by_its_disparity(picture, square):
    seen = render(tensor(picture), square, [0.0, 0.5], moved(8, -12), CROP)
    # The square moves by half the baseline, 4 down and 6 to the left; the wall stays.
    assert np.array_equal(seen[32 - 16 + 4 : 64 - 16 + 4, 32 - 16 - 6 : 64 - 16 - 6], picture[32:64, 32:64])
    assert np.array_equal(seen[:16], picture[16:32, INNER])


def test_the_nearer_layer_covers_and_what_it_uncovers_belongs_to_the_wall(picture, square):
    first, second = (render(tensor(picture), square, [0.0, 1.0], moved(0, shift), CROP) for shift in (16, 24))
    assert not np.array_equal(first[16:48, 40:48], picture[32:64, 56:64])  # wall behind the square: hidden
    assert np.array_equal(first[16:48, 32:64], picture[32:64, 32:64])
    # Both cameras uncover the same 16 columns: one world, seen twice, and it is not the square.
    assert np.array_equal(first[16:48, 16:32], second[16:48, 16:32])
    assert not np.array_equal(first[16:48, 16:32], picture[32:64, 32:48])
    assert np.array_equal(first[16:48, 16:32], picture[:, ::-1][32:64, 32:48])  # its filler


def test_a_homography_moves_everything_alike(picture, square):
    shift = np.array([[1, 0, 5], [0, 1, -7], [0, 0, 1]], np.float64)  # source x, y of target x, y
    seen = render(tensor(picture), square, [0.0, 1.0], Camera(shift, (0, 0)), CROP)
    assert np.array_equal(seen, picture[16 - 7 : 80 - 7, 16 + 5 : 80 + 5])


def test_random_views_show_one_place_with_parallax():
    picture = smooth_picture(200, 240)
    views = synthetic_views(picture, 4, CROP, np.random.default_rng(0))
    again = synthetic_views(picture, 4, CROP, np.random.default_rng(0))
    assert views.shape == (4, SIZE, SIZE, 3)
    assert np.array_equal(views, again)
    pairs = [np.abs(views[i].astype(int) - views[j]).mean() for i in range(4) for j in range(i)]
    assert min(pairs) > 0
    assert max(pairs) < 60  # of unrelated places it is 70 and more
    cameras = [random_camera(CROP, np.random.default_rng(seed)) for seed in range(20)]
    assert len({camera.baseline for camera in cameras}) == 20
    assert all(np.abs(camera.homography - np.eye(3)).max() < 0.2 for camera in cameras)


def test_a_picture_no_larger_than_the_crop_will_do():
    picture = smooth_picture(SIZE, SIZE)
    views = synthetic_views(picture, 2, CROP, np.random.default_rng(3))
    assert any(np.array_equal(view, picture) for view in views)
