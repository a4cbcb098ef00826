"""What a program tells torch about the speed of float32 moves no integer, whenever and in which thread it says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import DesyncError
from mvcodec.exact.check import check_layers
from mvcodec.exact.precision import ROUNDED, Strict, _switches
from mvcodec.exact.stored import exact_layers
from mvcodec.images import Image
from mvcodec.weights import exact_parts
from tests.conftest import smooth_picture

CONVOLUTIONS = getattr(torch.backends.mkldnn, "conv", None)  # torch 2.9 and later


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch then makes matrix products of more convolutions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def rounded_products() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def rounded_everything() -> Iterator[None]:
    if CONVOLUTIONS is None:
        pytest.skip("this torch has no such switch")
    torch.backends.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"
        assert CONVOLUTIONS.fp32_precision == "none"  # it follows still


@contextmanager
def rounded_convolutions() -> Iterator[None]:
    if CONVOLUTIONS is None:
        pytest.skip("this torch has no such switch")
    CONVOLUTIONS.fp32_precision = "bf16"
    try:
        yield
    finally:
        CONVOLUTIONS.fp32_precision = "none"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("told", [rounded_products, rounded_convolutions, rounded_everything])
def test_what_torch_is_told_moves_no_integer(tiny_model, told):
    image = Image(smooth_picture(100, 150))
    before = encode_image(tiny_model, image, 50)
    with told():
        assert check_layers(exact_layers(exact_parts(tiny_model.net)))
        during = encode_image(tiny_model, image, 50)  # other bytes perhaps: the analysis is floating point
        assert decode_set(tiny_model, [before])
    assert decode_set(tiny_model, [during])


@rounded_products()
def test_the_last_thread_to_leave_puts_it_back():
    def settings() -> list[str]:
        return [switch.says for switch in _switches()]

    before, strict = settings(), Strict()
    assert any(value in ROUNDED for value in before)
    strict.__enter__()
    with strict:
        assert not any(value in ROUNDED for value in settings())
    strict.__enter__()
    strict.__exit__(None)  # the first to come in
    assert not any(value in ROUNDED for value in settings())
    strict.__exit__(None)
    assert settings() == before


def test_a_thread_that_has_torch_round_meanwhile_is_noticed():
    strict = Strict()
    with rounded_products():
        said = torch.get_float32_matmul_precision()
        strict.__enter__()
        torch.set_float32_matmul_precision("high")
        with pytest.raises(DesyncError, match="another thread told torch to round"):
            strict.__exit__(None)
        assert torch.get_float32_matmul_precision() == "high" != said  # and has the last word
    with strict:  # and again as if nothing had been
        pass
