"""Where output goes: beside the input, into a file, into a folder that mirrors the input, or to stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

from mvcodec import container
from mvcodec.cli import writing_stdout
from mvcodec.cli.report import Report
from mvcodec.errors import BitstreamError, UsageError
from mvcodec.files import atomic
from mvcodec.frames import PICTURE_SUFFIXES, STREAM_SUFFIX, Source, absolute, find

STDIN = Path("-")
_ENDINGS = {*PICTURE_SUFFIXES, STREAM_SUFFIX}
F = TypeVar("F", bound=Callable[..., Any])


def placing(command: F) -> F:
    """Adds -o, -f and --skip-existing."""
    for option in (
        click.option("--skip-existing", is_flag=True, help="Leave outputs that exist as they are."),
        click.option("-f", "--force", is_flag=True, help="Overwrite outputs that exist."),
        click.option(
            "-o",
            "--output",
            metavar="FILE|DIR|-",
            help="File (with its ending), folder (mirrors the input) or stdout. Default: beside the input.",
        ),
    ):
        command = option(command)
    return command


def sources(inputs: Sequence[str], suffixes: frozenset[str]) -> list[Source]:
    """The input files; "-" alone is stdin."""
    if "-" in inputs:
        if len(inputs) > 1:
            raise UsageError("-: stdin cannot be mixed with other inputs")
        return [Source(STDIN, Path("view"))]
    return find([absolute(STDIN) if Path(given) == STDIN else given for given in inputs], suffixes)  # ./- is a file


def read(source: Source) -> bytes:
    if source.path != STDIN:
        return source.path.read_bytes()
    if sys.stdin is None:
        raise UsageError("stdin is closed")
    return sys.stdin.buffer.read()


class Part(NamedTuple):
    """A .phv file in an input: `all.phv`, or `all.phv[2]` where several were concatenated."""

    name: str
    data: bytes
    header: container.Header


def parts_in(report: Report, source: Source) -> list[Part]:
    """The .phv files in one input, concatenated ones cut apart; of one whose header cannot be read it is told."""
    name, pieces, found = label(source.path), [], list[Part]()
    with report.file(name):
        data = read(source)
        pieces = list(container.split(data)) or [(0, data)]
    for number, (start, piece) in enumerate(pieces):
        called = name if len(pieces) == 1 else f"{name}[{number}]"
        with report.file(called):
            try:
                found.append(Part(called, piece, container.unpack_header(piece)))
            except BitstreamError as error:
                where = f"in the file starting at byte {start}: " if start else ""
                raise BitstreamError(where + error.message, start + (error.offset or 0)) from error
    return found


class Targets:
    """The decision about every output, made before any work is done.

    -o names a folder if it is one, ends in a slash or has no ending such as .png; else it names one file. Of a folder's
    files it names a folder, `coded_v1.0`, unless its ending is one of a picture or of .phv.
    """

    def __init__(self, output: str | None, inputs: Sequence[str], *, force: bool, skip_existing: bool) -> None:
        self.force, self.skip_existing = force, skip_existing
        self.to_stdout = output == "-" or (output is None and list(inputs) == ["-"])
        if output == "":
            raise UsageError("-o: is empty; name a file or a folder")
        if self.to_stdout and sys.stdout is None:
            raise UsageError("stdout is closed; say -o FILE")
        if self.to_stdout and sys.stdout.isatty():
            raise UsageError("will not write binary data to a terminal; say -o FILE")
        self.output = None if output is None or self.to_stdout else Path(output)
        self.is_folder = self.output is not None and (
            self.output.is_dir()
            or str(output).endswith(("/", "\\"))
            or not self.output.suffix
            or (self.output.suffix.lower() not in _ENDINGS and any(Path(given).is_dir() for given in inputs))
        )
        if self.is_folder and self.output is not None and self.output.exists() and not self.output.is_dir():
            raise UsageError(f"{output}: is no folder; a file is named with its ending")

    def check_stdout(self, as_json: bool) -> None:
        if self.to_stdout and as_json:
            raise UsageError("--json and the output would both go to stdout; say -o FILE")

    def plan(self, wanted: Sequence[tuple[Source, str]]) -> list[Path]:
        """The path of each output, given its source and suffix; UsageError on collisions and overwriting."""
        if self.to_stdout:
            return [STDIN] * len(wanted)
        if self.output is not None and not self.is_folder and len(wanted) > 1:
            raise UsageError(f"{self.output}: is one file, but there are {len(wanted)} outputs; name a folder")
        paths = [self._path(source, suffix) for source, suffix in wanted]
        seen: dict[Path, Source] = {}
        for path, (source, _) in zip(paths, wanted, strict=True):
            place = absolute(path)
            if place in seen:
                both = f"both {seen[place].path} and {source.path} would be written there"
                raise UsageError(f"{path}: {both}; rename one, or name the files that you want")
            seen[place] = source
            if place == absolute(source.path):
                raise UsageError(f"{path}: is both input and output")
            if not _is_there(path):
                continue
            if not path.is_file():
                raise UsageError(f"{path}: is there, and no file that could be overwritten; -o - writes to stdout")
            if not (self.force or self.skip_existing):
                raise UsageError(f"{path}: exists; overwrite with -f or leave it with --skip-existing")
        return paths

    def _path(self, source: Source, suffix: str) -> Path:
        if self.output is None:
            return _ended(source.path, suffix)
        return self.output / _ended(source.relative, suffix) if self.is_folder else self.output

    def suffix(self, default: str) -> str:
        """The ending of -o FILE where there is one: it says which kind of file is wanted."""
        return default if self.output is None or self.is_folder else self.output.suffix or default

    def skips(self, path: Path) -> bool:
        return self.skip_existing and path != STDIN and _is_there(path)

    def write(self, path: Path, data: bytes) -> None:
        if path == STDIN:
            with writing_stdout():
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
        else:
            with atomic(path) as file:
                file.write(data)


def _is_there(path: Path) -> bool:
    """Whether anything is; of a name that is too long, whoever writes it is told."""
    try:
        return path.exists()
    except OSError:
        return False


def _ended(path: Path, suffix: str) -> Path:
    """The path with its own ending replaced."""
    return path.with_name(f"{path.stem}{suffix}")


def label(path: Path) -> str:
    """How a path is called in messages and records."""
    return "-" if path == STDIN else str(path)
