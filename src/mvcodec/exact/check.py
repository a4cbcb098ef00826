"""Does this machine compute a layer as conv.py defines it? Run when a model is loaded, and by `mvcodec selftest`.

The proof speaks about kernels that multiply and add in the format they are given. This looks whether they do: a library
told to round float32 operands to bfloat16, say, or to use a transform, fails on these inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from mvcodec.errors import DesyncError
from mvcodec.exact.conv import ExactConvolution
from mvcodec.exact.fixed import ACTIVATION_LIMIT
from mvcodec.exact.precision import strict


@torch.inference_mode()
def check_layers(layers: Mapping[str, ExactConvolution]) -> int:
    """Each kind of layer (class, shape, back end) on an input that attains its bound, a saturated and a random one.

    Returns the number of kinds. Raises DesyncError where a result is not that of int64.
    """
    rng = np.random.default_rng(0)
    kinds = {(type(x).__name__, tuple(x.weight.shape), x.backend): name for name, x in layers.items()}
    for name in kinds.values():
        layer = layers[name]
        channels = layer._channels[1]
        for x in (
            attaining(layer),
            np.full((1, channels, 6, 6), ACTIVATION_LIMIT),
            rng.integers(-ACTIVATION_LIMIT, ACTIVATION_LIMIT + 1, (1, channels, 9, 8)),
        ):
            with strict:
                found = layer.convolve_fixed(torch.from_numpy(x).to(layer.weight.device, torch.float32))
            if not np.array_equal(found.cpu().numpy().astype(np.int64), reference(layer, x)):
                raise DesyncError(f"{name}: this machine does not add exactly; others could not read its files")
    return len(kinds)


def attaining(layer: ExactConvolution) -> NDArray[np.int64]:
    """An input whose sum behind some output of channel 0 is the bound itself."""
    integers = layer.integers
    assert integers is not None
    signs = np.sign(integers.weight.astype(np.int64))
    # A transposed convolution's output meets every second tap, mirrored.
    signs = signs[:, 0, ::2, ::2][..., ::-1, ::-1] if layer.transposed else signs[0]
    size = signs.shape[-1]
    shift = integers.input_shift.astype(np.int64)[: len(signs), None, None]
    x = np.zeros((1, layer._channels[1], size + 2, size + 2), dtype=np.int64)
    x[0, : len(signs), 1 : size + 1, 1 : size + 1] = signs * np.minimum(integers.input_limit << shift, ACTIVATION_LIMIT)
    return x


def reference(layer: ExactConvolution, x: NDArray[np.int64]) -> NDArray[np.int64]:
    """The layer in int64, as conv.py's docstring defines it."""
    integers = layer.integers
    assert integers is not None
    if integers.input_limit < ACTIVATION_LIMIT:
        r = integers.input_shift.astype(np.int64)[:, None, None]
        x = np.clip((x + ((1 << r) >> 1)) >> r, -integers.input_limit, integers.input_limit)
    weight, bias = (torch.from_numpy(v.astype(np.int64)) for v in (integers.weight, integers.bias))
    sums = layer.sum_by_taps(torch.from_numpy(x), weight, bias).numpy()
    f = integers.fraction_bits.astype(np.int64)[:, None, None]
    clipped: NDArray[np.int64] = np.clip((sums + (1 << (f - 1))) >> f, -ACTIVATION_LIMIT, ACTIVATION_LIMIT)
    return clipped
