"""The prior of z: one for each band of qualities, and the tables that a file's z is coded with."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mvcodec.container import Stream, unpack
from mvcodec.errors import ModelError
from mvcodec.latents import decode_latents, encode_latents
from mvcodec.nn.hyperprior import FactorizedPrior, asinh, band_of
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.weights import export_model, load_model
from tests.test_codec import encoded


def test_the_nearest_of_equally_spaced_qualities():
    assert [band_of(q, 7) for q in (0, 833, 834, 2499, 2500, 9166, 9167, 10000)] == [0, 0, 1, 1, 2, 5, 6, 6]
    assert [band_of(q, 1) for q in (0, 5000, 10000)] == [0, 0, 0]
    assert band_of(torch.tensor([0, 5000, 10000]), 3).tolist() == [0, 1, 2]


def prior() -> FactorizedPrior:
    """Of four channels in three bands, all different."""
    found = FactorizedPrior(4, bands=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for values in found.parameters():
            values += torch.randn(values.shape, generator=generator)
    return found


def test_each_view_is_judged_by_its_band():
    psi, z = prior(), torch.arange(-2.0, 3).expand(3, 4, 1, 5)
    found = psi.likelihood(z, torch.tensor([1.0, 0.1, 0.5]))
    tables = psi.pmf(10)[:, 8:13].unflatten(0, (3, 4))
    assert torch.allclose(found[:, :, 0], tables[[2, 0, 1]].float(), atol=1e-6)


def test_a_file_is_coded_with_the_tables_of_its_quality(tmp_path, tiny_model):
    torch.manual_seed(0)
    net = ParaHydra(config_for("tiny", hyper_bands=3))
    with torch.no_grad():
        net.z_prior.mean += torch.tensor([0.0, 5.0, 10.0]).repeat_interleave(16)[:, None, None]
    export_model(net, tmp_path / "banded.safetensors")
    model = load_model(tmp_path / "banded.safetensors")
    assert len(model.hyper) == 3 * len(tiny_model.hyper)
    y, z = torch.randn(1, 32, 8, 12), torch.full((1, 16, 2, 3), 5.0)
    sizes = []
    for quality in (0.0, 50.0, 100.0):
        latents = encode_latents(model, y, z, quality / 100, estimate=True)
        header = unpack(encoded(model, 128, 192, quality=quality)).header
        decoded = decode_latents(model, Stream(header, latents.hyper, latents.slices))
        assert torch.equal(decoded.y_hat, latents.y_hat)
        sizes.append(len(latents.hyper))
    assert sizes[1] < min(sizes[0], sizes[2]) / 2


@pytest.mark.parametrize("bands", [0, 2])
def test_tables_must_be_as_many_as_the_bands_ask_for(tmp_path, bands):
    path = tmp_path / "m.safetensors"
    export_model(ParaHydra(config_for("tiny")), path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    about["config"] = about["config"].replace('"hyper_bands": 1', f'"hyper_bands": {bands}')
    save_file(load_file(path), path, about)
    with pytest.raises(ModelError):
        load_model(path)


def test_asinh_is_asinh():
    x = torch.cat((torch.linspace(-300, 300, 6001), torch.logspace(-9, 4, 200), torch.zeros(1)))
    torch.testing.assert_close(asinh(x), torch.asinh(x), rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(asinh(x.clone().requires_grad_()).detach(), asinh(x), rtol=1e-6, atol=3e-7)
