"""`encode --effort`: another file for the same decoder, and a cheaper one by the measure that training minimises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mvcodec import search
from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import UsageError
from mvcodec.images import Image
from mvcodec.nn.gain import rate_distortion_lambda
from tests.conftest import smooth_picture


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 12, (100, 150, 3))
    return (smooth_picture(100, 150) + noise).clip(0, 255).astype(np.uint8)


def cost(model, picture: np.ndarray, data: bytes, quality: float) -> float:
    """Bits and weighted squared error a pixel, of the file as it is decoded alone."""
    (view,) = decode_set(model, [data], joint=False)
    error = np.square(view.pixels.astype(float) - picture).mean()
    pixels = picture.shape[0] * picture.shape[1]
    return 8 * len(data) / pixels + float(rate_distortion_lambda(torch.tensor(quality / 100))) * error


def test_no_effort_is_one_pass(tiny_model, picture):
    assert encode_image(tiny_model, Image(picture), 60, effort=0) == encode_image(tiny_model, Image(picture), 60)


@pytest.mark.parametrize("quality", [20, 70])
def test_effort_lowers_the_cost_of_the_decoded_file(tiny_model, picture, quality):
    costs = [
        cost(tiny_model, picture, encode_image(tiny_model, Image(picture), quality, effort=effort), quality)
        for effort in (0, 2)
    ]
    assert costs[0] > costs[1]


def test_the_same_file_every_time_whatever_was_drawn_before(tiny_model, picture):
    files = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.inference_mode(seed == 2):  # callers may be in it
            files.add(encode_image(tiny_model, Image(picture), 50, effort=1))
    assert len(files) == 1


def test_grey_and_16_bits(tiny_model, picture):
    for pixels in (picture[..., 0].copy(), picture.astype(np.uint16) * 257):
        data = encode_image(tiny_model, Image(pixels), 50, effort=1)
        assert decode_set(tiny_model, [data])[0].pixels.shape == pixels.shape


def test_what_shows_less_than_a_latent_is_left_as_it_is(tiny_model, picture):
    for shown in (picture[:15], picture[:1, :1]):
        plain, sought = (encode_image(tiny_model, Image(shown), 50, effort=effort) for effort in (0, 2))
        assert plain == sought


def test_an_effort_there_is_not(tiny_model, picture):
    for effort in (-1, search.MOST_EFFORT + 1):
        with pytest.raises(UsageError, match="effort"):
            encode_image(tiny_model, Image(picture), 50, effort=effort)


def found(model, pixels: torch.Tensor, y: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    z = model.net.h_a(y)
    return search.better_latents(model, y, z, 0.6, 1, lambda rows, columns: pixels[..., rows, columns], size)


def test_latents_beside_a_seam_stay(tiny_model, monkeypatch):
    monkeypatch.setattr(search, "TILE", 4)
    pixels, y = _noise(64, 128), 3 * torch.randn(1, 32, 4, 8, generator=torch.Generator().manual_seed(0))
    changed = (found(tiny_model, pixels, y, (64, 128)) != y).any(dim=1)[0].any(dim=0)
    assert not changed[3:5].any()
    assert changed[:3].any()
    assert changed[5:].any()


def test_padding_does_not_count(tiny_model):
    y = 3 * torch.randn(1, 32, 4, 8, generator=torch.Generator().manual_seed(0))
    pixels = _noise(64, 128)
    other = pixels.clone()
    other[..., 100:] = 0
    assert torch.equal(found(tiny_model, pixels, y, (64, 100)), found(tiny_model, other, y, (64, 100)))


def _noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_a_model_for_another_measure_is_not_searched(tiny_model, picture):
    other = replace(tiny_model, about={"distortion": "ms-ssim"})
    assert encode_image(other, Image(picture), 50) == encode_image(tiny_model, Image(picture), 50)
    with pytest.raises(UsageError, match="would lower squared error, but tiny was trained for ms-ssim"):
        encode_image(other, Image(picture), 50, effort=1)
