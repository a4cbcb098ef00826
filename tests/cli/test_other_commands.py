"""`info`, `verify`, `models`, `bench`, `demo` and `train` give what they promise."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image as pil

from mvcodec import selftest
from mvcodec.weights import load_model

from .conftest import Cli


def test_info_is_one_object_per_file_concatenated_ones_included(cli: Cli, coded: Path) -> None:
    paths = sorted(coded.rglob("*.phv"))
    Path("all.phv").write_bytes(b"".join(path.read_bytes() for path in paths))
    alone, together = cli("info", *paths, "--json").records, cli("info", "all.phv", "--json").records
    assert [r.pop("file") for r in alone] == list(map(str, paths))
    assert [r.pop("file") for r in together] == [f"all.phv[{n}]" for n in range(4)]
    assert alone == together
    assert [r["camera_id"] for r in alone] == ["C1", "C1", "C2", "C2"]
    text = cli("info", paths[0], "-v").out.decode()
    assert "camera id        C1" in text
    assert "slice 0 anchor" in text


def test_info_of_a_truncated_file_says_so(cli: Cli, coded: Path) -> None:
    path = coded / "C1/00000000.phv"
    path.write_bytes(path.read_bytes()[:200])
    assert [r["truncated"] for r in cli("info", path, "--json").records] == [True]


def test_verify_goes_through_a_folder(cli: Cli, coded: Path) -> None:
    for args in ([], ["--deep"]):
        records = cli("verify", coded, "--json", *args).records
        assert [(r["ok"], r["deep"]) for r in records] == [(True, bool(args))] * 4
    (coded / "C2/00000000.phv").write_bytes(b"hello")
    outcome = cli("verify", coded)
    assert outcome.code == 6
    assert outcome.out.count(b"intact") == 3


def test_verify_decodes_nothing_that_is_too_large(cli: Cli, coded: Path) -> None:
    assert cli("verify", coded, "--max-pixels", 4000).code == 0  # checksums cost nothing
    outcome = cli("verify", coded, "--deep", "--max-pixels", 4000)
    assert outcome.code == 6
    assert "over the cap of 4000" in outcome.err


def test_verify_goes_on_behind_a_bad_part_of_a_concatenation(cli: Cli, coded: Path) -> None:
    files = [path.read_bytes() for path in sorted(coded.rglob("*.phv"))]
    files[1] = files[1][:-1] + bytes([files[1][-1] ^ 1])
    outcome = cli("verify", "-", "--json", stdin=b"".join(files))
    assert outcome.code == 6
    assert [(r["file"], r.get("ok", False)) for r in outcome.records] == [
        ("-[0]", True),
        ("-[1]", False),
        ("-[2]", True),
        ("-[3]", True),
    ]
    outcome = cli("verify", "-", "--json", stdin=files[0] + files[2] + b"hello")
    assert [r.get("ok", False) for r in outcome.records] == [False, True, True]


def test_models_lists_what_can_be_loaded(cli: Cli, models: Path) -> None:
    (record,) = (r for r in cli("models", "--json").records if r["name"] == "tiny")
    assert (record["default"], record["profile"], record["path"]) == (
        True,
        "tiny",
        str(models / "tiny.safetensors"),
    )
    assert len(record["model_id"]) == 16


def test_bench_accounts_for_every_stage(cli: Cli, scene: Path) -> None:
    pictures = [scene / "C1/00000000.png", scene / "C2/00000000.png"]
    options = ["--runs", 2, "--warmup", 0, "--views", 3, "--size", "100x60", "--json"]
    start, encode, decode = cli("bench", *pictures, *options).records
    assert start["stages"].keys() == {"import", "load"}
    assert all(rate > 0 for rate in start["ceilings"].values())
    assert (encode["task"], encode["views"], encode["megapixels"]) == ("encode", 1, 0.006)
    assert (decode["task"], decode["views"], decode["megapixels"]) == ("decode", 3, 0.018)
    assert {"read", "g_a", "h_a", "Para-EM", "coder", "container"} <= encode["stages"].keys()
    assert {"parse", "coder", "Para-EM", "Para-JD", "refine", "write"} <= decode["stages"].keys()
    for record in (encode, decode):
        assert all(stage["median_ms"] >= 0 for stage in record["stages"].values())
        assert record["total_ms"] > 0
        assert record["peak_memory_mb"] > 0
        assert record["device_name"]
        assert record["floor_ms"].keys() <= record["stages"].keys()
        assert all(floor > 0 for floor in record["floor_ms"].values())
    for size in ("100", "0x9", "²x3", "100000000x100000000", f"1x{'9' * 5000}"):
        assert cli("bench", "--size", size).code == 2
    assert cli("bench", "--untrained", "paper", "--model", "fast").code == 2


def test_bench_refuses_what_it_cannot_do_before_it_measures(cli: Cli, scene: Path) -> None:
    outcome = cli("bench", scene / "C1/00000000.png", "--size", "64x64", "--max-memory", "100M")
    assert (outcome.code, outcome.out) == (2, b"")
    assert "1 x 0.0041 megapixels need" in outcome.err
    outcome = cli("bench", "-", stdin=b"picture")
    assert (outcome.code, outcome.err) == (2, "mvcodec: -: bench takes no stdin; name pictures or folders\n")


def test_bench_of_a_folder_is_of_one_instant(cli: Cli, scene: Path) -> None:
    options = ["--runs", 1, "--warmup", 0, "--size", "64x64", "--json"]
    outcome = cli("bench", scene, *options)
    assert outcome.records[-1]["views"] == 2
    assert "measures frame 0; 2 pictures of other times or places are left out" in outcome.err
    named = cli("bench", *sorted(scene.glob("*/*.png")), *options)
    assert named.records[-1]["views"] == 4


def test_demo_tells_each_view_and_leaves_its_files(cli: Cli, scene: Path) -> None:
    for path in scene.glob("*/00000001.png"):
        path.unlink()
    shutil.move(scene / "C1/00000000.png", scene / "a.png")
    shutil.move(scene / "C2/00000000.png", scene / "b.png")
    outcome = cli("demo", scene, "--json")
    assert outcome.code == 0, outcome.err
    for record in outcome.records:
        camera = record["camera_id"]
        assert record["bytes"] == Path("demo", f"{camera}.phv").stat().st_size
        assert record["psnr_joint_db"] > 0
        assert record["ms_ssim_joint"] is None  # too small for five scales
    assert [r["camera_id"] for r in outcome.records] == ["a", "b"]
    with pil.open("demo/comparison.png") as comparison:
        assert comparison.size == (4 * 320, 2 * 336)
    assert b"MS-SSIM" in cli("demo", scene).out


def test_demo_decodes_the_views_of_each_instant_together(cli: Cli, scene: Path) -> None:
    first = cli("demo", scene, "-o", scene / "out", "--json", "--quiet")
    names = [f"C{camera}/0000000{frame}" for frame in (0, 1) for camera in (1, 2)]
    assert [record["output"] for record in first.records] == [str(scene / "out" / f"{name}.png") for name in names]
    assert [(record["camera_id"], record["frame"]) for record in first.records] == [
        ("C1", 0),
        ("C2", 0),
        ("C1", 1),
        ("C2", 1),
    ]
    assert len(cli("demo", scene, "-o", scene / "out", "--json", "--quiet").records) == 4  # its own output is no input
    of_one_camera = cli("demo", scene / "C1", "-o", "one", "--json", "--quiet").records
    assert [(record["camera_id"], record["frame"]) for record in of_one_camera] == [("C1", 0), ("C1", 1)]


def test_demo_overwrites_nothing_but_an_earlier_demo(cli: Cli, scene: Path) -> None:
    def refused(sentence: str, output: Path) -> None:
        before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
        outcome = cli("demo", scene, "-o", output)
        assert outcome.code == 2
        assert sentence in outcome.err
        assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before

    refused("is the folder of the pictures", scene)
    other = shutil.copytree(scene, "other")
    refused("is of no earlier demo", Path(other))
    assert cli("encode", scene, "-o", "coded").code == 0
    refused("is of no earlier demo", Path("coded"))
    assert cli("decode", "coded", "-o", "coded").code == 0  # a .phv beside its picture is no demo's, either
    refused("is of no earlier demo", Path("coded"))
    Path("figures").mkdir()
    shutil.copy(scene / "C1/00000000.png", "figures/comparison.png")
    refused("figures/comparison.png: is of no earlier demo", Path("figures"))
    shutil.copy(scene / "C1/00000000.png", scene / "C1/00000000.bmp")
    refused("is one of 2 pictures of camera C1", Path("demo"))
    (scene / "C1/00000000.bmp").rename(scene / "comparison.bmp")
    refused("both the comparison and", Path("demo"))


def test_train_resumes_and_its_weights_work(cli: Cli, scene: Path) -> None:
    args = ["train", scene, "--profile", "tiny", "--out", "run", "--batch", 2, "--crop", 64, "--quiet"]
    assert cli(*args, "--steps", 2, "--resume").code == 0  # before the first checkpoint it begins
    outcome = cli(*args, "--steps", 3)
    assert outcome.code == 2
    assert "has a checkpoint; say --resume" in outcome.err
    outcome = cli(*args, "--steps", 3, "--resume", "--json")
    assert outcome.code == 0, outcome.err
    weights = outcome.records[0]["weights"]
    assert cli("encode", scene / "C1/00000000.png", "-o", "a.phv", "--model", weights).code == 0
    assert cli("decode", "a.phv", "--model", weights).code == 0


def test_a_stage_that_moves_no_bit_keeps_the_model_id(cli: Cli, scene: Path, tiny_model_file: Path) -> None:
    args = ["train", scene, "--config", "mine.toml", "--out", "run", "--start-from", tiny_model_file, "--json"]
    Path("mine.toml").write_text(
        'profile = "tiny"\nstage = "joint"\nsteps = 1\ncrop = 64\nmax-views = 2\nparallax = 0.3\nsynthesis = true\n'
    )
    outcome = cli(*args)
    assert outcome.code == 0, outcome.err
    assert outcome.records[0]["model_id"] == load_model(tiny_model_file).id.hex()
    assert cli("export", "run/checkpoint.pt", "-o", "again.safetensors", "--calibrate", scene).code == 0
    assert load_model("again.safetensors").id == load_model(tiny_model_file).id


def test_minutes_that_end_while_the_refinement_prepares_leave_what_is_prepared(
    cli: Cli, scene: Path, tiny_model_file: Path
) -> None:
    args = ("train", scene, "--config", "fast-refine", "--profile", "tiny", "--out", "run", "--minutes", 1e-9)
    outcome = cli(*args, "--start-from", tiny_model_file, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.records == [{"checkpoint": None, "weights": None, "model_id": None}]
    assert "stage refine: reading" in outcome.err
    assert [path.name for path in Path("run/pairs").glob("*.safetensors")] == ["0.safetensors"]


def test_selftest_tells_each_check_and_ends_with_7_where_one_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "CHECKS", (selftest.proofs, selftest.coder))
    assert [record["check"] for record in cli("selftest", "--json").records] == ["proofs", "coder"]

    def broken(model: object) -> str:
        raise selftest.Failed("integers differ")

    monkeypatch.setattr(selftest, "CHECKS", (selftest.coder, broken))
    outcome = cli("selftest")
    assert outcome.code == 7
    assert outcome.out.startswith(b"ok  coder")
