"""The `mvcodec` command: one thin file per subcommand, each imported only when it is called.

    encode   pictures -> .phv, each camera alone          info     what a .phv says about itself (instant)
    decode   .phv of any number of cameras -> pictures    verify   is a .phv intact? (instant; --deep decodes)
    bench    time per stage                               train    new weights from folders of scenes
    evaluate rate and distortion against other codecs     models   the weights at hand
    demo     the example scene, end to end                export   a training checkpoint -> a model file
    selftest does this machine compute the same integers as all others?

Exit codes: 0 ok, 1 runtime, 2 usage, 3 input picture, 4 corrupt .phv, 5 model missing or mismatched,
6 a batch finished with failures, 7 desynchronised, 130 interrupted, 143 terminated. Every error is one line on
stderr, `mvcodec: FILE: sentence`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

import click

from mvcodec import __version__
from mvcodec.cli.termination import terminable
from mvcodec.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, MvcodecError, UsageError
from mvcodec.runtime import prepare

COMMANDS = ("encode", "decode", "info", "verify", "bench", "train", "export", "evaluate", "demo", "models", "selftest")
STDOUT = "standard output"


class LazyGroup(click.Group):
    """A command `name` is the attribute `name` of the module `mvcodec.cli.name`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"mvcodec.cli.{cmd_name}"), cmd_name)
        return command


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="mvcodec", message="%(prog)s %(version)s")
@click.pass_context
def group(ctx: click.Context) -> None:
    """Learned multi-view image codec.

    Every camera encodes alone into its own .phv file; the receiver decodes any number of them together, and
    the views of one place help each other.
    """
    if ctx.invoked_subcommand is None:
        to_stdout(ctx.get_help())


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command and exit with the code of whatever went wrong."""
    prepare()  # before torch is imported
    with terminable() as terminated:
        try:
            code = group.main(args, prog_name="mvcodec", standalone_mode=False)
        except click.ClickException as error:
            code = complain(error.format_message(), UsageError.exit_code)
        except click.Abort:
            ended = ("terminated", TERMINATED_EXIT_CODE) if terminated() else ("interrupted", INTERRUPTED_EXIT_CODE)
            code = complain(*ended)
        except MvcodecError as error:
            code = complain(str(error), error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # the reader left; Python would complain about it once more at exit
            code = MvcodecError.exit_code
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            code = complain(f"{where}{error.strerror or error}", MvcodecError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def writing_stdout() -> Iterator[None]:
    """What goes wrong inside is stdout's own: no file is to blame, and no next file would fare better."""
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def to_stdout(text: str) -> None:
    with writing_stdout():
        click.echo(text)


def to_stderr(text: str) -> None:
    click.echo(text, err=True)


def complain(sentence: str, exit_code: int, say: Callable[[str], object] = to_stderr) -> int:
    """One line on stderr, whatever the message was made of."""
    say(printable(f"mvcodec: {' '.join(sentence.split())}"))
    return exit_code


def printable(line: str) -> str:
    """Names may be no UTF-8 or hold what moves a terminal's cursor: that becomes an escape that JSON has, too."""
    utf8 = line.encode(errors="backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda control: f"\\u{ord(control[0]):04x}", utf8)
