"""One exception per cause; each owns its exit code and says what is wrong in one plain sentence.

The command line prints ``mvcodec: FILE: SENTENCE`` and exits with ``exit_code``. Anything that is not an
`MvcodecError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 130  # Ctrl-C, as shells report it: 128 + SIGINT
TERMINATED_EXIT_CODE = 143  # 128 + SIGTERM


class MvcodecError(Exception):
    """Base of every error mvcodec raises on purpose; `str(error)` is the sentence."""

    exit_code = 1


class UsageError(MvcodecError):
    """The caller asked for something the rules do not allow."""

    exit_code = 2


class PictureError(MvcodecError):
    """An input picture cannot be read or is of a kind that mvcodec does not code.

    option: of `mvcodec encode` and `mvcodec.encode`, what would take it nevertheless.
    """

    exit_code = 3

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(f"{message}; {option}" if option else message)
        self.message = message
        self.option = option

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return type(self), (self.message, self.option)  # worker processes send errors by pickle


class BitstreamError(MvcodecError):
    """A .phv file is corrupt, truncated or not a .phv file at all.

    offset: byte position in the file at which it was noticed, None where no single byte is to blame.
    """

    exit_code = 4

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message if offset is None else f"{message} (at byte {offset})")
        self.message = message
        self.offset = offset

    def __reduce__(self) -> tuple[type[BitstreamError], tuple[str, int | None]]:
        return type(self), (self.message, self.offset)  # as above


class ModelError(MvcodecError):
    """The weights are missing, invalid, or not those the stream was written with."""

    exit_code = 5


class BatchError(MvcodecError):
    """A batch ran to its end, but some of its files failed; each was reported where it happened."""

    exit_code = 6


class DesyncError(MvcodecError):
    """The decoded integers are not those the encoder wrote: its arithmetic and ours differ."""

    exit_code = 7
