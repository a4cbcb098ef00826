"""Several processes that train as one: torchrun starts them, each takes its part of every batch.

Gradients are averaged by DistributedDataParallel (gloo on CPU, nccl on CUDA). The result is that of one process with
the whole batch, to float tolerance: the same crops, the same qualities, the same quantisation noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from mvcodec.training.sampling import Part

PATIENCE = timedelta(hours=1)  # process 0 validates alone, the others wait


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def join(device: torch.device) -> Processes:
        """The processes torchrun started, joined; alone without it."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return Processes()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        return Processes(dist.get_rank(), world)

    @property
    def first(self) -> bool:
        """The one that validates, writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, device: torch.device, unused: bool) -> nn.Module:
        """The model whose backward pass averages gradients over the processes; `unused`: some may get none."""
        if self.world == 1:
            return model
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, devices, find_unused_parameters=unused)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, the same for all."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


def own_device(device: str) -> torch.device:
    """The device of this process: under torchrun "cuda" is the GPU of its local rank."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and "LOCAL_RANK" in os.environ:
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    return chosen


class WholeBatchNoise(TorchFunctionMode):
    """Inside, `uniform_` draws noise for the whole batch and keeps the part of this process."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.uniform_:
            return func(*args, **(kwargs or {}))
        target, *bounds = args
        part = self.part
        views = len(target) // len(part.indices)
        whole = torch.empty_strided((part.whole * views, *target.shape[1:]), target.stride(), device=target.device)
        own = whole.uniform_(*bounds, **(kwargs or {}))[part.indices.start * views :][: len(target)]
        return target.copy_(own)
