"""The wiring: sizes of the paper's model, independence of the cameras, every switch runs."""

import copy

import pytest
import torch

from mvcodec.nn.gain import hat_basis
from mvcodec.parahydra import ParaHydra, config_for


def millions(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_paper_profile_has_the_paper_sizes():
    net = ParaHydra(config_for("paper"))
    assert millions(net) == pytest.approx(27.95, rel=0.02)
    assert millions(net.g_a) == pytest.approx(2.89, rel=0.01)
    assert millions(net.para_jd.coarse) + millions(net.para_jd.fine) == pytest.approx(2.89, rel=0.01)
    assert millions(net.h_a) + millions(net.h_s) + millions(net.z_prior) == pytest.approx(5.49, rel=0.01)
    assert [millions(f) for f in net.para_jd.fusions] == pytest.approx([5.61, 5.61], rel=0.01)
    assert millions(net.para_em) == pytest.approx(5.47, rel=0.02)


@pytest.fixture(scope="module")
def net() -> ParaHydra:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ParaHydra(config_for("tiny"))
        for name, parameter in net.named_parameters():  # nothing may hide behind a zero start
            if name.endswith(("fusion.gain", "conv2.weight")):
                torch.nn.init.normal_(parameter, std=0.1)
    return net.double()


def test_encoder_of_one_camera_never_sees_another(net):
    pictures = torch.rand(1, 3, 3, 64, 64, requires_grad=True)
    out = copy.deepcopy(net).float()(pictures, torch.full((1, 3), 0.5))
    (gradient,) = torch.autograd.grad(out.bits[0, 1], pictures)
    reached = gradient.abs().sum(dim=(2, 3, 4))[0]
    assert reached[1] > 0
    assert reached[0] == reached[2] == 0


def test_joint_decoder_reads_every_view_and_separate_decoding_none_but_its_own(net):
    y_hat = torch.randn(1, 3, 32, 4, 4, dtype=torch.float64, requires_grad=True)
    basis = hat_basis(torch.full((3,), 0.5, dtype=torch.float64), 3)[None]
    for joint in (True, False):
        picture = net.para_jd(y_hat, basis, joint)[0, 1]
        (gradient,) = torch.autograd.grad(picture.sum(), y_hat)
        reached = gradient.abs().sum(dim=(2, 3, 4))[0] > 0
        assert reached.tolist() == ([True, True, True] if joint else [False, True, False])


def test_separate_decoding_is_joint_decoding_of_a_lone_view(net):
    y_hat = torch.randn(1, 2, 32, 4, 4, dtype=torch.float64)
    basis = hat_basis(torch.tensor([0.2, 0.7], dtype=torch.float64), 3)[None]
    apart = net.para_jd(y_hat, basis, joint=False)
    for k in range(2):
        torch.testing.assert_close(apart[:, k : k + 1], net.para_jd(y_hat[:, k : k + 1], basis[:, k : k + 1]))


def test_order_of_views_does_not_change_their_pictures(net):
    y_hat = torch.randn(1, 4, 32, 4, 4, dtype=torch.float64)
    basis = hat_basis(torch.tensor([0.1, 0.4, 0.6, 1.0], dtype=torch.float64), 3)[None]
    order = [2, 0, 3, 1]
    torch.testing.assert_close(net.para_jd(y_hat[:, order], basis[:, order]), net.para_jd(y_hat, basis)[:, order])


@pytest.mark.parametrize(
    "switches",
    [
        {"joint": "hpa"},
        {"joint": "vpa"},
        {"joint": "attention2d"},
        {"joint": "average"},
        {"joint": "none"},
        {"channel_context": "plain"},
        {"global_context": "mlic"},
        {"channel_context": "plain", "global_context": "mlic"},  # MLIC instead of Para-EM
    ],
)
def test_every_ablation_runs_and_trains(switches):
    net = ParaHydra(config_for("tiny", **switches))
    out = net(torch.rand(1, 2, 3, 64, 64), torch.rand(1, 2))
    (out.bits.mean() / 4096 + out.pictures.square().mean()).backward()
    assert out.pictures.shape == (1, 2, 3, 64, 64)
    assert (out.bits > 0).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_paper_profile_runs():
    small = {"latent_channels": 32, "hyper_channels": 16, "prior_channels": 32, "slices": 4}
    net = ParaHydra(config_for("paper", **small, parameter_widths=(16,), fusion_widths=(16, 16)))
    out = net(torch.rand(1, 2, 3, 64, 64), torch.rand(1, 2))
    assert out.pictures.shape == (1, 2, 3, 64, 64)


def test_hat_basis_interpolates_between_neighbouring_knots():
    basis = hat_basis(torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64), 6)
    torch.testing.assert_close(basis.sum(dim=1), torch.ones(3, dtype=torch.float64))
    assert basis[0].tolist() == [1, 0, 0, 0, 0, 0]
    torch.testing.assert_close(basis[1], torch.tensor([0.5, 0.5, 0, 0, 0, 0], dtype=torch.float64))
    assert basis[2].tolist() == [0, 0, 0, 0, 0, 1]
