"""Every error has its exit code, says one sentence, and survives the way back from a worker process."""

from __future__ import annotations

import pickle

import pytest

from mvcodec import errors
from mvcodec.latents import _WrongIntegers


def test_exit_codes_are_the_documented_ones() -> None:
    codes = {
        errors.MvcodecError: 1,
        errors.UsageError: 2,
        errors.PictureError: 3,
        errors.BitstreamError: 4,
        errors.ModelError: 5,
        errors.BatchError: 6,
        errors.DesyncError: 7,
    }
    assert {kind: kind.exit_code for kind in codes} == codes
    assert (errors.INTERRUPTED_EXIT_CODE, errors.TERMINATED_EXIT_CODE) == (130, 143)


@pytest.mark.parametrize("kind", errors.MvcodecError.__subclasses__())
def test_message_is_the_sentence(kind: type[errors.MvcodecError]) -> None:
    assert str(kind("the sky fell")) == "the sky fell"


def test_bitstream_error_names_the_byte() -> None:
    error = errors.BitstreamError("CRC mismatch", 1042)
    assert (str(error), error.offset) == ("CRC mismatch (at byte 1042)", 1042)


@pytest.mark.parametrize(
    "error",
    [
        *(kind("the sky fell") for kind in errors.MvcodecError.__subclasses__()),
        errors.PictureError("has alpha", "say --alpha drop"),
        errors.BitstreamError("CRC mismatch", 1042),
        _WrongIntegers(3, "check differs"),
    ],
    ids=str,
)
def test_errors_survive_the_way_back_from_a_worker_process(error: errors.MvcodecError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))
