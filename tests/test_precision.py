"""Which precision the float networks run in: what pays, never what the processor merely claims."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mvcodec import precision
from mvcodec.precision import autocast, bfloat16_pays

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anew():
    bfloat16_pays.cache_clear()
    yield
    bfloat16_pays.cache_clear()


def pretend(monkeypatch, claimed: bool, gain: float) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: claimed)
    monkeypatch.setattr(precision, "_gain", lambda: gain)


@pytest.mark.parametrize(
    ("claimed", "gain", "pays"),
    [(True, 5.0, True), (True, 2.0, True), (True, 1.1, False), (True, 0.6, False), (False, 5.0, False)],
)
def test_a_processor_runs_in_bfloat16_only_if_that_is_faster(monkeypatch, claimed, gain, pays):
    pretend(monkeypatch, claimed, gain)
    assert bfloat16_pays(CPU) is pays
    with autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (torch.bfloat16 if pays else torch.float32)


def test_it_is_tried_once(monkeypatch):
    tries = []
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "_gain", lambda: tries.append(1) or 2.0)
    assert bfloat16_pays(CPU)
    assert bfloat16_pays(torch.device("cpu"))
    assert len(tries) == 1


@pytest.mark.parametrize("slow", [torch.float32, torch.bfloat16])
def test_the_trial_tells_which_is_slow_whatever_the_program_was_told(monkeypatch, slow):
    """By a clock that goes on by forty for a slow convolution, under autocast and another default, too."""
    plain = F.conv2d
    kinds = set()
    now = 0.0

    def conv(x, *rest, **more):
        nonlocal now
        kinds.add(x.dtype)
        now += 40 if x.dtype is slow else 1
        return plain(x, *rest, **more)

    monkeypatch.setattr(F, "conv2d", conv)
    monkeypatch.setattr(precision, "thread_time", lambda: now)
    threads, before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            gain = precision._gain()
    finally:
        torch.set_default_dtype(before)
    assert kinds == {torch.float32, torch.bfloat16}
    assert (gain > precision.ENOUGH) is (slow is torch.float32)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("in_hardware", [True, False])
def test_a_gpu_must_have_it_in_hardware(monkeypatch, in_hardware):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or in_hardware)
    assert bfloat16_pays(torch.device("cuda:1")) is in_hardware
