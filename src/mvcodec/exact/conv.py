"""Convolutions with integer weights, computed exactly by whichever back end `proof` allows.

    a  = clamp(floor(x 2^-r + 1/2), +-limit)               input, integer; r per input channel, 0 in 16-bit layers
    s  = sum w a + b                                       w, b integers; exact, in units of 2^-f of an activation
    x' = clamp(floor(s 2^-f + 1/2), +-32767)               output, integer; f per output channel

A layer with a small `limit` fits one float32 convolution. A 16-bit layer is split, a = 256 h + l, into two of bytes,
and floor(256 H + L) is built from their exact sums without ever forming the long number.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvcodec.errors import ModelError
from mvcodec.exact import fixed
from mvcodec.exact.arithmetic import Block
from mvcodec.exact.fixed import ACTIVATION_LIMIT, ACTIVATION_UNIT
from mvcodec.exact.proof import Backend, choose_backend, largest_sum

WEIGHT_LIMIT = 32767  # integer weights are stored in 16 bits
FRACTION_BITS = (1, 15)  # f: a sum of 2^24 or more then saturates, however its last bits were rounded
INPUT_SHIFTS = (0, 15)  # r
ONEDNN_PAYS = 1 << 11  # weights of a 1x1 layer
FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")  # let oneDNN round float32 operands

# NNPACK, which torch may take where oneDNN is off, transforms instead of adding. It is off for good: a switch that is
# put back would be put back under another thread's feet.
torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]


def _float32_is_kept(device: torch.device) -> bool:
    """Not where cuDNN chooses kernels, nor where the environment lets oneDNN round operands."""
    return device.type != "cuda" and all(os.environ.get(name, "STRICT").upper() == "STRICT" for name in FAST_MATH)


@dataclass(frozen=True)
class Integers:
    """All that a convolution's result depends on."""

    weight: NDArray[np.int16]  # shaped as the layer's weight
    bias: NDArray[np.int32]  # [out], in units of 2^-f of an activation
    fraction_bits: NDArray[np.int8]  # f [out]
    input_shift: NDArray[np.int8]  # r [in]
    input_limit: int  # largest |a|


