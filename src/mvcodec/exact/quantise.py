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
from mvcodec.exact.stored import exact_layers, other_parameters
from mvcodec.exact.proof import FLOAT32_BOUND, HALF_LIMIT, largest_sum

FINEST = 15  # fraction bits beyond which nothing is gained: a quarter of a percent of an activation's unit
HEADROOM = 1.25  # over the largest input seen in calibration

Ranges = dict[str, NDArray[np.float64]]  # layer name -> largest |input| seen, per input channel, in real units


@dataclass(frozen=True)
class Precision:
    """How a layer reads its input: with 16 bits, or rounded to fewer so that one float32 convolution is exact."""

    input_limit: int

    @property
    def wide(self) -> bool:
        return self.input_limit == ACTIVATION_LIMIT


WIDE = Precision(ACTIVATION_LIMIT)  # two float32 convolutions
NARROW = Precision(127)  # one, of 8-bit inputs


@contextmanager
def observe(network: nn.Module) -> Iterator[Ranges]:
    """Inside the `with`, every run of `network` in FLOAT arithmetic widens the ranges."""
    ranges: Ranges = {}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach().abs().amax(dim=(0, 2, 3)).double().cpu().numpy()
            ranges[name] = np.maximum(ranges.get(name, 0.0), seen)

        return note

    for name, layer in exact_layers(network).items():
        handles.append(layer.register_forward_pre_hook(watch(name)))
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()


def input_shifts(largest: NDArray[np.float64], precision: Precision) -> NDArray[np.int8]:
    """r per input channel: the finest with which the largest input stays inside the limit."""
    steps = HEADROOM * ACTIVATION_UNIT * np.maximum(largest, 1e-12) / precision.input_limit
    shifts = np.clip(np.ceil(np.log2(steps)), *INPUT_SHIFTS)
    return (0 * shifts if precision.wide else shifts).astype(np.int8)


def integers_of(layer: ExactConvolution, shifts: NDArray[np.int8], precision: Precision) -> Integers:
    """Round a layer's float weights on the finest grid per output channel that float32 sums allow.

    Where even the coarsest is too fine for that, the grid is as fine as 16-bit weights go: float64 will do.
    """
    weight = layer.weight.detach().double().cpu().numpy() * layer._along_input(np.exp2(shifts.astype(np.float64)))
    bias = layer.bias.detach().double().cpu().numpy() * ACTIVATION_UNIT
    bits = np.full(len(bias), FINEST, dtype=np.int64)
    limit = HALF_LIMIT if precision.wide else precision.input_limit
    while True:
        scale = np.exp2(bits)
        rounded = np.floor(weight * layer._along_output(scale) + 0.5)
        whole_bias = np.floor(bias * scale + 0.5)
        sums = largest_sum(np.clip(rounded, -(2**31), 2**31).astype(np.int64), layer._tap_stride, layer.transposed)
        offset = np.abs(whole_bias) + scale / 2
        room = limit * sums + (offset / 256 if precision.wide else offset) + 256
        axes = tuple(a for a in range(4) if a != (1 if layer.transposed else 0))
        largest = np.abs(rounded).max(axis=axes)
        too_fine = (room >= FLOAT32_BOUND) | (largest > WEIGHT_LIMIT)
        if not too_fine.any():
            break
        bits[too_fine] -= 1
        if bits.min() < FRACTION_BITS[0]:
            raise ModelError("weights of a layer are too large for exact arithmetic")
    return Integers(
        rounded.astype(np.int16),
        whole_bias.astype(np.int32),
        bits.astype(np.int8),
        shifts,
        precision.input_limit,
    )


def quantise(network: nn.Module, ranges: Ranges, precision: Callable[[str], Precision] | None = None) -> None:
    """Give every exact layer of `network` its integers; other parameters move to their grid.

    precision: of each layer, by name. Without it, and for layers that never ran while observed: 16-bit inputs.
    """
    for name, layer in exact_layers(network).items():
        seen = ranges.get(name)
        chosen = precision(name) if precision and seen is not None else WIDE
        into = layer._channels[1]
        shifts = input_shifts(seen if seen is not None else np.zeros(into), chosen)
        layer.set_integers(integers_of(layer, shifts, chosen))
    with torch.no_grad():
        for value in other_parameters(network).values():
            value.copy_((value.double() * PARAMETER_GRID).round() / PARAMETER_GRID)


def fix(network: nn.Module, table: Tensor | None = None) -> None:
    """Let a quantised network count in FIXED arithmetic. table: of exp, from a weights file; or else a new one."""
    values = torch.from_numpy(exp_table()) if table is None else table
    device = next(network.parameters()).device
    use(Fixed(values.to(device, torch.float64)), network)
