"""How maps lie in memory while a run trains: as is faster, found out on the machine itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvcodec.training import layout
from mvcodec.training.layout import memory_format

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew():
    memory_format.cache_clear()
    yield
    memory_format.cache_clear()


@pytest.mark.parametrize(
    ("bfloat16", "gain", "expected"),
    [
        (False, 2.0, torch.contiguous_format),
        (False, 1.1, torch.channels_last),
        (False, 0.7, torch.channels_last),
        (True, 2.0, torch.channels_last),
    ],
)
def test_channels_are_contiguous_only_where_that_pays_in_float32(monkeypatch, bfloat16, gain, expected):
    monkeypatch.setattr(layout, "bfloat16_pays", lambda device: bfloat16)
    monkeypatch.setattr(layout, "_gain", lambda: gain)
    assert memory_format(CPU) is expected


def test_a_gpu_keeps_channels_last(monkeypatch):
    monkeypatch.setattr(layout, "_gain", lambda: pytest.fail("tried on the processor"))
    assert memory_format(torch.device("cuda:1")) is torch.channels_last


@pytest.mark.parametrize("slow", [torch.channels_last, torch.contiguous_format])
def test_the_trial_tells_which_gradient_is_slow_whatever_the_program_was_told(monkeypatch, slow):
    """A gradient that takes its time is found out, under autocast and without gradients, too."""
    plain = F.conv2d

    def conv(x, *rest, **more):
        found = plain(x, *rest, **more)

        def dawdle(gradient):
            for _ in range(20 if x.is_contiguous(memory_format=slow) else 0):
                plain(x.detach(), rest[0].detach(), **more)

        found.register_hook(dawdle)
        return found

    monkeypatch.setattr(F, "conv2d", conv)
    monkeypatch.setattr(layout, "SIDE", 16)
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gain = layout._gain()
        assert not torch.is_grad_enabled()
    assert (gain > layout.ENOUGH) is (slow is torch.channels_last)
    assert torch.get_num_threads() == threads
