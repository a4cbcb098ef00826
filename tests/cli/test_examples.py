"""The example scripts run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


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
