"""The benchmark programs run, here on tiny networks; what they print on large ones is not a test's business."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from mvcodec.nn.warping import warp
from tests.conftest import smooth_picture

FOLDER = Path(__file__).parents[1] / "benchmarks"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gpu_measures_every_stage_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.jsonl"
    program("gpu").main(["--device", "cpu", "--small", "--part", "fast", "--runs", "1", "--out", str(out)])
    floors, *records = [json.loads(line) for line in out.read_text().splitlines()]
    assert floors["floor_ms_of_decoding_two_views"]["Para-EM"] > 0
    assert [(r["task"], r["views"]) for r in records] == [
        *((task, 2) for task in ("encode", "decode alone", "decode unaligned", "decode")),
        *((task, 1) for task in ("encode", "decode")),
    ]
    assert all(0 < r["codec_ms"] <= r["total_ms"] for r in records)
    assert "Para-EM" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["coder", "launches"])
def test_gpu_counts_what_the_processor_shows(part: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    program("gpu").main(["--device", "cpu", "--small", "--part", part, "--runs", "2", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    if part == "coder":
        waited, beside = (r["processor"]["median_ms"] for r in records[:2])
        assert waited > 0 < beside
    else:
        assert {r["task"] for r in records} == {"encode", "decode alone", "decode unaligned", "decode"}
        assert all(r["operations"]["Para-EM"] > r["operations"]["h_s"] > 0 for r in records)


def test_a_part_that_fails_on_the_gpu_is_told_and_the_next_begins(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    program("gpu").main(["--device", "cuda:99", "--small", "--parts", "machine", "fast", "--out", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["part"] for r in records if "error" in r] == ["machine", "fast"]


def test_growth_fits_exponents_and_plots(tiny_model_file: Path, tmp_path: Path) -> None:
    growth = program("growth")
    assert growth.fit([1, 2, 4, 8, 16], [3, 12, 48, 192, 768]) == 2
    arguments = ["--sides", "64", "128", "--views", "1", "2", "--view-side", "64", "--model", str(tiny_model_file)]
    growth.main([*arguments, "--plot", str(tmp_path / "a.png"), "--out", str(tmp_path / "a.json")])
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert [len(r["points"]) for r in results] == [2, 2, 2, 2]
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_fusion_precision_tells_every_way_to_fetch(
    tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for scene in range(5):
        (tmp_path / str(scene)).mkdir()
        picture = smooth_picture(96, 144, seed=scene)
        for view in range(2):
            Image.fromarray(picture[:, 16 * view : 16 * view + 128]).save(tmp_path / str(scene) / f"{view}.png")
    arguments = ["--sets", "5", "--crop", "64", "64"]
    program("fusion_precision").main([str(tiny_model_file), str(tmp_path), *arguments])
    head, *table = capsys.readouterr().out.splitlines()
    assert head == "4 views held back of 10"
    assert [row.split(" |")[0] for row in table[3:7]] == ["| blocks", "| mixed", "| quarters", "| pixels"]


@pytest.mark.slow  # CompressAI takes seconds to import
def test_peers_prints_ratios(tmp_path: Path) -> None:
    pytest.importorskip("compressai")
    program("peers").main(["--small", "--size", "64x64", "--runs", "1", "--out", str(tmp_path / "peers.json")])
    _, *records = [json.loads(line) for line in (tmp_path / "peers.json").read_text().splitlines()]
    assert records[0]["decode_ratio"] == 1
    assert len(records) == 7


def test_turned_views_know_where_they_look() -> None:
    """A pixel of the upright view and the one that true flow names in the turned view have one colour."""
    turned_views = program("turned_views")
    across, down = (torch.sin(torch.arange(n) / 12) for n in (1200, 900))  # a wave is 38 pixels of a view
    waves = (0.5 + 0.2 * across + 0.2 * down[:, None]).expand(1, 3, -1, -1)
    upright, turned = (turned_views.tensor(turned_views.look(waves, *case)) for case in ((0, 1.0), (30, 1.25)))
    seen = warp(turned, turned_views.true_flow(30, 1.25))
    assert (seen - upright)[..., 150:230, 150:230].abs().max() < 0.02  # half a pixel off is more


def test_runs_are_compared_cleaned_and_drawn_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against itself nothing; a model for another measure needs far more bits. A small picture is left out."""
    for scene, side in enumerate((128, 160, 96)):
        (tmp_path / str(scene)).mkdir()
        Image.fromarray(smooth_picture(side, 192, seed=scene)).save(tmp_path / str(scene) / "a.png")
    models = [str(FOLDER.parent / "models" / f"{name}.safetensors") for name in ("fast", "fast", "fast-ms-ssim")]
    program("compare_weights").main([str(tmp_path), *models, "--every", "1", "--side", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1].split(":")[0] for line in lines] == ["cleaned", "drawn back"] * 2
    rates = [float(line.split(": ")[1].split(" %")[0]) for line in lines]
    assert rates[:2] == [0, 0]
    assert min(rates[2:]) > 5
    assert all("2 crops" in line for line in lines)
