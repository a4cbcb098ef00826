"""Every error has its exit code, says one sentence, and survives the way back from a worker process."""

from __future__ import annotations

import pickle

import pytest

from mvcodec import errors


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


def test_bitstream_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.BitstreamError("CRC mismatch", 1042)))
    assert (str(error), error.offset) == ("CRC mismatch (at byte 1042)", 1042)
