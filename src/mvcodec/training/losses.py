"""The training objective: Eq. (6) per view, each at a quality of its own, distortion as MSE or MS-SSIM."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvcodec.errors import UsageError
from mvcodec.nn.gain import rate_distortion_lambda

DISTORTIONS = ("mse", "ms-ssim")
BEYOND = 0.05  # of the scale of qualities: drawn from so much more at both ends, and clipped
MS_SSIM_FACTOR = 1280.0  # lambda of 1 - MS-SSIM over lambda of 255^2 MSE: the middle of CompressAI's eight pairs


class Objective(NamedTuple):
    """Means over the views: what is minimised, the bits per pixel in it, and the plain MSE whatever the distortion."""

    loss: Tensor
    bpp: Tensor
    mse: Tensor


def check_distortion(name: str) -> None:
    """UsageError if there is no such distortion."""
    if name not in DISTORTIONS:
        raise UsageError(f"distortion {name!r} is none of {', '.join(DISTORTIONS)}")


def sample_quality(step: int, seed: int, batch: int, views: int) -> Tensor:
    """t [B, K] in [0, 1], the ends a little more often: stratified over the batch; views of one scene differ."""
    rng = np.random.default_rng((seed, step, 1))
    strata = (rng.permutation(batch * views) + rng.random(batch * views)) / (batch * views)
    return torch.from_numpy(((1 + 2 * BEYOND) * strata - BEYOND).clip(0, 1).reshape(batch, views)).float()


def loss_of(pictures: Tensor, decoded: Tensor, bits: Tensor, t: Tensor, distortion: str = "mse") -> Objective:
    """Eq. (6) per view, weighted by lambda^-1/4 so that no rate drowns the others. Pictures [B, K, 3, H, W]."""
    bpp = bits / (pictures.shape[-1] * pictures.shape[-2])
    mse = distortion_of(pictures, decoded, "mse")
    lam = rate_distortion_lambda(t)
    weight = (lam / rate_distortion_lambda(torch.full_like(t, 0.5))) ** -0.25
    cost = 255**2 * mse if distortion == "mse" else MS_SSIM_FACTOR * dissimilarity(pictures, decoded)
    return Objective((weight * (bpp + lam * cost)).mean(), bpp.mean(), mse.mean())


def distortion_of(pictures: Tensor, decoded: Tensor, distortion: str) -> Tensor:
    """Mean squared error of samples in [0, 1], or 1 - MS-SSIM, of each view: [B, K, 3, H, W] -> [B, K]."""
    if distortion == "ms-ssim":
        return dissimilarity(pictures, decoded)
    return (decoded - pictures).square().mean(dim=(2, 3, 4))


def dissimilarity(pictures: Tensor, decoded: Tensor) -> Tensor:
    """1 - MS-SSIM (Wang et al. 2003) of each view: [B, K, 3, H, W] in [0, 1] -> [B, K]. Sides of at least 161."""
    from pytorch_msssim import ms_ssim

    similarity = ms_ssim(decoded.flatten(0, 1), pictures.flatten(0, 1), data_range=1.0, size_average=False)
    return 1 - similarity.unflatten(0, pictures.shape[:2])
