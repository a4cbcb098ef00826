"""Fidelity of a decoded picture: PSNR and MS-SSIM over all samples, as papers report them."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

PSNR_CAP_DB = 100.0  # of two equal pictures, whose PSNR is infinite
MS_SSIM_MIN_SIDE = 161  # five scales, each half the last, of an 11 x 11 window


def psnr(original: Pixels, decoded: Pixels) -> float:
    """Decibels over all samples, R, G and B alike, against the full range of their type; at most `PSNR_CAP_DB`."""
    _check_alike(original, decoded)
    peak = np.iinfo(original.dtype).max
    mse = float(np.mean((original.astype(np.float64) - decoded) ** 2))
    return min(PSNR_CAP_DB, 10 * math.log10(peak**2 / mse)) if mse else PSNR_CAP_DB


def ms_ssim(original: Pixels, decoded: Pixels) -> float:
    """Multi-scale structural similarity (Wang et al. 2003), 1 for equal pictures.

    nan where a side is under `MS_SSIM_MIN_SIDE`: fewer scales would be another metric under the same name.
    """
    import torch
    from pytorch_msssim import ms_ssim as multi_scale

    _check_alike(original, decoded)
    if min(original.shape[:2]) < MS_SSIM_MIN_SIDE:
        return math.nan
    a, b = (
        torch.from_numpy(np.atleast_3d(pixels).astype(np.float32)).permute(2, 0, 1)[None]
        for pixels in (original, decoded)
    )
    return float(multi_scale(a, b, data_range=np.iinfo(original.dtype).max))


def decibels(similarity: float) -> float:
    """MS-SSIM on a scale that is nearly linear in the logarithm of the rate: -10 log10(1 - MS-SSIM)."""
    return -10 * math.log10(max(1 - similarity, 1e-10))


def _check_alike(original: Pixels, decoded: Pixels) -> None:
    if original.shape != decoded.shape or original.dtype != decoded.dtype:
        raise ValueError(f"pictures differ in kind: {original.dtype} {original.shape}, {decoded.dtype} {decoded.shape}")
