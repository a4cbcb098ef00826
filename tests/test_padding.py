"""What the codec's grid holds beyond a picture's edge: calm pixels, and latents that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mvcodec.codec import encode_image
from mvcodec.container import Stream, unpack
from mvcodec.images import Image
from mvcodec.latents import decode_latents, encode_latents
from mvcodec.padding import extended, shown
from tests.conftest import smooth_picture


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(20, 9), (9, 20, 3), (1, 1, 3)])
def test_lines_beyond_an_edge_are_means_of_its_nearest_samples(shape, dtype):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    height, width = shape[:2]
    whole = extended(pixels, 5, 7)
    assert whole.dtype == dtype
    assert whole.shape == (height + 5, width + 7, *shape[2:])
    assert np.array_equal(whole[:height, :width], pixels)
    for edge, line, d in ((pixels[:, -1], whole[:height, width + 3], 4), (whole[height - 1], whole[height + 2], 3)):
        for i in range(len(edge)):
            near = edge[max(i - d, 0) : i + d + 1].astype(float).mean(axis=0)
            assert np.abs(line[i] - near).max() <= 0.5


def test_a_picture_that_fills_the_grid_is_left_alone():
    pixels = smooth_picture(64, 128)
    assert extended(pixels, 0, 0) is pixels
    assert shown((64, 128), torch.zeros(1, 32, 4, 8)) is None


def test_a_latent_that_holds_a_single_row_of_the_picture_is_shown():
    mask = shown((65, 48), torch.zeros(1, 32, 8, 4))
    assert mask is not None
    assert mask[0, 0].tolist() == [[1, 1, 1, 1]] * 5 + [[0] * 4] * 3  # a column beyond, as 48 is a latent's border
    mask = shown((65, 47), torch.zeros(1, 32, 8, 4))
    assert mask is not None
    assert mask[0, 0].tolist() == [[1, 1, 1, 0]] * 5 + [[0] * 4] * 3


def test_latents_that_show_nothing_have_no_say(tiny_model):
    """Whatever the analysis finds there, the file is the same: its symbols are zero, y_hat what the decoder expects."""
    torch.manual_seed(0)
    y, z = 3 * torch.randn(1, 32, 8, 12), torch.randn(1, 16, 2, 3)
    seen = shown((100, 150), y)
    assert seen is not None
    first, second = (encode_latents(tiny_model, y + 50 * k * (1 - seen), z, 0.5, shown=seen) for k in (0, 1))
    all_shown = encode_latents(tiny_model, y, z, 0.5)
    assert first.slices == second.slices
    sizes = [sum(len(section) for part in x.slices for section in part.sections) for x in (first, all_shown)]
    assert sizes[0] < sizes[1]
    header = unpack(encode_image(tiny_model, Image(smooth_picture(100, 150)), 50)).header
    decoded = decode_latents(tiny_model, Stream(header, first.hyper, first.slices))
    assert torch.equal(decoded.y_hat, first.y_hat)
    inside = seen.bool().expand_as(y)
    assert ((decoded.y_hat - y).abs()[inside] <= 0.5 + 1 / 64).float().mean() > 0.9
