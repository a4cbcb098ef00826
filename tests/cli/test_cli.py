"""What holds for every command: help, exit codes, one-line errors, no torch where none is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mvcodec
from mvcodec import container
from mvcodec.cli import COMMANDS
from mvcodec.cli.report import Report
from mvcodec.cli.targets import STDIN, Targets
from mvcodec.cli.termination import terminable
from mvcodec.files import atomic
from mvcodec.training.checkpoint import uninterrupted

from .conftest import Cli

FULL = Path("/dev/full")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert b"--json" in outcome.out
    assert outcome.out.startswith(f"Usage: mvcodec {command} ".encode())


def test_help_lists_all_commands_and_version_is_the_package_s(cli: Cli) -> None:
    listing = cli().out.decode()
    assert all(f"\n  {command} " in listing for command in COMMANDS)
    assert cli("--version").out == f"mvcodec {mvcodec.__version__}\n".encode()


@pytest.mark.parametrize("command", ["info", "verify"])
def test_no_torch_numpy_or_pillow_to_inspect_a_file(coded: Path, command: str) -> None:
    program = (
        "import sys\n"
        "from mvcodec.cli import main\n"
        "try:\n"
        f"    main(['{command}', sys.argv[1]])\n"
        "except SystemExit as exit_:\n"
        "    assert exit_.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'compressai', 'constriction', 'tqdm'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(mvcodec.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", program, coded / "C1/00000000.phv"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "00000000.phv" in run.stdout


def test_importing_the_package_is_light() -> None:
    program = "import sys, mvcodec; mvcodec.info; assert not {'torch', 'numpy'} & sys.modules.keys()"
    environment = {**os.environ, "PYTHONPATH": str(Path(mvcodec.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def one_line(err: str, *parts: str) -> None:
    assert err.startswith("mvcodec: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_exit_1_runtime(cli: Cli, scene: Path) -> None:
    outcome = cli("encode", scene / "C1/00000000.png", "--target-size", "20")
    assert outcome.code == 1
    one_line(outcome.err, "C1/00000000.png: needs", "bytes at quality 0, the target is 20")
    outcome = cli("encode", scene / "C1/00000000.png", "--device", "cuda:77")
    assert outcome.code == 1
    one_line(outcome.err, "cuda:77 is not there")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(28, "No space left on device", "a.csv"), "a.csv: No space left on device"),
        (OSError("what a library says"), "what a library says"),
    ],
)
def test_exit_1_system(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("mvcodec.weights.available_models", fail)
    outcome = cli("models")
    assert outcome.code == 1
    assert outcome.err == f"mvcodec: {sentence}\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_exit_1_full_stdout_is_blamed_on_no_file_and_ends_the_command(coded: Path) -> None:
    files = [coded / "C1/00000000.phv", coded / "C2/00000000.phv"]
    for args in (["info", *files], ["info", "--json", *files], []):
        with FULL.open("wb") as full:
            run = subprocess.run(
                [sys.executable, "-m", "mvcodec", *args],
                env={**os.environ, "PYTHONPATH": str(Path(mvcodec.__file__).parents[1])},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert run.returncode == 1
        assert run.stderr == "mvcodec: standard output: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_pictures_that_a_full_stdout_does_not_take_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(as_json=False, verbose=False, quiet=False)
    with FULL.open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=full, isatty=full.isatty))
        with pytest.raises(OSError, match="standard output"), report.file("a.phv"):
            Targets("-", ["a.phv"], force=False, skip_existing=False).write(STDIN, b"picture")
    assert not report.failures


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["encode"], "Missing argument"),
        (["encode", "absent.png"], "absent.png: no such file"),
        (["encode", "scene", "--quality", "101"], "101"),
        (["encode", "scene", "--no-such-option"], "--no-such-option"),
        (["encode", "scene", "--target-bpp", "1", "--target-size", "9k"], "exclude each other"),
        (["encode", "scene", "--target-size", "9x"], "number of bytes"),
        (["encode", "scene", "--target-bpp", "1", "-q", "50"], "exclude each other"),
        (["encode", "scene", "--target-bpp", "inf"], "is not a rate"),
        (["encode", "scene/C1/00000000.png", "-o", "a.PNG"], "is the name of a picture"),
        (["encode", "scene", "--frame", "3"], "--frame"),
        (["encode", "scene", "--device", "gpu"], "use auto, cpu, cuda"),
        (["encode", "scene", "-"], "stdin cannot be mixed"),
        (["encode", "scene", "--names", "{what}"], "at most once"),
        (["encode", "scene", "-o", "-", "--json"], "both go to stdout"),
        (["train", "scene", "--out", "x", "--crop", "100"], "multiple of 64"),
        (["train", "scene", "--out", "x", "--device", "gpu"], "use auto, cpu, cuda"),
        (["decode", "scene"], "holds no .phv files"),
        (["nonsense"], "No such command"),
    ],
)
def test_exit_2_usage(cli: Cli, scene: Path, args: list[str], sentence: str) -> None:
    outcome = cli(*args)
    assert outcome.code == 2
    one_line(outcome.err, sentence)
    assert outcome.out == b""


def test_exit_3_picture(cli: Cli) -> None:
    Path("note.png").write_text("hello")
    outcome = cli("encode", "note.png")
    assert outcome.code == 3
    one_line(outcome.err, "mvcodec: note.png: is not a picture")
    assert not Path("note.phv").exists()


@pytest.mark.parametrize("command", ["info", "verify", "decode"])
def test_exit_4_corrupt(cli: Cli, command: str) -> None:
    for data in (b"", b"hello", b"\x89PHV\r\n\x1a\n"):
        Path("a.phv").write_bytes(data)
        outcome = cli(command, "a.phv")
        assert outcome.code == 4
        one_line(outcome.err, "mvcodec: a.phv: ")


def test_exit_4_flipped_payload_is_named_with_its_place(cli: Cli, coded: Path) -> None:
    path = coded / "C1/00000000.phv"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert cli("info", path).code == 0
    for command in ("verify", "decode"):
        outcome = cli(command, path)
        assert outcome.code == 4
        one_line(outcome.err, f"mvcodec: {path}: CRC mismatch in slice 3", "at byte")


def test_exit_5_model(cli: Cli, coded: Path) -> None:
    outcome = cli("encode", "scene", "--model", "enormous")
    assert outcome.code == 5
    one_line(outcome.err, "enormous", "available: ")
    Path("other.phv").write_bytes(_with_header((coded / "C1/00000000.phv").read_bytes(), model_id=bytes(8)))
    for args in (
        ["decode", "other.phv"],
        ["verify", "--deep", "other.phv"],
        ["decode", "other.phv", "--model", "tiny"],
    ):
        outcome = cli(*args)
        assert outcome.code == 5
        one_line(outcome.err, "other.phv", "0000000000000000")


def test_exit_6_a_batch_goes_on_past_a_bad_picture(cli: Cli, scene: Path) -> None:
    (scene / "C1/00000001.png").write_text("hello")
    outcome = cli("encode", scene, "-o", "coded", "--json")
    assert outcome.code == 6
    one_line(outcome.err, "C1/00000001.png: is not a picture")
    assert [record.get("exit_code") for record in outcome.records] == [None, 3, None, None]
    assert len(list(Path("coded").rglob("*.phv"))) == 3


def test_exit_7_desynchronised(cli: Cli, coded: Path) -> None:
    stream = container.unpack((coded / "C1/00000000.phv").read_bytes())
    first = stream.slices[0]
    forged = (container.Slice(first.sections, first.check ^ 1), *stream.slices[1:])
    Path("a.phv").write_bytes(container.pack(container.Stream(stream.header, stream.hyper, forged)))
    assert cli("verify", "a.phv").code == 0
    for command in (["verify", "--deep"], ["decode"]):
        outcome = cli(*command, "a.phv")
        assert outcome.code == 7
        one_line(outcome.err, "mvcodec: a.phv: slice 0")
    assert not Path("a.png").exists()


def test_exit_130_interrupted(cli: Cli, scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mvcodec.codec.encode_image", interrupt)
    outcome = cli("encode", scene / "C1/00000000.png")
    assert outcome.code == 130
    assert outcome.err.strip() == "mvcodec: interrupted"


@pytest.mark.parametrize("ignored", [False, True])
def test_exit_143_terminated_leaves_nothing_half_written(
    cli: Cli, scene: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    """Also where Ctrl-C is ignored, as in a shell's background, and where it waits for a step's end."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    reached = []

    def write(targets: Targets, path: Path, data: bytes) -> None:
        with atomic(path) as file:
            file.write(data[:10])
            with uninterrupted():
                signal.raise_signal(signal.SIGTERM)
                reached.append("the step's end")
            reached.append("what comes behind it")

    monkeypatch.setattr(Targets, "write", write)
    try:
        outcome = cli("encode", scene / "C1/00000000.png", "-o", "out/a.phv")
        assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if ignored else signal.default_int_handler)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.code == 143
    assert outcome.err.strip() == "mvcodec: terminated"
    assert reached == ["the step's end"]
    assert not list(Path("out").iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_who_handles_sigterm_already_is_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable() as terminated:
            signal.raise_signal(signal.SIGTERM)
            assert not terminated()
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_header(data: bytes, **changes: Any) -> bytes:
    stream = container.unpack(data)
    return container.pack(replace(stream, header=replace(stream.header, **changes)))
