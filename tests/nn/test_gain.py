import torch

from mvcodec.nn.gain import QualityGain, hat_basis


def test_gains_keep_their_precision_under_autocast():
    """Training runs under it: a coefficient of a thousand steps times a rounded gain is off by several."""
    gains = QualityGain(16, 7)
    basis = hat_basis(torch.linspace(0, 1, 11), 7)
    for gain in (gains.gain, gains.inverse):
        expected = gain(basis)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(gain(basis), expected)
    found = gains.gain(basis) * gains.inverse(basis)
    torch.testing.assert_close(found, torch.ones_like(found))
