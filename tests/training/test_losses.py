"""The objective: both distortions fall with the error, and can be learned from."""

import pytest
import torch

from mvcodec.evaluation.metrics import ms_ssim
from mvcodec.nn.gain import rate_distortion_lambda
from mvcodec.training.losses import BEYOND, DISTORTIONS, dissimilarity, loss_of, sample_quality
from tests.conftest import smooth_picture


@pytest.fixture
def pictures():
    return torch.stack([torch.from_numpy(smooth_picture(192, 192, seed)) for seed in range(2)])[:, None] / 255


def planar(pictures):
    return pictures.permute(0, 1, 4, 2, 3).float()


@pytest.mark.parametrize("distortion", DISTORTIONS)
def test_loss_weighs_bits_and_distortion(pictures, distortion):
    pictures, t, bits = planar(pictures), torch.full((2, 1), 0.5), torch.full((2, 1), 192.0 * 192)
    decoded = (pictures + 0.05 * torch.randn(pictures.shape)).requires_grad_()
    perfect = loss_of(pictures, pictures, bits, t, distortion)
    assert perfect.loss.item() == pytest.approx(1, abs=1e-4)
    assert perfect.bpp == 1
    noisy = loss_of(pictures, decoded, bits, t, distortion)
    assert noisy.loss > 1.01
    assert noisy.mse.item() == pytest.approx(0.05**2, rel=0.1)
    noisy.loss.backward()
    assert torch.isfinite(decoded.grad).all()
    better = loss_of(pictures, decoded - 1e-3 * decoded.grad / decoded.grad.abs().max(), bits, t, distortion)
    assert better.loss < noisy.loss


def test_dissimilarity_is_what_evaluation_measures(pictures):
    other = (pictures * 255 + 20 * torch.rand(pictures.shape)).clamp(0, 255).byte()
    found = dissimilarity(planar(pictures), planar(other) / 255)
    assert found.shape == (2, 1)
    for i in range(2):
        measured = ms_ssim((pictures[i, 0] * 255).byte().numpy(), other[i, 0].numpy())
        assert 1 - found[i, 0].item() == pytest.approx(measured, abs=2e-3)


def test_qualities_are_spread_over_the_batch():
    t = sample_quality(3, 1, 4, 2)
    assert t.shape == (4, 2)
    edges = torch.linspace(-BEYOND, 1 + BEYOND, 9).clip(0, 1)
    ordered = t.flatten().sort().values
    assert ((edges[:-1] <= ordered) & (ordered <= edges[1:])).all()
    assert torch.equal(t, sample_quality(3, 1, 4, 2))
    assert not torch.equal(t, sample_quality(4, 1, 4, 2))
    assert (rate_distortion_lambda(t) > 0).all()
