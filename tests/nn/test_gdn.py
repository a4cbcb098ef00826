"""GDN divides by what its parameters say, and is CompressAI's, forwards and backwards."""

import pytest
import torch

from mvcodec.nn.gdn import GDN


def disturbed(inverse: bool) -> GDN:
    torch.manual_seed(0)
    layer = GDN(6, inverse)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def test_gdn_divides_and_its_inverse_multiplies():
    layer, inverse = disturbed(False), disturbed(True)
    x = torch.randn(2, 6, 5, 7)
    energy = torch.einsum("oc,nchw->nohw", layer.gamma.clamp(min=2**-18).square(), x.square())
    scale = (energy + layer.beta.clamp(min=1e-3).square()[:, None, None]).sqrt()
    torch.testing.assert_close(layer(x), x / scale)
    torch.testing.assert_close(inverse(x), x * scale)


@pytest.mark.slow  # CompressAI takes seconds to import
@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_is_compressais(inverse):
    peer = pytest.importorskip("compressai.layers", reason="CompressAI comes with the extra `peers`")
    ours, theirs = GDN(6, inverse), peer.GDN(6, inverse)
    torch.testing.assert_close(ours.beta, theirs.beta)
    torch.testing.assert_close(ours.gamma, theirs.gamma)
    ours = disturbed(inverse)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.gamma.grad, theirs.gamma.grad)
    torch.testing.assert_close(ours.beta.grad, theirs.beta.grad)
