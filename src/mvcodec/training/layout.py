"""How maps lie in memory while a run trains: channels last, but where the gradients of convolutions are slow in it.

Processors with AVX2 and nothing newer take four to five times as long for the gradient of float32 weights with channels
last. By what the processor is, not by a trial: processes of one run, and a run resumed, must choose alike.
"""

from __future__ import annotations

import torch

from mvcodec.precision import bfloat16_pays


def memory_format(device: torch.device) -> torch.memory_format:
    """The faster one on `device`."""
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2" and not bfloat16_pays(device)
    return torch.contiguous_format if slow else torch.channels_last
