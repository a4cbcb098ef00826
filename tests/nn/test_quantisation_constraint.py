"""Back into the cells: nothing moves inside, what is outside comes back, and on average nearer to what was encoded."""

import numpy as np
import torch
from torch import nn

from mvcodec.codec import _Cells, decode_set, encode_image
from mvcodec.images import Image
from mvcodec.latents import Latents
from mvcodec.nn import aligned_refinement
from mvcodec.nn.gain import hat_basis
from mvcodec.nn.quantisation_constraint import REACH, SHARE, QuantisationConstraint, correction
from tests.conftest import smooth_picture


def test_what_is_within_reach_stays_at_first_and_of_the_rest_a_share_goes_back():
    apart = torch.tensor([0.0, REACH, REACH + 0.25, -REACH - 1, 0.1]).view(1, 5, 1, 1)
    for quality in (0.0, 0.4, 1.0):
        t = torch.tensor([quality])
        share = SHARE[0] + quality * (SHARE[1] - SHARE[0])
        expected = share * torch.tensor([0.0, 0.0, 0.25, -1.0, 0.0])
        cells = QuantisationConstraint(5, 4)
        torch.testing.assert_close(cells.curve(apart, hat_basis(t, 4)).flatten(), expected)
        torch.testing.assert_close(cells.plain(apart, t).flatten(), expected)


def test_each_channel_has_a_curve_of_its_own_at_each_knot():
    cells, apart = QuantisationConstraint(2, 2), torch.tensor([0.5, -0.5]).view(1, 2, 1, 1)
    with torch.no_grad():
        cells.log_reach.copy_(torch.tensor([[0.1, 0.2], [0.3, 0.5]]).log())
        cells.share.copy_(torch.tensor([[1.0, 1.0], [2.0, 1.0]]))
        cells.slope.copy_(torch.tensor([[0.0, 0.1], [0.0, -0.1]]))
    for quality, expected in ((0.0, [0.4, -0.3 - 0.05]), (1.0, [0.4, 0.05])):
        found = cells.curve(apart, hat_basis(torch.tensor([quality]), 2))
        torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_weights_that_know_of_no_curves_have_the_plain_one():
    cells = QuantisationConstraint(2, 3)
    nn.init.ones_(cells.slope)
    nn.Sequential(cells).load_state_dict({})
    for name, values in QuantisationConstraint(2, 3).state_dict().items():
        torch.testing.assert_close(cells.state_dict()[name], values)


def test_a_correction_takes_back_what_is_astray(tiny_model):
    """The tiny codec is the KLT, whose gain and inverse gain are reciprocals: a linear and orthonormal transform."""
    net, t = tiny_model.net, torch.tensor([0.4])
    basis = hat_basis(t, net.config.quality_knots)
    gain, inverse = net.gain.gain(basis), net.gain.inverse(basis)
    with torch.inference_mode():
        y = net.g_a(torch.rand(1, 3, 64, 64), basis) * gain
        astray = torch.randn_like(y) * (torch.rand_like(y) < 0.1)
        picture = torch.rand(1, 3, 64, 64)
        moved = net.g_a(picture - correction(net.para_jd.coarse, astray, inverse), basis) * gain
        torch.testing.assert_close(moved, net.g_a(picture, basis) * gain - astray, atol=2e-3, rtol=1e-3)


def test_a_picture_spoiled_beyond_its_cells_comes_nearer(tiny_model):
    image = Image(smooth_picture(64, 96, seed=3))
    stream = encode_image(tiny_model, image, 60)
    plain = decode_set(tiny_model, [stream])[0].pixels.astype(float)
    truth = image.pixels.astype(float)
    fine = tiny_model.net.para_jd.fine
    handle = fine.register_forward_hook(lambda module, inputs, out: out + 0.1)  # no quantiser errs like that
    try:
        spoiled = decode_set(tiny_model, [stream])[0].pixels.astype(float)
    finally:
        handle.remove()
    assert np.abs(spoiled - truth).mean() < np.abs(plain + 25.5 - truth).mean() / 2


