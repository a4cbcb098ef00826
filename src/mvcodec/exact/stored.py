"""The exact path in a weights file: integers alone.

NAME.weight int16, NAME.bias int32, NAME.fraction_bits int8, NAME.input_shift int8, NAME.input_limit int16 [1]
any other parameter: int32, in units of 2^-16
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvcodec.errors import ModelError
from mvcodec.exact.conv import ExactConvolution, Integers
from mvcodec.exact.fixed import PARAMETER_GRID

PARAMETER_LIMIT = 1 << 24  # units are powers of two and may be larger
ARRAYS = {"weight": torch.int16, "bias": torch.int32, "fraction_bits": torch.int8, "input_shift": torch.int8}


def exact_layers(network: nn.Module) -> dict[str, ExactConvolution]:
    """All convolutions of `network` that have an exact form, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, ExactConvolution)}


def other_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of `network` that belong to no exact convolution, by name."""
    layers = tuple(f"{name}." for name in exact_layers(network))
    return {name: value for name, value in network.state_dict().items() if not name.startswith(layers)}


def to_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The stored form of a quantised network."""
    tensors: dict[str, Tensor] = {}
    for name, layer in exact_layers(network).items():
        integers = layer.integers
        if integers is None:
            raise ModelError(f"{name} has no integers; quantise the network first")
        for array in ARRAYS:
            tensors[f"{name}.{array}"] = torch.from_numpy(getattr(integers, array))
        tensors[f"{name}.input_limit"] = torch.tensor([integers.input_limit], dtype=torch.int16)
    for name, value in other_parameters(network).items():
        tensors[name] = (value.detach().cpu().double() * PARAMETER_GRID).round().to(torch.int32)
    return tensors


def load_tensors(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Give `network` the integers stored under `prefix`. Proves every layer anew; ModelError if one cannot be."""

    def stored(name: str, dtype: torch.dtype) -> Tensor:
        found = tensors.get(prefix + name)
        if found is None or found.dtype != dtype:
            what = "missing" if found is None else f"{found.dtype}, not {dtype}"
            raise ModelError(f"no exact arithmetic without its integers: {prefix}{name} is {what}")
        return found

    for name, layer in exact_layers(network).items():
        arrays: dict[str, NDArray[np.generic]] = {a: stored(f"{name}.{a}", t).numpy() for a, t in ARRAYS.items()}
        limit = stored(f"{name}.input_limit", torch.int16)
        try:
            layer.set_integers(Integers(**arrays, input_limit=int(limit.item())))  # type: ignore[arg-type]
        except (ModelError, RuntimeError) as error:
            raise ModelError(f"{prefix}{name}: {error}") from error
    for name, value in other_parameters(network).items():
        number = stored(name, torch.int32)
        if number.shape != value.shape:
            raise ModelError(f"{prefix}{name} has shape {list(number.shape)}, not {list(value.shape)}")
        if number.numel() and int(number.long().abs().max()) > PARAMETER_LIMIT and name != "unit":
            raise ModelError(f"{prefix}{name} holds numbers beyond {PARAMETER_LIMIT}, which float32 would round")
        with torch.no_grad():
            value.copy_(number.double() / PARAMETER_GRID)
        if not torch.equal(value.cpu().double() * PARAMETER_GRID, number.double()):
            raise ModelError(f"{prefix}{name}: {value.dtype} does not hold what is stored")
