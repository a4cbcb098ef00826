"""The KLT start is the best linear codec of its pictures, at step 0."""

import numpy as np
import torch

from mvcodec.nn.gain import hat_basis
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.training.data import Scene
from mvcodec.training.klt import block_covariance
from tests.conftest import smooth_picture


def started(latent_channels: int) -> tuple[ParaHydra, torch.Tensor]:
    views = tuple(smooth_picture(96, 96, seed) for seed in range(4))
    net = ParaHydra(config_for("tiny", latent_channels=latent_channels))
    covariance = block_covariance([Scene("smooth", views, ((0, 0),) * 4)], blocks_per_view=400)
    net.start_as_klt(covariance)
    return net, covariance


def test_analysis_is_orthonormal_and_synthesis_its_transpose():
    net, _ = started(32)
    rows = net.g_a.klt.weight.flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(net.para_jd.coarse.klt.weight[:, :, 0, 0].T, rows)


def test_what_is_lost_is_the_energy_of_the_dropped_components():
    net, covariance = started(32)
    picture = torch.from_numpy(smooth_picture(96, 96, 0)).permute(2, 0, 1)[None].float() / 255
    basis = hat_basis(torch.zeros(1), 3)
    decoded = net.para_jd(net.g_a(picture, basis)[:, None], basis[:, None])[:, 0]
    dropped = torch.linalg.eigvalsh(covariance)[:-32].clamp(min=0).sum() / 768  # of the mean block
    error = (decoded - picture).square().mean()
    assert error < 10 * dropped + 1e-4
    assert -10 * np.log10(error.item()) > 30


def test_spread_of_the_latents_is_what_the_entropy_model_expects():
    net, _ = started(32)
    pictures = torch.stack([torch.from_numpy(smooth_picture(96, 96, s)).permute(2, 0, 1) for s in range(4)])
    y = net.g_a(pictures.float() / 255, hat_basis(torch.zeros(4), 3))
    measured = y.square().mean(dim=(0, 2, 3)).sqrt()
    predicted = net.para_em.ln_spread[:, 0, 0].exp()
    torch.testing.assert_close(measured[:4], predicted[:4], rtol=0.4, atol=0)
