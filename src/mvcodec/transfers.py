"""To and from a GPU through pinned memory, so that both sides go on working meanwhile. On a CPU nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, on the device as soon as what is issued there next needs it."""
    if device.type == "cpu":
        return x
    repeats = 0 in x.stride()  # as grey does for three colours: pinned memory takes no such tensor
    return (x if repeats else x.pin_memory()).to(device, non_blocking=True)


class Fetched:
    """Values on their way from the device, which goes on working."""

    def __init__(self, values: Tensor) -> None:
        """values: fresh, or not to change before they have arrived."""
        self.arrived: torch.cuda.Event | None = None
        self.values = values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> NDArray[Any]:
        """As an array; of pinned memory, where it comes from a GPU: scarce, not for keeping."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found: NDArray[Any] = self.values.numpy()
        return found


def fetched(values: Tensor) -> NDArray[Any]:
    """Values of the device as an array to keep."""
    array = Fetched(values).wait()
    return array.copy() if values.is_cuda else array
