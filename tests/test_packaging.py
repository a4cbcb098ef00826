"""What `pip install .` gives: the code, the weights and the example scene in one wheel, found from there."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked as pip would."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel; it comes with the extra `test`")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("mvcodec-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_carries_code_weights_and_example(installed: Path) -> None:
    package = installed / "mvcodec"
    for folder, beside in (
        ("models", ROOT / "models"),
        ("examples/nineveh", ROOT / "examples/nineveh"),
        ("configs", ROOT / "configs"),
    ):
        names = sorted(path.name for path in beside.iterdir())
        assert names
        assert sorted(path.name for path in (package / folder).iterdir()) == names
    assert (package / "py.typed").exists()
    assert {path.name for path in (ROOT / "src/mvcodec").glob("*.py")} == {p.name for p in package.glob("*.py")}
    assert not list(installed.rglob("test_*.py"))


def test_installed_package_finds_its_data_inside_itself(installed: Path, tmp_path: Path) -> None:
    program = "from mvcodec.files import shipped; print(shipped('models')); print(shipped('examples/nineveh'))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    inside = installed / "mvcodec"
    assert run.stdout.splitlines() == [str(inside / "models"), str(inside / "examples/nineveh")]


def test_source_tree_finds_its_data_at_its_root() -> None:
    from mvcodec.files import shipped

    assert shipped("models") == ROOT / "models"
    assert len(list(shipped("examples/nineveh").glob("*.webp"))) >= 3
    assert "CC BY 4.0" in (shipped("examples/nineveh") / "ATTRIBUTION.md").read_text()
