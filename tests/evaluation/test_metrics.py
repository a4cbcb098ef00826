"""PSNR and MS-SSIM against closed forms and known values."""

import math

import numpy as np
import pytest

from mvcodec.evaluation.metrics import PSNR_CAP_DB, decibels, ms_ssim, psnr
from tests.conftest import smooth_picture


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_psnr_of_a_constant_error_is_its_closed_form(dtype):
    original = np.full((5, 7, 3), 100, dtype)
    assert psnr(original, original + dtype(4)) == pytest.approx(20 * math.log10(np.iinfo(dtype).max / 4))
    assert psnr(original, original - dtype(4)) == psnr(original, original + dtype(4))  # no wrapping


def test_psnr_averages_the_error_over_all_samples_not_the_decibels_of_channels():
    original = np.zeros((8, 8, 3), np.uint8)
    decoded = original.copy()
    decoded[..., 1] = 30  # one channel of three: MSE 300
    assert psnr(original, decoded) == pytest.approx(10 * math.log10(255**2 / 300))


def test_equal_pictures():
    picture = smooth_picture(170, 180)
    assert psnr(picture, picture) == PSNR_CAP_DB
    assert ms_ssim(picture, picture) == pytest.approx(1, abs=1e-6)


def test_ms_ssim_of_a_constant_shift_is_its_luminance_term():
    a, b = 100, 120
    c1 = (0.01 * 255) ** 2
    luminance = (2 * a * b + c1) / (a * a + b * b + c1)  # only the coarsest scale, of weight 0.1333, has one
    flat = [np.full((176, 176, 3), value, np.uint8) for value in (a, b)]
    assert ms_ssim(*flat) == pytest.approx(luminance**0.1333, abs=1e-4)


def test_ms_ssim_falls_with_noise_and_takes_grey():
    picture = smooth_picture(170, 180)
    rng = np.random.default_rng(0)
    values = [
        ms_ssim(picture, (picture + rng.normal(0, sigma, picture.shape)).clip(0, 255).astype(np.uint8))
        for sigma in (2, 8, 32)
    ]
    assert 1 > values[0] > values[1] > values[2] > 0
    assert 0.9 < ms_ssim(picture[..., 0], (picture[..., 0] // 2 * 2).astype(np.uint8)) < 1


@pytest.mark.parametrize(("side", "defined"), [(160, False), (161, True)])
def test_ms_ssim_of_small_pictures_is_no_number_instead_of_another_metric(side, defined):
    picture = smooth_picture(side, 200)
    assert math.isnan(ms_ssim(picture, picture)) is not defined


def test_decibels_of_a_similarity():
    assert decibels(0.99) == pytest.approx(20)
    assert decibels(1.0) == pytest.approx(100)
    assert math.isnan(decibels(math.nan))


def test_pictures_of_different_kinds_are_refused():
    with pytest.raises(ValueError, match="differ in kind"):
        psnr(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8))
