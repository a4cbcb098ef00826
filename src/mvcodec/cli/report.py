"""What the commands share: options, results on stdout, the rest on stderr, and going on after a bad file."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from mvcodec.cli import STDOUT, complain, printable, to_stderr, to_stdout
from mvcodec.errors import BatchError, MvcodecError, UsageError
from mvcodec.frames import MAX_PIXELS
from mvcodec.runtime import give_back

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_TORCH_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # its RuntimeErrors, on CUDA and on the CPU


class Report:
    """Where a command's words go. With --json each result is one object on one line of stdout."""

    def __init__(self, *, as_json: bool, verbose: bool, quiet: bool) -> None:
        self.as_json, self.verbose, self.quiet = as_json, verbose, quiet
        self.failures: list[int] = []
        self._failed: set[str] = set()  # --json has told
        self._say: Callable[[str], object] = to_stderr
        self.successes = 0

    def result(self, record: dict[str, Any], *lines: str, err: bool = False) -> None:
        """One finished file: `record` under --json, else `lines`; err=True where stdout may carry data."""
        self.successes += 1
        if self.as_json:
            told = {key: None if value != value else value for key, value in record.items()}  # no nan in JSON
            to_stdout(printable(json.dumps(told, ensure_ascii=False, allow_nan=False)))
        elif err:
            self.note(*lines)
        elif lines:
            to_stdout("\n".join(map(printable, lines)))

    def skipped(self, name: str, path: object) -> None:
        """A file whose output was there already."""
        record = {"file": name, "output": str(path), "skipped": True}
        self.result(record, f"{name}: {path} exists, skipped", err=True)

    def show(self, *lines: str) -> None:
        """Part of the human result, beside those of single files: a table's head or foot."""
        if not self.as_json:
            to_stdout("\n".join(map(printable, lines)))

    def note(self, *lines: str) -> None:
        for line in lines if not self.quiet else ():
            self._say(printable(line))

    def detail(self, line: str) -> None:
        if self.verbose:
            self._say(printable(line))

    @contextmanager
    def file(self, name: object, *members: object) -> Iterator[None]:
        """Inside this block an error concerns one file: it is told, remembered, and the batch goes on.

        members: the files, where `name` stands for several; --json then has an object for each.
        """
        try:
            yield
        except MvcodecError as error:
            self._fail(name, str(error), error.exit_code, members)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error) for words in _TORCH_OUT_OF_MEMORY):
                raise
            self._fail(name, "out of memory; try a smaller picture, fewer views or another device", 1, members)
        except OSError as error:
            if isinstance(error, BrokenPipeError) or error.filename == STDOUT:
                raise  # it would befall every other file, too
            sentence = error.strerror or str(error)
            if error.filename is not None and str(error.filename) != str(name):  # of what was to be written, say
                sentence = f"{error.filename}: {sentence}"
            self._fail(name, sentence, MvcodecError.exit_code, members)
        except UnicodeEncodeError as error:  # of a camera id that a locale without UTF-8 cannot make a file name of
            self._fail(name, str(error), MvcodecError.exit_code)

    def _fail(self, name: object, sentence: str, exit_code: int, members: Sequence[object] = ()) -> None:
        self.failures.append(complain(f"{name}: {sentence}", exit_code, self._say))
        if self.as_json:
            for file in map(str, members or (name,)):
                if file not in self._failed:  # its own damage, before what that does to its instant
                    to_stdout(json.dumps({"file": file, "error": sentence, "exit_code": exit_code}))
                self._failed.add(file)

    def progress(self, items: Sequence[T], what: str) -> Iterator[T]:
        """`items` with a bar on stderr, where stderr is a terminal and there is something to wait for."""
        if len(items) < 2 or self.quiet or not sys.stderr.isatty():
            yield from items
            return
        from tqdm import tqdm

        self._say = functools.partial(tqdm.write, file=sys.stderr)  # lines above the bar, not through it
        yield from tqdm(items, desc=what, file=sys.stderr)
        self._say = to_stderr

    def finish(self) -> None:
        """Exit with the one failure's own code, or 6 where others succeeded or failed too."""
        if not self.failures:
            return
        alone = len(self.failures) == 1 and self.successes == 0
        raise click.exceptions.Exit(self.failures[0] if alone else BatchError.exit_code)


def reporting(command: F) -> F:
    """Adds --json, -v and --quiet; the command receives them as its first argument, a Report."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object per file on stdout.")
    @click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
    @click.option("--quiet", is_flag=True, help="Say nothing on stderr but errors.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        return command(Report(as_json=as_json, verbose=verbose, quiet=quiet), *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def running(command: F) -> F:
    """Adds --model and --device."""
    model = click.option(
        "--model", metavar="NAME|FILE", help="Weights: a name from `mvcodec models` or a .safetensors file."
    )
    return on_device(model(command))


def on_device(command: F) -> F:
    """Adds --device."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:i]",
        callback=_check_device,
        help="Where to compute. CUDA that is asked for but absent is an error.",
    )(command)


def _check_device(ctx: click.Context, option: click.Parameter, value: str) -> str:
    kind, _, index = value.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise UsageError(f"--device {value}: use auto, cpu, cuda or cuda:0, cuda:1, ...")
    return value


def size_in_bytes(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes from 50000, 50k, 1.5M or 4G (powers of 1000)."""
    if value is None:
        return None
    factor = {"k": 1e3, "m": 1e6, "g": 1e9}.get(value[-1:].lower())
    try:
        size = int(float(value[:-1] if factor else value) * (factor or 1))
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UsageError(f"{option.opts[0]} {value}: use a number of bytes such as 50000, 50k or 1.5M")
    return size


def within_pixels(command: F) -> F:
    """Adds --max-pixels, of .phv files."""
    return click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        default=MAX_PIXELS,
        show_default=True,
        help="Refuse files of larger pictures before anything is allocated.",
    )(command)


def within_memory(command: F) -> F:
    """Adds --max-memory."""
    return click.option(
        "--max-memory",
        metavar="BYTES",
        callback=_budget,
        help="Stay within so many bytes (512M, 4G), in tiles where pictures are large; refuse what cannot.",
    )(command)


def _budget(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    size = size_in_bytes(ctx, option, value)
    if size is not None:
        give_back()
    return size
