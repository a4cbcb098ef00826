"""Tiles change nothing: each stage's reach holds, and a picture in tiles is the picture."""

from __future__ import annotations

import pytest
import torch

from mvcodec.errors import UsageError
from mvcodec.nn.aligned_refinement import AlignedRefinement
from mvcodec.nn.gain import hat_basis
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.tiling import (
    PROGRAM,
    STEADYING,
    footprint,
    fused_at_once,
    pixels_at_once,
    pixels_in_walks,
    steadied_at_once,
    tiled,
)

STAGES = ("g_a", "coarse", "fine", "clean")


@pytest.fixture(scope="module", params=["fast", "paper"])
def net(request) -> ParaHydra:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        narrow = {"latent_channels": 32, "hyper_channels": 16, "prior_channels": 32, "slices": 4, "block_channels": 16}
        net = ParaHydra(config_for(request.param, **narrow, fusion_widths=(16, 16), fine_widths=(8, 16)))
        for parameter in net.parameters():
            if not parameter.any():  # nothing may hide behind a zero start
                torch.nn.init.normal_(parameter, std=0.1)
    return net.double().requires_grad_(False).eval()


def stage(net: ParaHydra, name: str):
    """(module, run, input channels, positions of the input per 64 pixels); two views of different quality."""
    t = torch.tensor([0.4, 0.9], dtype=torch.float64)
    basis = hat_basis(t, net.config.quality_knots)
    m, middle = net.config.latent_channels, 192 if net.config.transform == "klt" else net.config.latent_channels
    if name == "g_a":
        return net.g_a, lambda x, views: net.g_a(x, basis[views]), 3, 64
    if name == "coarse":
        return net.para_jd.coarse, lambda x, views: net.para_jd.coarse(x, basis[views]), m, 4
    if name == "fine":
        return net.para_jd.fine, lambda x, views: net.para_jd.fine(x, basis[views]), middle, 8 if middle == 192 else 16
    refinement: AlignedRefinement = net.refinement
    return refinement, lambda x, views: refinement.clean(x, t[views])[0], 3, 64


@pytest.mark.parametrize("name", STAGES)
def test_nothing_beyond_the_reach_is_seen(net, name):
    module, run, channels, unit = stage(net, name)
    seen = footprint(module, run, torch.zeros(1, channels, unit, unit, dtype=torch.float64))
    assert seen.reach % seen.grid == 0
    side = -(-(2 * seen.reach + 3 * seen.grid) // unit) * unit
    x = torch.rand(1, channels, side, side, dtype=torch.float64, requires_grad=True)
    out = run(x, slice(0, 1))
    at = out.shape[-1] // 2
    (gradient,) = torch.autograd.grad(out[0, :, at, at].sum(), x)
    reached = gradient[0].abs().sum(0).nonzero()
    here = at * side // out.shape[-1] // seen.grid * seen.grid  # first position of the block that the output stands for
    assert reached.min() >= here - seen.reach
    assert reached.max() < here + seen.grid + seen.reach


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_in_tiles_is_the_stage(net, name):
    if (name, net.config.profile) == ("clean", "paper"):
        pytest.skip("the refinement is the same in both profiles")
    module, run, channels, unit = stage(net, name)
    x = torch.rand(2, channels, 3 * unit, 5 * unit, dtype=torch.float64)
    whole = run(x, slice(0, 2))
    for most in (1, x[0, 0].numel(), x[:, 0].numel()):  # tiles, view by view, all at once
        torch.testing.assert_close(tiled(module, run, x, most), whole, rtol=1e-6, atol=1e-6)


def test_budgets_that_are_promised():
    """What docs/performance.md says fits, does by the constants that were measured; what cannot is refused at once."""
    square, full_hd = 8192 * 8192, 1920 * 1080
    assert pixels_at_once("klt", square, 1, 24 << 30) > 9_000_000
    assert pixels_at_once("klt", square, 2, 24 << 30, peers=1) > 9_000_000
    assert pixels_at_once("klt", full_hd, 16, 12 << 30, peers=15) > full_hd
    with pytest.raises(UsageError, match="--preview"):
        pixels_at_once("klt", square, 2, 16 << 30, peers=1)
    assert pixels_at_once("klt", square, 2, 16 << 30) > 9_000_000
    # hold 84 MB; a tile of the refinement is less than steadying's
    pair = {"pixels": 512 * 512, "views": 2, "peers": 1}
    with pytest.raises(UsageError):
        pixels_at_once("klt", max_memory=PROGRAM + 80_000_000 + STEADYING, **pair)
    assert pixels_at_once("klt", max_memory=PROGRAM + 90_000_000 + STEADYING, **pair) > 400 * 400
    # networks in float32 hold and work on more
    short, wide = (pixels_at_once("klt", full_hd, 2, 2 << 30, peers=1, bfloat16=short) for short in (True, False))
    assert (2 << 30) - PROGRAM > full_hd * (2 * 140 + 80) + 375 * wide > full_hd * (2 * 120 + 80) + 250 * short
    # on several cores no more at a time than what remains pays for
    most = pixels_at_once("klt", full_hd, 16, 12 << 30, peers=15)
    assert fused_at_once(most, full_hd, 15) * full_hd * (250 + 15 * 80) <= 250 * most + 15 * 80 * full_hd
    assert fused_at_once(full_hd - 2, full_hd, 1) == 1
    assert steadied_at_once(9_000_000) > 2
    assert pixels_in_walks(None) >= 6 * 1024 * 832
    assert pixels_in_walks(1 << 30) < full_hd
