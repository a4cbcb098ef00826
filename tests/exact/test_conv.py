"""Exact convolutions: every back end gives the integers of the definition, and no other layer is let through."""

import numpy as np
import pytest
import torch

from mvcodec.errors import ModelError
from mvcodec.exact.arithmetic import Fixed
from mvcodec.exact.check import attaining, reference
from mvcodec.exact.conv import Conv, ConvTranspose, Integers
from mvcodec.exact.fixed import ACTIVATION_LIMIT, exp_table
from mvcodec.exact.proof import FLOAT32_BOUND, Backend, choose_backend

FIXED = Fixed(torch.from_numpy(exp_table()).double())
LAYERS = {
    "dense": lambda: Conv(8, 6, 3),
    "wide kernel": lambda: Conv(4, 6, 5),
    "depthwise": lambda: Conv(8, 8, 3, groups=8),
    "1x1": lambda: Conv(16, 6, 1),
    "transposed": lambda: ConvTranspose(6, 4),
}
# name -> (largest |weight|, input limit)
PRECISIONS = {Backend.FLOAT32: (60, 127), Backend.SPLIT: (300, ACTIVATION_LIMIT), Backend.FLOAT64: (32767, 32767)}


def drawn(layer, backend: Backend, seed: int = 0) -> Integers:
    """Random integers for which the proof chooses `backend`."""
    largest, limit = PRECISIONS[backend]
    rng = np.random.default_rng(seed)
    out, into = layer._channels
    shape = tuple(layer.weight.shape)
    return Integers(
        (rng.integers(largest // 2, largest + 1, shape) * rng.choice([-1, 1], shape)).astype(np.int16),
        rng.integers(-4000, 4001, out).astype(np.int32),
        rng.integers(1, 13, out).astype(np.int8),
        rng.integers(0, 5, into).astype(np.int8) * np.int8(limit < ACTIVATION_LIMIT),
        limit,
    )


def inputs(layer, kind: str) -> np.ndarray:
    shape = (2, layer._channels[1], 7, 6)
    if kind == "saturated":
        return np.full(shape, ACTIVATION_LIMIT, dtype=np.int64)
    rng = np.random.default_rng(5)
    return rng.integers(-ACTIVATION_LIMIT, ACTIVATION_LIMIT + 1, shape) >> (0 if kind == "large" else 6)


@pytest.mark.parametrize("kind", ["large", "small", "saturated"])
@pytest.mark.parametrize("backend", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_backend_computes_the_definition(name, backend, kind):
    layer = LAYERS[name]()
    integers = drawn(layer, backend)
    layer.set_integers(integers)
    assert layer.backend == backend
    x = inputs(layer, kind)
    with torch.no_grad():
        found = FIXED.convolve(layer, torch.from_numpy(x).float())
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), reference(layer, x))


@pytest.mark.parametrize("backend", PRECISIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_input_that_attains_the_bound_is_exact(name, backend):
    """limit * sign(w) behind one output: the largest sum there is. Random inputs come nowhere near it."""
    layer = LAYERS[name]()
    integers = drawn(layer, backend)
    layer.set_integers(integers)
    x = attaining(layer)
    shift = integers.input_shift.astype(np.int64)[:, None, None]
    with torch.no_grad():
        found = FIXED.convolve_last(layer, torch.from_numpy(x).float()) * 256
    weight, bias = (torch.from_numpy(v.astype(np.int64)) for v in (integers.weight, integers.bias))
    scaled = x if integers.input_limit == ACTIVATION_LIMIT else (x + ((1 << shift) >> 1)) >> shift
    sums = layer.sum_by_taps(torch.from_numpy(scaled), weight, bias)
    f = torch.from_numpy(np.exp2(integers.fraction_bits.astype(np.float64)))[:, None, None]
    assert torch.equal(found * f, sums.double())


@pytest.mark.parametrize("kind", ["large", "saturated"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_matrix_products_of_a_gpu_compute_the_definition(name, kind, monkeypatch):
    layer = LAYERS[name]()
    layer.set_integers(drawn(layer, Backend.FLOAT64))
    monkeypatch.setattr(layer, "_exact_sum", lambda x, w, b: layer.sum_by_products(x.to(w.dtype), w, b))
    x = inputs(layer, kind)
    with torch.no_grad():
        found = FIXED.convolve(layer, torch.from_numpy(x).float())
    assert np.array_equal(found.numpy(), reference(layer, x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_narrow_layer_that_does_not_fit_one_convolution_is_split_after_its_shift(name):
    """A bias, centred after the grid was chosen, may leave no room."""
    layer = LAYERS[name]()
    integers = drawn(layer, Backend.FLOAT32)
    assert integers.input_shift.any()
    layer.set_integers(integers, Backend.SPLIT)
    x = inputs(layer, "large")
    with torch.no_grad():
        found = FIXED.convolve(layer, torch.from_numpy(x).float())
    assert np.array_equal(found.numpy(), reference(layer, x))


def test_a_bound_just_below_the_limit_is_float32_and_just_above_is_not():
    layer = Conv(33, 1, 1)
    weight = np.full((1, 33, 1, 1), 4000, dtype=np.int16)
    room = FLOAT32_BOUND - 127 * 33 * 4000 - 1  # 1: the rounding constant with one fraction bit
    for bias, exact_in_float32 in ((room - 1, True), (room, False)):
        one_bit = np.array([1], np.int8)
        layer.set_integers(Integers(weight, np.array([bias], np.int32), one_bit, np.zeros(33, np.int8), 127))
        assert (layer.backend is Backend.FLOAT32) == exact_in_float32


def test_a_layer_over_the_bound_computed_in_float32_is_wrong_where_the_proof_says_so():
    """The negative control: forced into float32, the sum of the constructed input is wrong."""
    rng = np.random.default_rng(1)
    layer = Conv(512, 1, 1)
    weight = (rng.integers(20000, 32768, (1, 512, 1, 1)) * rng.choice([-1, 1], (1, 512, 1, 1))).astype(np.int16)
    layer.set_integers(Integers(weight, np.zeros(1, np.int32), np.array([15], np.int8), np.zeros(512, np.int8), 127))
    assert layer.backend is not Backend.FLOAT32
    attains = torch.from_numpy(127 * np.sign(weight[0]).astype(np.float64))[None]
    attains[0, 0] *= 126 / 127  # an odd sum
    in_float32 = torch.nn.functional.conv2d(attains.float(), torch.from_numpy(weight.astype(np.float32)))
    in_float64 = torch.nn.functional.conv2d(attains, torch.from_numpy(weight.astype(np.float64)))
    assert in_float32.item() != in_float64.item()
    with torch.no_grad():
        assert layer.accumulate(attains.float()).item() * 2**15 == in_float64.item()


def test_sums_beyond_every_format_are_refused(monkeypatch):
    assert choose_backend(np.array([1 << 40]), np.array([0]), 32767, np.array([1])) is None
    monkeypatch.setattr("mvcodec.exact.conv.choose_backend", lambda *_: None)
    layer = Conv(4, 1, 1)
    with pytest.raises(ModelError, match="no exact number format"):
        layer.set_integers(drawn(layer, Backend.FLOAT32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fraction_bits": np.zeros(6, np.int8)}, "fraction bits"),
        ({"input_shift": np.full(8, 20, np.int8)}, "input shifts"),
        ({"input_limit": 0}, "input limit"),
        ({"bias": np.zeros(5, np.int32)}, "shape"),
    ],
)
def test_integers_that_break_a_rule_are_refused(change, message):
    layer = Conv(8, 6, 3)
    integers = drawn(layer, Backend.FLOAT32)
    with pytest.raises(ModelError, match=message):
        layer.set_integers(Integers(**{**vars(integers), **change}))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "depthwise"])
def test_order_of_channels_and_split_sums_change_nothing(name):
    layer = LAYERS[name]()
    integers = drawn(layer, Backend.FLOAT32)
    layer.set_integers(integers)
    x = torch.from_numpy(inputs(layer, "large")).float()
    order = np.random.default_rng(3).permutation(layer._channels[1])
    axis = 0 if layer.transposed else 1
    shuffled = LAYERS[name]()
    shuffled.set_integers(
        Integers(
            np.take(integers.weight, order, axis), integers.bias, integers.fraction_bits,
            integers.input_shift[order], integers.input_limit,
        )
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(FIXED.convolve(layer, x), FIXED.convolve(shuffled, x[:, order.copy()]))


@pytest.mark.parametrize("name", LAYERS)
def test_learning_rounds_forward_and_lets_gradients_through(name):
    layer = LAYERS[name]()
    layer.set_integers(drawn(layer, Backend.FLOAT32))
    x = torch.from_numpy(inputs(layer, "small")).float()
    with torch.no_grad():
        inference = FIXED.convolve(layer, x)
    layer.learning = True
    layer.requires_grad_(True)
    x.requires_grad_(True)
    learning = FIXED.convolve(layer, x)
    # weights are exact in both, sums may round in float32
    assert (learning.detach() - inference).abs().max() <= 1
    learning.sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.weight.grad.abs().sum() > 0
