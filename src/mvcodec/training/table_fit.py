"""Tables of y fitted to what the encoder really writes: the last step of an export, about 1 % of the bits.

Training takes y - mu for a Gaussian. At one predicted sigma the symbols have more zeros and heavier tails than that,
because the prediction is not always right; a table is free to say so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcodec.entropy.tables import Tables, fitted_tables
from mvcodec.latents import quantised, snap, walk
from mvcodec.nn.gain import hat_basis
from mvcodec.weights import Model

QUALITIES = tuple(q / 10 for q in range(11))
SYMBOLS = 512  # larger ones count as this one


@torch.inference_mode()
def fit_tables(model: Model, pictures: Sequence[Tensor]) -> Tables:
    """pictures: each [K, 3, H, W] in [0, 1], sides multiples of 64 -> tables for `model` with its sigma thresholds."""
    seen = np.zeros((len(model.gaussian), 2 * SYMBOLS + 1), dtype=np.int64)
    for views in pictures:
        for t in QUALITIES:
            seen += symbol_counts(model, views, t)
    return fitted_tables(seen)


def symbol_counts(model: Model, pictures: Tensor, t: float) -> NDArray[np.int64]:
    """pictures [K, 3, H, W], quality t in [0, 1] -> [64, 2 SYMBOLS + 1] how often each scale met each symbol."""
    net = model.net
    basis = hat_basis(torch.full((len(pictures),), t), net.config.quality_knots)
    y = net.g_a(pictures, basis) * net.gain.gain(basis)
    parts = [part.double() for part in net.config.coding_order(y)]
    width = 2 * SYMBOLS + 1
    seen = np.zeros(len(model.gaussian) * width, dtype=np.int64)

    def code(step: int, raw_mu: Tensor, ln_sigma: Tensor) -> Tensor:
        mu, index = snap(raw_mu, ln_sigma, model.sigma_thresholds)
        symbols = quantised(parts[step], mu, index)
        entries = index * width + symbols.clamp(-SYMBOLS, SYMBOLS).long() + SYMBOLS
        seen[:] += np.bincount(entries.flatten().numpy(), minlength=len(seen))
        return symbols + mu

    walk(model, net.h_a(y).round(), t, code)
    return seen.reshape(-1, width)
