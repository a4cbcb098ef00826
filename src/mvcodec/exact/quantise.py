"""From trained float weights to integers.

`observe` runs the float network on real pictures and notes how large each input channel of each convolution gets;
`quantise` then chooses for every convolution the finest grids whose sums `proof` still accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvcodec.errors import ModelError
from mvcodec.exact.arithmetic import Fixed, use
from mvcodec.exact.conv import FRACTION_BITS, INPUT_SHIFTS, WEIGHT_LIMIT, ExactConvolution, Integers
from mvcodec.exact.fixed import ACTIVATION_LIMIT, ACTIVATION_UNIT, PARAMETER_GRID, exp_table
from mvcodec.exact.proof import FLOAT32_BOUND, HALF_LIMIT, largest_sum
from mvcodec.exact.stored import exact_layers, other_parameters

FINEST = 15  # fraction bits beyond which nothing is gained
HEADROOM = 1.25  # over the largest input seen in calibration
NARROW_LIMITS = tuple((1 << bits) - 1 for bits in range(7, 14))  # of inputs read with 8 to 14 bits


@dataclass
class Seen:
    """Inputs of a layer in calibration, per input channel, in real units."""

    largest: NDArray[np.float64]
    square: NDArray[np.float64]  # sum of mean squares over runs
    runs: int = 0

    @property
    def power(self) -> NDArray[np.float64]:
        return self.square / self.runs


Ranges = dict[str, Seen]  # by layer name


@contextmanager
def observe(network: nn.Module) -> Iterator[Ranges]:
    """Inside the `with`, every run of `network` in FLOAT arithmetic adds to the ranges."""
    ranges: Ranges = {}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double()
            largest, power = (v.cpu().numpy() for v in (x.abs().amax(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3))))
            seen = ranges.setdefault(name, Seen(np.zeros_like(largest), np.zeros_like(power)))
            seen.largest = np.maximum(seen.largest, largest)
            seen.square += power
            seen.runs += 1

        return note

    for name, layer in exact_layers(network).items():
        handles.append(layer.register_forward_pre_hook(watch(name)))
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def input_shifts(largest: NDArray[np.float64], limit: int) -> NDArray[np.int8]:
    """r per input channel: the finest with which the largest input stays inside the limit."""
    steps = HEADROOM * ACTIVATION_UNIT * np.maximum(largest, 1e-12) / limit
    shifts: NDArray[np.int8] = np.clip(np.ceil(np.log2(steps)), *INPUT_SHIFTS).astype(np.int8)
    return shifts


def wide_integers(layer: ExactConvolution) -> Integers:
    """16-bit inputs, two float32 convolutions."""
    return _integers(layer, np.zeros(layer._channels[1], np.int8), ACTIVATION_LIMIT)


def narrow_integers(layer: ExactConvolution, seen: Seen) -> Integers:
    """One float32 convolution: its room is divided between the bits of inputs and of weights for the least noise."""
    candidates = [_integers(layer, input_shifts(seen.largest, limit), limit) for limit in NARROW_LIMITS]
    return min(candidates, key=lambda integers: _noise(layer, integers, seen))


def quantise(network: nn.Module, ranges: Ranges, wide: Callable[[str], bool] = lambda _: True) -> None:
    """Give every exact layer of `network` its integers; other parameters move to their grid.

    wide: whether the layer of this name reads 16 bits. Layers that never ran while observed do so anyway.
    """
    for name, layer in exact_layers(network).items():
        seen = ranges.get(name)
        layer.set_integers(wide_integers(layer) if seen is None or wide(name) else narrow_integers(layer, seen))
    with torch.no_grad():
        for value in other_parameters(network).values():
            value.copy_((value.double() * PARAMETER_GRID).round() / PARAMETER_GRID)


def learn(network: nn.Module, learning: bool) -> None:
    """Switch quantisation-aware training of a quantised network on, or off: then integers follow the weights.

    The grids of inputs stay as calibrated. Weights keep theirs unless a sum would outgrow its bound.
    """
    for layer in exact_layers(network).values():
        integers = layer.integers
        if integers is None:
            raise ModelError("quantise a network before it learns to be")
        layer.requires_grad_(learning)
        if layer.learning and not learning:
            layer.set_integers(_integers(layer, integers.input_shift, integers.input_limit, integers.fraction_bits))
        layer.learning = learning


def _integers(
    layer: ExactConvolution, shifts: NDArray[np.int8], limit: int, finest: NDArray[np.int8] | None = None
) -> Integers:
    """Round a layer's float weights, per output channel on the finest grid that exact float32 sums allow."""
    weight = layer.weight.detach().double().cpu().numpy() * layer._along_input(np.exp2(shifts.astype(np.float64)))
    bias = layer.bias.detach().double().cpu().numpy() * ACTIVATION_UNIT
    bits = np.full(len(bias), FINEST, dtype=np.int64) if finest is None else finest.astype(np.int64)
    others = (1, 2, 3) if not layer.transposed else (0, 2, 3)
    wide = limit == ACTIVATION_LIMIT
    while True:
        scale = np.exp2(bits)
        rounded = np.floor(weight * layer._along_output(scale) + 0.5)
        whole_bias = np.floor(bias * scale + 0.5)
        sums = largest_sum(np.clip(rounded, -(2**31), 2**31).astype(np.int64), layer._tap_stride, layer.transposed)
        offset = np.abs(whole_bias) + scale / 2
        room = HALF_LIMIT * sums + offset / 256 + 256 if wide else limit * sums + offset
        too_fine = (room >= FLOAT32_BOUND) | (np.abs(rounded).max(axis=others) > WEIGHT_LIMIT)
        if not too_fine.any():
            break
        bits[too_fine] -= 1
        if bits.min() < FRACTION_BITS[0]:
            raise ModelError("weights of a layer are too large for exact arithmetic")
    return Integers(rounded.astype(np.int16), whole_bias.astype(np.int32), bits.astype(np.int8), shifts, limit)


def _noise(layer: ExactConvolution, integers: Integers, seen: Seen) -> float:
    """Expected squared error of the outputs, of rounded inputs and of rounded weights, summed over channels."""
    weight = layer.weight.detach().double().cpu().numpy()
    shift = layer._along_input(np.exp2(integers.input_shift.astype(np.float64)))
    step = layer._along_output(np.exp2(-integers.fraction_bits.astype(np.float64)))
    from_inputs = (np.square(weight * shift) / (12 * ACTIVATION_UNIT**2)).sum()
    error = integers.weight * step / shift - weight
    return float(from_inputs + (np.square(error) * layer._along_input(seen.power)).sum())


def fix(network: nn.Module, table: Tensor | None = None) -> None:
    """Let a quantised network count in FIXED arithmetic. table: of exp, from a weights file; or else a new one."""
    values = torch.from_numpy(exp_table()) if table is None else table
    device = next(network.parameters()).device
    use(Fixed(values.to(device, torch.float64)), network)