def test_the_papers_decoder_and_guessed_integers_are_left_alone(tiny_model):
    net, stream = tiny_model.net, encode_image(tiny_model, Image(smooth_picture(64, 64)), 30)
    analysed: list[int] = []
    handle, refinement = net.g_a.register_forward_hook(lambda *_: analysed.append(1)), net.refinement
    try:
        decode_set(tiny_model, [stream])
        assert len(analysed) == 1
        (view,) = decode_set(tiny_model, [stream[:-40]], partial=True)
        assert view.damage is not None
        assert view.damage.missing
        assert len(analysed) == 1
        net.refinement = None
        decode_set(tiny_model, [stream])
        assert len(analysed) == 1
    finally:
        handle.remove()
        net.refinement = refinement


def test_peers_are_drawn_back_before_they_are_seen_and_again_only_what_they_changed(tiny_model, monkeypatch):
    wide = smooth_picture(64, 112, seed=5)
    pair = [encode_image(tiny_model, Image(wide[:, s : s + 96].copy()), 40, camera_id=f"c{s}") for s in (0, 8)]
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    strangers = [pair[0], encode_image(tiny_model, Image(noise), 40, camera_id="noise")]
    seen, analysed, align = [], [], aligned_refinement.sights

    def watched(pictures, *rest):
        seen.append([(255 * x).round().byte().permute(1, 2, 0)[:64, :96].numpy() for x in pictures])
        return align(pictures, *rest)

    monkeypatch.setattr(aligned_refinement, "sights", watched)
    handle = tiny_model.net.g_a.register_forward_hook(lambda *_: analysed.append(1))
    try:
        for streams in (pair, strangers):
            alone = [view.pixels for view in decode_set(tiny_model, streams, joint=False)]
            analysed.clear()
            together = decode_set(tiny_model, streams)
            assert len(analysed) == 2  # once each: what peers change is followed by the KLT alone
            assert all(np.array_equal(a, b) for a, b in zip(seen.pop(), alone, strict=True))
        assert all(np.array_equal(view.pixels, a) for view, a in zip(together, alone, strict=True))
    finally:
        handle.remove()


def test_a_changed_picture_is_drawn_back_as_if_it_had_been_analysed(tiny_model):
    """Of the tiny codec, whose analysis is its KLT."""
    net, quality = tiny_model.net, torch.tensor([0.6])
    basis = hat_basis(quality, net.config.quality_knots)
    gain, inverse = net.gain.gain(basis), net.gain.inverse(basis)
    with torch.inference_mode():
        picture = 0.3 + 0.4 * torch.rand(1, 3, 64, 96)  # nothing is clamped
        y_hat = net.g_a(picture, basis) * gain + torch.rand(1, net.config.latent_channels, 4, 6) - 0.5
        latents = Latents(y_hat, *(torch.zeros_like(y_hat, dtype=kind) for kind in (torch.int8, torch.uint8)))
        for most in (10**6, 32 * 32):  # in one piece, in tiles
            cells = _Cells(tiny_model, latents, basis, quality, most, helped=True)
            drawn = picture[0].clone()
            cells.draw_back(drawn)
            assert (drawn - picture[0]).abs().max() > 0.001
            drawn += 0.05 * torch.rand(drawn.shape)
            apart = net.g_a(drawn[None], basis) * gain - y_hat
            expected = drawn - correction(net.para_jd.coarse, net.cells.plain(apart, quality), inverse)[0]
            cells.draw_back_again(drawn, torch.zeros_like(drawn))
            torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)


def test_only_what_peers_have_changed_goes_by_the_plain_curve(tiny_model, monkeypatch):
    wide = smooth_picture(64, 112, seed=5)
    pair = [encode_image(tiny_model, Image(wide[:, s : s + 96].copy()), 40, camera_id=f"c{s}") for s in (0, 8)]
    curves, plain, learned = [], QuantisationConstraint.plain, QuantisationConstraint.forward

    def watched(name, curve):
        return lambda *given: curves.append(name) or curve(*given)

    monkeypatch.setattr(QuantisationConstraint, "plain", staticmethod(watched("plain", plain)))
    monkeypatch.setattr(QuantisationConstraint, "forward", watched("learned", learned))
    decode_set(tiny_model, pair, joint=False)
    assert curves == ["learned", "learned"]
    decode_set(tiny_model, pair)
    assert curves[2:] == ["learned", "learned", "plain", "plain"]
