"""The precision of the float networks: bfloat16 where the device multiplies faster in it than in float32."""

from __future__ import annotations

from functools import cache
from math import inf
from time import thread_time

import torch
import torch.nn.functional as F

from mvcodec.cores import on_one_core

ENOUGH = 1.3  # times as fast as float32, since bfloat16 costs precision; processors show 0.6, 2 and 5
TRIES = 6  # of each precision: ten milliseconds together
CHANNELS, SIDE = 64, 32  # of the convolution that is tried


def autocast(device: torch.device) -> torch.autocast:
    """The float networks within run in the precision that pays on `device`."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16_pays(device))


@cache
def bfloat16_pays(device: torch.device) -> bool:
    """Whether the float networks run in bfloat16 on `device`; found once for each.

    A GPU must have it in hardware. A processor that says so is tried: AMX makes it five times as fast as float32 and
    AMD's units twice, but Intel's without AMX, which virtual machines may hide, take nearly twice as long.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A private function of torch, absent before 2.6: without it float32, which is never wrong.
    in_hardware = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return bool(in_hardware()) and _gain() > ENOUGH


def _gain() -> float:
    """How many times as fast a convolution of 3x3 is here in bfloat16 as in float32, tried in turns.

    In time of the processor, of one core: another program that wants it must not decide.
    """
    picture = torch.zeros(1, CHANNELS, SIDE, SIDE, dtype=torch.float32, device="cpu")
    weight = torch.zeros(CHANNELS, CHANNELS, 3, 3, dtype=torch.float32, device="cpu")
    picture = picture.contiguous(memory_format=torch.channels_last)
    operands = {kind: (picture.to(kind), weight.to(kind)) for kind in (torch.float32, torch.bfloat16)}
    least = dict.fromkeys(operands, inf)
    with on_one_core(), torch.inference_mode(), torch.autocast("cpu", enabled=False):
        for _ in range(TRIES):  # the first prepares the kernel and is never the least
            for kind, (x, w) in operands.items():
                began = thread_time()
                F.conv2d(x, w, padding=1)
                least[kind] = min(least[kind], thread_time() - began)
    return least[torch.float32] / max(least[torch.bfloat16], 1e-9)
