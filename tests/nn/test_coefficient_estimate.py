"""What a file says of each coefficient: nothing is added before it is learned, and then the same in parts as whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mvcodec.codec import decode_set, encode_image
from mvcodec.images import Image
from mvcodec.nn import coefficient_estimate
from mvcodec.nn.coefficient_estimate import CoefficientEstimate, Told, magnitudes
from mvcodec.nn.quantisation_constraint import QuantisationConstraint
from mvcodec.weights import export_model, load_model, read_entropy_path
from tests.conftest import smooth_picture

SHAPE = (2, 12, 6, 5)


def drawn(helped: bool) -> tuple[Told, list[torch.Tensor]]:
    torch.manual_seed(1)
    told = Told(torch.randint(-3, 4, SHAPE).to(torch.int8), torch.randn(SHAPE))
    return told, [torch.randn(SHAPE) for _ in range(2 + 2 * helped)]


def bold(estimate: CoefficientEstimate) -> CoefficientEstimate:
    torch.manual_seed(2)
    for parameter in estimate.parameters():
        nn.init.normal_(parameter, std=0.2)
    return estimate


@pytest.mark.parametrize("helped", [False, True])
def test_untrained_it_adds_nothing_and_parts_are_as_the_whole(helped, monkeypatch):
    told, maps = drawn(helped)
    quality = torch.tensor([0.2, 0.9])
    assert not CoefficientEstimate(12, helped)(told, quality, *maps).any()
    estimate = bold(CoefficientEstimate(12, helped))
    whole = estimate(told, quality, *maps)
    assert whole.shape == SHAPE
    assert whole.abs().max() > 0.1
    monkeypatch.setattr(coefficient_estimate, "CACHED", 5 * 2 * 30)  # channels at a time, which 12 is no multiple of
    torch.testing.assert_close(estimate(told, quality, *maps), whole)


@pytest.mark.parametrize("helped", [False, True])
def test_the_sign_is_nothing_to_it(helped):
    told, maps = drawn(helped)
    quality = torch.tensor([0.2, 0.9])
    estimate = bold(CoefficientEstimate(12, helped))
    opposite = estimate(Told(-told.symbols, told.ln_sigma), quality, *(-x for x in maps))
    torch.testing.assert_close(opposite, -estimate(told, quality, *maps))


def test_each_place_is_by_itself():
    told, maps = drawn(True)
    quality = torch.tensor([0.2, 0.9])
    estimate = bold(CoefficientEstimate(12, True))
    whole = estimate(told, quality, *maps)
    maps[3] = maps[3].clone()
    maps[3][1, 3, 2, 2] += 1
    elsewhere = (estimate(told, quality, *maps) != whole).any(1)
    assert elsewhere.sum() == 1
    assert elsewhere[1, 2, 2]


def test_magnitudes_are_of_all_channels():
    shape = (1, 40, 3, 2)
    told = Told(torch.zeros(shape, dtype=torch.int8), torch.full(shape, -1.5))
    told.symbols[:, 30:] = 2
    found = 2 * torch.tensor([-1.0, 1.0]).repeat(20)[None, :, None, None].expand(shape)
    expected = torch.tensor([np.log(0.251) / 2 + 1, np.log(4.001) / 2 + 1, -1.5])  # shares of symbols; found; ln sigma
    torch.testing.assert_close(magnitudes(told, found)[0], expected.float()[:, None, None].expand(-1, 3, 2))


@pytest.mark.parametrize("helped", [False, True])
def test_what_older_weights_do_not_know_counts_for_nothing(helped):
    """Those of before took neither `before` nor the place as a context, and not at all what peers show."""
    told, maps = drawn(helped)
    quality = torch.tensor([0.2, 0.9])
    estimate = bold(CoefficientEstimate(12, helped))
    older = dict(estimate.state_dict())
    older["first.weight"] = older["first.weight"][:, : 7 + helped]
    older |= {name: older[name][: 4 + helped] for name in ("last.weight", "last.bias")}
    new = CoefficientEstimate(12, helped)
    new.load_state_dict(older)
    with torch.no_grad():  # the same written into the bold one
        estimate.first.weight[:, 7 + helped :] = 0
        estimate.last.weight[4 + helped :] = estimate.last.bias[4 + helped :] = 0
    assert torch.equal(new(told, quality, *maps), estimate(told, quality, *maps))


def test_weights_bring_the_networks_along_or_do_not():
    with_both = QuantisationConstraint(12, 3)
    for helped in (False, True):
        bold(with_both.estimate(helped))
    state = nn.Sequential(with_both).state_dict()
    other = nn.Sequential(QuantisationConstraint(12, 3))
    other.load_state_dict(state)
    assert all(torch.equal(x, state[name]) for name, x in other.state_dict().items())
    other.load_state_dict(nn.Sequential(QuantisationConstraint(12, 3)).state_dict())
    assert other[0].alone is other[0].helped is None


def test_the_decoder_asks_them_alone_and_once_peers_have_changed_a_view(tiny_model, tmp_path):
    """The same integers and the same id; other pictures."""
    cells = tiny_model.net.cells
    wide = smooth_picture(64, 112, seed=5)
    files = [encode_image(tiny_model, Image(wide[:, s : s + 96].copy()), 40, camera_id=f"c{s}") for s in (0, 8)]
    before = [[view.pixels for view in decode_set(tiny_model, files, joint=joint)] for joint in (False, True)]
    path = tmp_path / "estimating.safetensors"
    try:
        for helped in (False, True):
            bold(cells.estimate(helped))
        kept = read_entropy_path(tiny_model.path, tiny_model.net.config)
        assert export_model(tiny_model.net, path, entropy=kept) == tiny_model.id
    finally:
        cells.alone = cells.helped = None
    model = load_model(path)
    asked = []
    for part in ("alone", "helped"):
        network = model.net.cells.get_submodule(part)
        network.register_forward_hook(lambda *_, part=part: asked.append(part))
    alone = [view.pixels for view in decode_set(model, files, joint=False)]
    assert asked == ["alone"] * 2
    together = [view.pixels for view in decode_set(model, files)]
    assert asked[2:] == ["alone", "alone", "helped", "helped"]
    for pixels, was in zip([*alone, *together], [*before[0], *before[1]], strict=True):
        assert not np.array_equal(pixels, was)
    model = replace(model, net=tiny_model.net)  # weights without them decode as ever
    assert all(np.array_equal(view.pixels, x) for view, x in zip(decode_set(model, files), before[1], strict=True))
