"""The dead zone: how wide it is, and what it makes zero."""

import numpy as np
import torch

from mvcodec.entropy.tables import SIGMAS
from mvcodec.latents import dead_zones, quantised
from mvcodec.nn.dead_zone import rounded, threshold
from mvcodec.nn.hyperprior import gaussian_likelihood


def test_the_rarer_a_one_the_wider_the_zone():
    zones = threshold(torch.from_numpy(np.log(SIGMAS)))
    assert (zones.diff() <= 0).all()
    assert 0 <= zones[-1] - 0.5 < 1e-4
    assert 0.6 < zones[0] < 0.75


def test_the_zone_follows_the_price_of_a_one():
    ln_sigma = torch.linspace(-2, 3, 30, dtype=torch.float64)
    price = torch.log2(gaussian_likelihood(torch.zeros(30), ln_sigma) / gaussian_likelihood(torch.ones(30), ln_sigma))
    share = (threshold(ln_sigma) - 0.5) / price
    assert torch.allclose(share, share[:1].expand(30), rtol=1e-4)


def test_only_ones_become_zero():
    residual = torch.tensor([-2.51, -1.49, -0.62, -0.58, 0.2, 0.58, 0.62, 1.51])
    assert rounded(residual, torch.tensor(0.6)).tolist() == [-3, -1, -1, 0, 0, 0, 1, 2]


def test_the_encoder_takes_the_zone_of_each_scale():
    index, zones = torch.arange(64), dead_zones(torch.device("cpu"))
    mu = torch.full((64,), 0.25, dtype=torch.float64)
    inside, outside = mu - zones + 1e-6, mu - zones - 1e-6
    assert (quantised(inside, mu, index) == 0).all()
    assert (quantised(outside, mu, index)[1:] == -1).all()  # the lowest scale is not coded
    assert ((inside - mu).round()[1:32] == -1).all()