class ExactConvolution(Block):
    """What Conv and ConvTranspose share; in FLOAT arithmetic, ordinary layers with `weight` and `bias`.

    `integers` are what FIXED arithmetic counts with. While `learning`, only their f, r and limit count: weights are
    rounded anew in every pass, with straight-through gradients.
    """

    weight: Tensor
    bias: Any  # a Tensor; torch's classes say Tensor | None
    transposed = False
    integers: Integers | None = None
    backend: Backend | None = None
    learning = False
    input_scale: Tensor
    one_half: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.arithmetic.convolve(self, x)

    def convolve_float(self, x: Tensor) -> Tensor:
        return self._sum(x, self.weight, self.bias)

    def convolve_fixed(self, x: Tensor) -> Tensor:
        """Activations -> activations: float32 integers."""
        if self.learning:
            return fixed.saturate(fixed.round_half_up(self._learning_sum(x)))
        high, low = self._sums(x, self.rounded)
        if low is not None:
            # Flooring the low part to the grid of the high one, or to integers, leaves the floor of the sum alone.
            high = high.add_(low.mul_(self.low_grid).floor_().div_(self.low_grid))
        return high.floor_().clamp_(-ACTIVATION_LIMIT, ACTIVATION_LIMIT).float()

    def accumulate(self, x: Tensor) -> Tensor:
        """Activations -> the sum itself in units of an activation, not rounded; float64."""
        if self.learning:
            return self._learning_sum(x).double()
        high, low = self._sums(x, self.plain)
        return high.double() if low is None else high.double() + low.double()

    def set_integers(self, integers: Integers, backend: Backend | None = None) -> None:
        """Give the layer its integers; `weight` and `bias` become the real numbers they stand for.

        backend: instead of the cheapest that is proved; the result is the same. For comparisons.
        Raises ModelError if they break a rule of the format or no back end can be proved exact.
        """
        self._check(integers)
        bits = integers.fraction_bits.astype(np.int64)
        bias = integers.bias.astype(np.int64)
        sums = largest_sum(integers.weight, self._tap_stride, self.transposed)
        proved = choose_backend(sums, bias, integers.input_limit, bits)
        if proved is None:
            raise ModelError("the sums of a layer fit no exact number format")
        device = self.weight.device
        if not _float32_is_kept(device):
            backend = Backend.FLOAT64  # whatever is proved for float32 holds there, too
        backend = backend or proved
        self.integers, self.backend = integers, backend
        unit, shift = np.exp2(-bits), np.exp2(-integers.input_shift.astype(np.float64))
        number = torch.float64 if backend is Backend.FLOAT64 else torch.float32

        def constant(values: NDArray[np.float64], dtype: torch.dtype = number) -> Tensor:
            x = torch.from_numpy(values).to(device, dtype)
            # A processor walks channels last.
            return x if x.ndim < 4 or x.is_cuda else x.contiguous(memory_format=torch.channels_last)

        def offsets(bias: NDArray[np.int64]) -> tuple[Tensor, ...]:
            """What the sums start from; of a split layer, multiples of 256 and the rest."""
            parts = (bias // 256 * 256, bias % 256) if backend is Backend.SPLIT else (bias,)
            return tuple(constant(part * unit) for part in parts)

        weight = integers.weight * self._along_output(unit)
        self.exact_weight = constant(weight)
        self.plain, self.rounded = offsets(bias), offsets(bias + (1 << (bits - 1)))
        self.low_grid = constant(np.exp2(np.maximum(bits - 8, 0))[:, None, None])
        self.input_scale = constant(shift[:, None, None], torch.float32)
        self.one_half = torch.full_like(self.input_scale, 0.5)
        with torch.no_grad():
            self.weight.copy_(constant(weight * self._along_input(shift), torch.float64))
            self.bias.copy_(constant(bias * unit / ACTIVATION_UNIT, torch.float64))

    def _check(self, integers: Integers) -> None:
        """The rules of the weights file, which may come from anywhere."""
        out, into = self._channels
        fits = (
            integers.weight.shape == tuple(self.weight.shape)
            and integers.bias.shape == integers.fraction_bits.shape == (out,)
            and integers.input_shift.shape == (into,)
        )
        if not fits:
            raise ModelError("integers of a layer do not have its shape")
        f, r = integers.fraction_bits, integers.input_shift
        if f.min() < FRACTION_BITS[0] or f.max() > FRACTION_BITS[1]:
            raise ModelError(f"fraction bits of a layer are not within {FRACTION_BITS}")
        if r.min() < INPUT_SHIFTS[0] or r.max() > INPUT_SHIFTS[1]:
            raise ModelError(f"input shifts of a layer are not within {INPUT_SHIFTS}")
        if not 1 <= integers.input_limit <= ACTIVATION_LIMIT or (integers.input_limit == ACTIVATION_LIMIT and r.any()):
            raise ModelError(f"input limit {integers.input_limit} of a layer is not allowed")

    def _input(self, x: Tensor) -> Tensor:
        """a of the module's docstring."""
        assert self.integers is not None
        limit = self.integers.input_limit
        if limit == ACTIVATION_LIMIT:
            return x
        rounded = fixed.floor(torch.addcmul(self.one_half, x, self.input_scale))  # 16 bits times 2^-r: nothing is lost
        return rounded.clamp(-limit, limit) if rounded.requires_grad else rounded.clamp_(-limit, limit)

    def _sums(self, x: Tensor, offsets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """The exact sum in units of an activation; of a split layer in two parts."""
        x, weight = self._input(x), self.exact_weight
        if self.backend is Backend.SPLIT:
            high = ((x + 128) * (1 / 256)).floor_().mul_(256)
            return self._exact_sum(high, weight, offsets[0]), self._exact_sum(x - high, weight, offsets[1])
        return self._exact_sum(x, weight, offsets[0]), None

    def _exact_sum(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """By kernels that only multiply and add. cuDNN may choose others: there, matrix products in float64."""
        x = x.to(weight.dtype)
        if x.is_cuda:
            return self.sum_by_products(x, weight, bias)
        pointwise = self.kernel_size == (1, 1) and weight.numel() >= ONEDNN_PAYS and weight.dtype is torch.float32
        if pointwise and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            # With one thread torch would take MKL's matrix product, half as fast where the processor is not Intel's.
            found: Tensor = torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)
            return found
        return self._sum(x, weight, bias)

    def _learning_sum(self, x: Tensor) -> Tensor:
        """The sum with input, weight and bias rounded as for inference, differentiable; sums themselves may round."""
        assert self.integers is not None
        f, r = (torch.from_numpy(v).to(x) for v in (self.integers.fraction_bits, self.integers.input_shift))
        grid, shift = self._along_output(torch.exp2(f)), self._along_input(torch.exp2(r))
        weight = fixed.floor(self.weight * (grid * shift) + 0.5).clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
        return self._sum(self._input(x), weight / grid, self.bias * ACTIVATION_UNIT)

    def sum_by_taps(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution as one matrix product per tap, for any number type: int64 is the tests' reference."""
        raise NotImplementedError

    def sum_by_products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution as a GPU computes it exactly: by few matrix products."""
        raise NotImplementedError

    def _sum(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        raise NotImplementedError

    _channels: tuple[int, int]  # (out, in)
    _tap_stride = 1

    def _along_output(self, v: Any) -> Any:
        return v[:, None, None, None]

    def _along_input(self, v: Any) -> Any:
        return v[None, :, None, None]


class Conv(ExactConvolution, nn.Conv2d):
    """nn.Conv2d with an exact form. Odd kernel, `same` padding, stride 1; groups = 1 or one per channel."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, groups: int = 1) -> None:
        nn.Conv2d.__init__(self, channels_in, channels_out, kernel, padding=kernel // 2, groups=groups)
        self._channels = channels_out, channels_in

    def _along_input(self, v: Any) -> Any:
        return v[:, None, None, None] if self.groups > 1 else v[None, :, None, None]

    def _sum(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.padding, groups=self.groups)

    def sum_by_taps(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        reach = self.kernel_size[0] // 2
        return _taps(F.pad(x, (reach, reach, reach, reach)), weight, bias, self.groups > 1)

    def sum_by_products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One product with all that the taps meet, unless every channel is by itself: fewer launches."""
        if self.groups > 1:
            return self.sum_by_taps(x, weight, bias)
        met = (
            x.flatten(2)
            if self.kernel_size == (1, 1)
            else F.unfold(x, self.kernel_size, padding=self.kernel_size[0] // 2)
        )
        total = (weight.flatten(1) @ met).add_(bias[:, None])
        return total.reshape(len(x), -1, *x.shape[2:])


class ConvTranspose(ExactConvolution, nn.ConvTranspose2d):  # type: ignore[misc]  # forward has no output_size
    """nn.ConvTranspose2d 5x5, stride 2, that doubles height and width, with an exact form."""

    transposed = True
    _tap_stride = 2

    def __init__(self, channels_in: int, channels_out: int) -> None:
        nn.ConvTranspose2d.__init__(self, channels_in, channels_out, 5, stride=2, padding=2, output_padding=1)
        self._channels = channels_out, channels_in

    def _along_output(self, v: Any) -> Any:
        return v[None, :, None, None]

    def _along_input(self, v: Any) -> Any:
        return v[:, None, None, None]

    def _sum(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=2, output_padding=1)

    def sum_by_taps(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Zeros between the inputs, then a convolution with the mirrored kernel."""
        spread = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
        spread[..., ::2, ::2] = x
        return _taps(F.pad(spread, (2, 2, 2, 2)), weight.transpose(0, 1).flip(2, 3), bias, False)

    def sum_by_products(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """One product with all taps, whose results are added up where they fall."""
        size = 2 * x.shape[2], 2 * x.shape[3]
        return F.fold(weight.flatten(1).T @ x.flatten(2), size, 5, padding=2, stride=2) + bias[:, None, None]


def _taps(padded: Tensor, weight: Tensor, bias: Tensor, depthwise: bool) -> Tensor:
    """padded [B, in, H + k - 1, W + k - 1], weight [out, in, k, k] -> [B, out, H, W]."""
    kernel = weight.shape[-1]
    height, width = padded.shape[2] - kernel + 1, padded.shape[3] - kernel + 1
    total = bias[None, :, None, None]
    for i in range(kernel):
        for j in range(kernel):
            window = padded[..., i : i + height, j : j + width]
            tap = weight[:, :, i, j]
            if depthwise:
                total = total + tap[:, :, None] * window
            else:
                total = total + (tap @ window.flatten(2)).reshape(*window.shape[:1], -1, height, width)
    return total
