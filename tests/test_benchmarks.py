"""The benchmark programs run, here on tiny networks; what they print on large ones is not a test's business."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_measures_every_stage_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program("gpu").main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json")])
    about, *records = [json.loads(line) for line in (tmp_path / "gpu.json").read_text().splitlines()]
    assert about["tiny_integers_as_on_cpu"]
    assert [(r["task"], r["views"]) for r in records] == [
        *((task, 1) for task in ("encode", "decode")),
        *((task, 2) for task in ("encode", "decode alone", "decode unaligned", "decode")),
    ]
    assert all(0 < r["codec_ms"] <= r["total_ms"] for r in records)
    assert "Para-EM" in capsys.readouterr().out


def test_growth_fits_exponents_and_plots(tiny_model_file: Path, tmp_path: Path) -> None:
    growth = program("growth")
    assert growth.fit([1, 2, 4, 8, 16], [3, 12, 48, 192, 768]) == 2
    arguments = ["--sides", "64", "128", "--views", "1", "2", "--view-side", "64", "--model", str(tiny_model_file)]
    growth.main([*arguments, "--plot", str(tmp_path / "a.png"), "--out", str(tmp_path / "a.json")])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [len(r["points"]) for r in results] == [2, 2, 2, 2]
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.slow  # CompressAI takes seconds to import
def test_peers_prints_ratios(tmp_path: Path) -> None:
    pytest.importorskip("compressai")
    program("peers").main(["--small", "--size", "64x64", "--runs", "1", "--out", str(tmp_path / "peers.json")])
    _, *records = [json.loads(line) for line in (tmp_path / "peers.json").read_text().splitlines()]
    assert records[0]["decode_ratio"] == 1
    assert len(records) == 7
