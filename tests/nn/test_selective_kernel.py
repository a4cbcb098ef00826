"""SKM: a per-channel choice between two receptive fields, made from the whole map."""

import torch

from mvcodec.nn.selective_kernel import SelectiveKernel
from tests.nn.test_parallax_attention import maps


def test_output_lies_between_the_two_branches():
    skm = SelectiveKernel(8).double()
    x = maps(0, 2, 8, 6, 7)
    small, large, out = skm.conv3(x), skm.conv5(x), skm(x)
    low, high = torch.minimum(small, large), torch.maximum(small, large)
    assert ((out >= low - 1e-12) & (out <= high + 1e-12)).all()


def test_the_choice_is_one_per_channel_and_sees_the_whole_map():
    skm = SelectiveKernel(8).double()
    x = maps(0, 1, 8, 12, 12)
    weight = (skm(x) - skm.conv5(x)) / (skm.conv3(x) - skm.conv5(x))
    torch.testing.assert_close(weight, weight[:, :, :1, :1].expand_as(weight))
    far = x.clone()
    far[..., -1, -1] += 5  # outside the reach of both branches at the first position
    assert (skm(far)[0, :, 0, 0] != skm(x)[0, :, 0, 0]).all()
