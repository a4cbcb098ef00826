"""From trained float weights to integers.

`observe` notes how large each input channel of each convolution gets on real pictures; `quantise` then chooses for
every convolution the finest grids whose sums `proof` still accepts, and takes out the mean error that is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvcodec.errors import ModelError
from mvcodec.exact.arithmetic import Fixed, use
from mvcodec.exact.conv import FRACTION_BITS, INPUT_SHIFTS, WEIGHT_LIMIT, ExactConvolution, Integers
from mvcodec.exact.fixed import ACTIVATION_LIMIT, ACTIVATION_UNIT, PARAMETER_GRID, exp_table, to_activation
from mvcodec.exact.proof import FLOAT32_BOUND, HALF_LIMIT, largest_sum
from mvcodec.exact.stored import exact_layers, other_parameters

HEADROOM = 1.25  # over the largest input seen in calibration
NARROW_LIMITS = tuple((1 << bits) - 1 for bits in range(7, 15))  # of inputs read with 8 to 15 bits


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
def watching(network: nn.Module, note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside the `with`, `note` is told name, input and output of every exact layer that runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: note(name, inputs[0].detach(), output.detach())

    handles = [layer.register_forward_hook(hook(name)) for name, layer in exact_layers(network).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe(network: nn.Module, replay: Callable[[], None]) -> Ranges:
    """What the layers' inputs are like while `replay` runs the network, in FLOAT arithmetic, on real pictures."""
    ranges: Ranges = {}

    def note(name: str, x: Tensor, _: Tensor) -> None:
        largest, power = (
            v.double().cpu().numpy() for v in (x.abs().amax(dim=(0, 2, 3)), x.square().mean(dim=(0, 2, 3)))
        )
        seen = ranges.setdefault(name, Seen(np.zeros_like(largest), np.zeros_like(power)))
        seen.largest = np.maximum(seen.largest, largest)
        seen.square += power
        seen.runs += 1

    with watching(network, note):
        replay()
    return ranges


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


def quantise(
    network: nn.Module, replay: Callable[[], None] | None = None, wide: Callable[[str], bool] = lambda _: False
) -> None:
    """Give every exact layer of `network` its integers; other parameters move to their grid.

    replay: runs the network on calibration pictures. Without it all layers read 16 bits, as those do that never run
    then, that end the network (`convolve_last`), or whose name is `wide`.
    """
    layers = exact_layers(network)
    ranges = observe(network, replay) if replay is not None else {}
    narrow = {name: narrow_integers(layers[name], seen) for name, seen in ranges.items() if not wide(name)}
    if replay is not None:
        narrow = _centred(network, replay, narrow)
    for name, layer in layers.items():
        layer.set_integers(narrow.get(name) or wide_integers(layer))
    with torch.no_grad():
        for value in other_parameters(network).values():
            value.copy_((value.double() * PARAMETER_GRID).round() / PARAMETER_GRID)


def _centred(network: nn.Module, replay: Callable[[], None], chosen: dict[str, Integers]) -> dict[str, Integers]:
    """The integers with biases that take out the mean error of each output channel.

    Rounded weights meet inputs whose mean is not zero, and small inputs round to zero: both shift outputs, and what
    is shifted in every position costs far more bits than noise does.
    """
    twins = {name: copy.deepcopy(layer) for name, layer in exact_layers(network).items() if name in chosen}
    for name, twin in twins.items():
        twin.set_integers(chosen[name])
    errors = {name: np.zeros(len(integers.bias)) for name, integers in chosen.items()}
    runs = dict.fromkeys(chosen, 0)

    def note(name: str, x: Tensor, output: Tensor) -> None:
        if name in twins:
            rounded = twins[name].convolve_fixed(to_activation(x.float())) / ACTIVATION_UNIT
            errors[name] += (rounded - output).mean(dim=(0, 2, 3)).double().cpu().numpy()
            runs[name] += 1

    with watching(network, note):
        replay()
    centred = {}
    for name, integers in chosen.items():
        shift = errors[name] / max(1, runs[name]) * ACTIVATION_UNIT * np.exp2(integers.fraction_bits.astype(np.float64))
        centred[name] = replace(integers, bias=(integers.bias - np.rint(shift)).astype(np.int32))
    return centred


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
    bits = np.full(len(bias), FRACTION_BITS[1], dtype=np.int64) if finest is None else finest.astype(np.int64)
    others = (1, 2, 3) if not layer.transposed else (0, 2, 3)
    wide = limit == ACTIVATION_LIMIT
    while True:
        scale = np.exp2(bits)
        rounded = np.floor(weight * layer._along_output(scale) + 0.5)
        whole_bias = np.floor(bias * scale + 0.5)
        sums = largest_sum(np.clip(rounded, -(2**31), 2**31).astype(np.int64), layer._tap_stride, layer.transposed)
        offset = np.abs(whole_bias) + scale / 2
        # A little room is left for the bias to be centred.
        room = HALF_LIMIT * sums + offset / 256 + 256 if wide else limit * sums + 1.05 * offset + 4096
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
