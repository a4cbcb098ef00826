"""How maps lie in memory while a run trains: channels last, but where the gradients of convolutions are slow in it.

Processors without AVX-512 take three to six times as long for the gradient of float32 weights with channels last.
"""

from __future__ import annotations

from functools import cache
from math import inf
from time import thread_time

import torch
import torch.nn.functional as F

from mvcodec.cores import on_one_core
from mvcodec.precision import bfloat16_pays

ENOUGH = 1.2  # times as fast as channels last; 0.7 to 2 are seen
TRIES = 3  # of each layout: about a second together
CHANNELS, SIDE = 64, 128  # of the convolution that is tried; smaller maps are not slow


@cache
def memory_format(device: torch.device) -> torch.memory_format:
    """The faster one on `device`; found once for each."""
    # In bfloat16 a processor has no other kernels worth the name.
    others = device.type == "cpu" and not bfloat16_pays(device)
    return torch.contiguous_format if others and _gain() > ENOUGH else torch.channels_last


def _gain() -> float:
    """How many times as fast a convolution of 3x3 learns here with contiguous channels, in time of one core."""
    least = dict.fromkeys((torch.channels_last, torch.contiguous_format), inf)
    with on_one_core(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for _ in range(TRIES):  # the first prepares the kernels and is never the least
            for order in least:
                picture, weight = (
                    torch.zeros(shape, dtype=torch.float32, device="cpu")
                    .contiguous(memory_format=order)
                    .requires_grad_(True)
                    for shape in ((1, CHANNELS, SIDE, SIDE), (CHANNELS, CHANNELS, 3, 3))
                )
                began = thread_time()
                F.conv2d(picture, weight, padding=1).sum().backward()
                least[order] = min(least[order], thread_time() - began)
    return least[torch.channels_last] / max(least[torch.contiguous_format], 1e-9)
