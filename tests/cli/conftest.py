"""The command in this process, an untrained tiny model, and a small scene of two cameras and two frames."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as pil

from mvcodec.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one call."""

    code: int
    out: bytes
    err: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Cli = Callable[..., Outcome]


@pytest.fixture(scope="session")
def models(tiny_model_file: Path) -> Path:
    """A folder with one model, `tiny`: untrained, which changes no rule of the command line."""
    return tiny_model_file.parent


@pytest.fixture
def workplace(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the tiny model as the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MVCODEC_MODELS", str(models))
    monkeypatch.setattr("mvcodec.weights.DEFAULT_MODEL", "tiny")
    return tmp_path


@pytest.fixture
def cli(workplace: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Cli:
    """Calls `mvcodec` in the workplace."""

    def call(*args: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfdbinary.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in args])
        sys.stdout.flush()
        out, err = capfdbinary.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err.decode())

    return call


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """scene/C1 and scene/C2, frames 0 and 1 each, two sizes."""
    rng = np.random.default_rng(0)
    for camera, size in (("C1", (70, 50)), ("C2", (64, 64))):
        for frame in range(2):
            path = tmp_path / "scene" / camera / f"{frame:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pil.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return tmp_path / "scene"


@pytest.fixture
def coded(cli: Cli, scene: Path) -> Path:
    """The scene, encoded into coded/."""
    assert cli("encode", scene, "-o", "coded", "--quiet").code == 0
    return scene.parent / "coded"
