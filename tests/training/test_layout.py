"""How maps lie in memory while a run trains."""

from __future__ import annotations

import pytest
import torch

from mvcodec.training import layout
from mvcodec.training.layout import memory_format


@pytest.mark.parametrize(
    ("device", "capability", "bfloat16", "expected"),
    [
        ("cpu", "AVX2", False, torch.contiguous_format),
        ("cpu", "AVX2", True, torch.channels_last),  # as told by ATEN_CPU_CAPABILITY where there is more
        ("cpu", "AVX512", False, torch.channels_last),
        ("cpu", "DEFAULT", False, torch.channels_last),
        ("cuda:1", "AVX2", False, torch.channels_last),
    ],
)
def test_channels_are_contiguous_only_where_gradients_are_slow_otherwise(
    monkeypatch, device, capability, bfloat16, expected
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(layout, "bfloat16_pays", lambda device: bfloat16)
    assert memory_format(torch.device(device)) is expected
