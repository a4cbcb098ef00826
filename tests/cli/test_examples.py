"""The example scripts run as they stand."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image as pil

from .conftest import Cli

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_the_commands_of_the_readme_run_one_after_the_other(cli: Cli, scene: Path) -> None:
    shutil.copytree(scene / "C1", "C1")
    for name in ("photo.jpg", "large.tif"):
        pil.new("RGB", (40, 30)).save(name)
    block = (ROOT / "README.md").read_text().split("## Use\n")[1].split("```")[0]
    commands = [line.split("#")[0] for line in block.splitlines() if "mvcodec " in line and "selftest" not in line]
    assert len(commands) == 11
    for command in commands:
        before, _, arguments = command.partition("mvcodec ")
        piped = (
            b"".join(path.read_bytes() for path in sorted(Path("coded").glob("*/*.phv"))) if "cat " in before else b""
        )
        outcome = cli(*arguments.replace("fast-ms-ssim", "tiny").split(), stdin=piped)
        assert outcome.code == 0, command + outcome.err


def test_camera_and_sink(
    workplace: Path, scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (scene / "C1/00000000.png").rename(scene / "C1/a.png")
    (scene / "C1/00000001.png").rename(scene / "C1/b.png")
    monkeypatch.setattr(sys, "argv", ["camera_and_sink.py", str(scene / "C1")])
    runpy.run_path(str(EXAMPLES / "camera_and_sink.py"), run_name="__main__")
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("2 cameras sent ")
    assert lines == [
        "  a: 70 x 50, with the help of b",
        "  b: 70 x 50, with the help of a",
        "the first camera is lost",
        "  b: 70 x 50, with the help of nobody",
    ]
