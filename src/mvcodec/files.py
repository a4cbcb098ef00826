"""Where files are found and how they appear: shipped data, and output that is whole or absent."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mvcodec.errors import UsageError

Input = bytes | bytearray | memoryview | str | os.PathLike[str]
_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path:
    """The folder `name` ("models", "examples/nineveh") of an installed wheel or of the source tree.

    The wheel carries both in the package (pyproject.toml, force-include); a checkout has them at its root.
    The path returned need not exist: the caller knows what its absence means.
    """
    inside, beside = _PACKAGE / name, _PACKAGE.parents[1] / name
    return beside if beside.exists() and not inside.exists() else inside


def contents(file: Input) -> bytes:
    """The bytes of a file, given by its path or as they are."""
    if isinstance(file, bytes | bytearray | memoryview):
        return bytes(file)
    if isinstance(file, str | os.PathLike):
        return Path(file).read_bytes()
    raise UsageError(f"a {type(file).__name__} is no file: give its path or its bytes")


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well; its folder is made if need be.

    The temporary file lies in the same folder, because a rename is atomic only within one file system. A link stays
    one, to a file that is new.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from error
    part: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".mvcodec-", suffix=".part")
        part = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
        part.chmod(0o666 & ~_umask())  # mkstemp makes files private; give it what an ordinary write would
        part.replace(path)
    except BaseException as error:
        if part is not None:
            part.unlink(missing_ok=True)
        # A full disk says no name, and nobody knows that of the temporary file.
        if isinstance(error, OSError) and error.errno and (part is None or error.filename in (None, str(part))):
            error.filename = str(path)
        raise


def _umask() -> int:
    mask = os.umask(0)  # the only portable way to read it is to set it
    os.umask(mask)
    return mask
