"""`mvcodec encode`: names, places, targets, metadata, and never a half-written or overwritten file."""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as pil

import mvcodec
from mvcodec import container
from mvcodec.cli.targets import STDIN, Targets, read
from mvcodec.errors import UsageError
from mvcodec.frames import Source
from mvcodec.precision import bfloat16_pays

from .conftest import Cli


def header(path: Path | str) -> container.Header:
    return container.unpack_header(Path(path).read_bytes())


def test_a_folder_is_mirrored_and_the_header_says_camera_and_frame(cli: Cli, scene: Path) -> None:
    outcome = cli("encode", scene, "-o", "coded", "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    for record in outcome.records:
        written = header(record["output"])
        assert Path(record["output"]) == Path("coded", Path(record["file"]).relative_to(scene)).with_suffix(".phv")
        assert (record["camera_id"], record["frame"]) == (written.camera_id, written.frame)
        assert record["bytes"] == Path(record["output"]).stat().st_size
    named = [(record["camera_id"], record["frame"]) for record in outcome.records]
    assert named == [("C1", 0), ("C1", 1), ("C2", 0), ("C2", 1)]


def test_default_place_is_beside_the_picture(cli: Cli, scene: Path) -> None:
    assert cli("encode", scene / "C1/00000000.png").code == 0
    assert (scene / "C1/00000000.phv").exists()


def test_camera_and_time_can_be_given(cli: Cli, scene: Path) -> None:
    picture = scene / "C1/00000000.png"
    options = ["--camera-id", "север", "--frame", 7, "--timestamp-us", 1_700_000_000_000_000]
    assert cli("encode", picture, "-o", "a.phv", *options).code == 0
    written = header("a.phv")
    assert (written.camera_id, written.frame, written.timestamp_us) == ("север", 7, 1_700_000_000_000_000)
    assert cli("encode", picture, "-o", "b.phv", "--names", "scene/{camera}/{time_us}").code == 0
    assert (header("b.phv").camera_id, header("b.phv").timestamp_us) == ("C1", 0)


def test_one_camera_id_is_not_given_to_pictures_that_nothing_tells_apart(cli: Cli, scene: Path) -> None:
    outcome = cli("encode", scene, "--camera-id", "left")
    assert outcome.code == 2
    assert "C1/00000000.png and " in outcome.err
    assert "C2/00000000.png would both be its view of frame 0; let --names read" in outcome.err
    stills = [shutil.copy(scene / "C1/00000000.png", name) for name in ("0000.png", "0001.png")]
    outcome = cli("encode", *stills, "--camera-id", "left")
    assert outcome.code == 2
    assert "would both be its view of the scene" in outcome.err
    assert cli("encode", *stills, "--camera-id", "left", "--names", "{frame}").code == 0
    assert (header("0001.phv").camera_id, header("0001.phv").frame) == ("left", 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_what_is_no_file_is_not_replaced(cli: Cli, scene: Path) -> None:
    os.mkfifo("pipe.phv")
    for option in ("--force", "--skip-existing"):
        outcome = cli("encode", scene / "C1/00000000.png", "-o", "pipe.phv", option)
        assert outcome.code == 2
        assert "pipe.phv: is there, and no file that could be overwritten" in outcome.err
    assert Path("pipe.phv").is_fifo()


def test_a_name_that_is_too_long_fails_alone(cli: Cli, scene: Path) -> None:
    long = Path("many") / f"{'x' * 251}.png"
    long.parent.mkdir()
    for name in (long, Path("many/short.png")):
        shutil.copy(scene / "C1/00000000.png", name)
    outcome = cli("encode", "many", "-o", "coded", "-q", "33.333", "--json")
    assert outcome.code == 0
    assert [record["quality"] for record in outcome.records] == [33.33, 33.33]  # as the files have it
    outcome = cli("decode", "coded", "-o", "out", "--format", "webp", "--preview", "--json")
    assert outcome.code == 6
    assert sorted(record.get("error") is None for record in outcome.records) == [False, True]
    assert Path("out/short.webp").exists()
    assert cli("decode", "coded", "-o", "out", "--maps", "maps", "--json").code == 0
    assert len(list(Path("maps").iterdir())) == 2


def test_nothing_is_overwritten_unless_asked(cli: Cli, scene: Path) -> None:
    out = Path("coded/C1/00000000.phv")
    out.parent.mkdir(parents=True)
    out.write_bytes(b"precious")
    outcome = cli("encode", scene, "-o", "coded")
    assert outcome.code == 2
    assert "overwrite with -f" in outcome.err
    assert [p for p in Path("coded").rglob("*") if p.is_file()] == [out]
    assert cli("encode", scene, "-o", "coded", "--skip-existing").code == 0
    assert out.read_bytes() == b"precious"
    assert cli("encode", scene, "-o", "coded", "-f").code == 0
    assert header(out).camera_id == "C1"


def test_an_input_is_never_its_own_output(cli: Cli, scene: Path) -> None:
    picture = scene / "C1/00000000.png"
    before = picture.read_bytes()
    outcome = cli("encode", picture, "-o", picture, "-f")
    assert outcome.code == 2
    assert "both input and output" in outcome.err
    assert picture.read_bytes() == before


def test_two_pictures_never_share_an_output(cli: Cli, scene: Path) -> None:
    shutil.copy(scene / "C1/00000000.png", scene / "C1/00000000.bmp")
    outcome = cli("encode", scene)
    assert outcome.code == 2
    assert "would be written there; rename one, or name the files that you want" in outcome.err
    outcome = cli("encode", scene / "C1/00000000.png", scene / "C2/00000000.png", "-o", "a.phv", "-f")
    assert outcome.code == 2
    assert "a.phv: is one file, but there are 2 outputs; name a folder" in outcome.err
    assert cli("encode", scene / "C1/00000000.png", scene / "C2/00000000.png", "-o", "a").code == 0
    assert sorted(p.as_posix() for p in Path("a").rglob("*.phv")) == [
        "a/C1/00000000.phv",
        "a/C2/00000000.phv",
    ]


def test_output_stays_in_its_folder_in_whatever_spelling_inputs_come(cli: Cli, scene: Path, workplace: Path) -> None:
    os.chdir(scene / "C2")
    assert cli("encode", "../C1", "../C2/00000000.png", "00000000.png", "-o", workplace / "out").code == 0
    written = sorted(path.relative_to(workplace).as_posix() for path in workplace.rglob("*.phv"))
    assert written == ["out/C1/00000000.phv", "out/C1/00000001.phv", "out/C2/00000000.phv"]
    shutil.copy("00000000.png", "00000000.bmp")
    assert "both" in cli("encode", "00000000.png", "../C2/00000000.bmp").err


def test_a_folder_s_files_go_to_a_folder_though_there_is_one_and_a_dot(cli: Cli, scene: Path) -> None:
    (scene / "C1/00000001.png").unlink()
    assert cli("encode", scene / "C1", "-o", "coded_v1.0").code == 0
    assert Path("coded_v1.0/00000000.phv").is_file()
    assert cli("encode", scene / "C1", "-o", "one.phv").code == 0
    assert Path("one.phv").is_file()


def test_a_file_called_like_stdin_can_be_named(cli: Cli, scene: Path) -> None:
    shutil.copy(scene / "C1/00000000.png", "-")
    assert cli("encode", "./-", "-o", "a.phv").code == 0
    assert header("a.phv").camera_id == "-"


def test_a_name_that_is_not_utf_8_is_coded_and_told(cli: Cli, scene: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(scene / "C1/00000000.png", name)
    (record,) = cli("encode", name, "--json").records
    assert (record["file"], record["camera_id"]) == (name, "caf_-" + record["camera_id"][-8:])
    assert b"caf\\udce9.phv: intact" in cli("verify", record["output"]).out


def test_a_name_with_control_characters_breaks_no_line(cli: Cli, scene: Path) -> None:
    name = "a\nb\x1b[2J\x85.png"
    shutil.copy(scene / "C1/00000000.png", name)
    told = cli("encode", name)
    assert "a\\u000ab\\u001b[2J\\u0085.png -> " in told.err
    (path,) = Path().glob("*.phv")
    skipped, shown, refused = cli("encode", name, "--skip-existing"), cli("info", path), cli("encode", name)
    assert shown.out.startswith(b"a\\u000ab\\u001b[2J\\u0085.phv\n  ")
    for text in (told.err, skipped.err, refused.err, shown.out.decode()):
        assert all(line.isprintable() for line in text.split("\n"))
    assert told.err.count("\n") == skipped.err.count("\n") == refused.err.count("\n") == 1
    (record,) = cli("info", path, "--json").records
    assert record["file"] == str(path)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_link_that_leads_nowhere_is_told(cli: Cli, scene: Path) -> None:
    (scene / "C1/00000007.png").symlink_to("nowhere.png")
    (scene / "C1/00000008.txt").symlink_to("nowhere.txt")
    outcome = cli("encode", scene, "-o", "coded", "--quiet")
    assert outcome.code == 6
    assert outcome.err.count("\n") == 1
    assert "C1/00000007.png: No such file" in outcome.err
    assert len(list(Path("coded").rglob("*.phv"))) == 4


def test_pipes(cli: Cli, scene: Path) -> None:
    picture = (scene / "C1/00000000.png").read_bytes()
    outcome = cli("encode", "-", "--camera-id", "C1", "-q", "30", stdin=picture)
    assert outcome.code == 0
    assert cli("encode", scene / "C1/00000000.png", "-o", "-", "-q", "30", "--quiet").err == ""
    written = container.unpack(outcome.out).header
    assert (written.camera_id, written.quality, written.frame) == ("C1", 30.0, None)


@pytest.mark.parametrize("target", [["--target-size", "1.5k"], ["--target-bpp", "3"]])
def test_size_targets_are_met(cli: Cli, scene: Path, target: list[str]) -> None:
    outcome = cli("encode", scene / "C1/00000000.png", "-o", "a.phv", "--json", *target)
    assert outcome.code == 0, outcome.err
    limit = 1500 if target[0] == "--target-size" else 3 * 70 * 50 / 8
    assert Path("a.phv").stat().st_size <= limit
    assert header("a.phv").quality == outcome.records[0]["quality"]


def test_metadata_travels_unless_stripped(cli: Cli) -> None:
    exif = pil.Exif()
    exif[271] = "a camera maker"
    exif[0x0112] = 6
    pil.fromarray(np.zeros((20, 30), np.uint8)).save("a.jpg", exif=exif, icc_profile=b"a profile")
    assert cli("encode", "a.jpg").code == 0
    kept = header("a.phv")
    assert (kept.width, kept.height, kept.colour, kept.icc) == (20, 30, "grey", b"a profile")
    assert cli("decode", "a.phv").code == 0
    with pil.open("a.png") as decoded:
        assert (decoded.size, decoded.mode) == ((20, 30), "L")
        assert dict(decoded.getexif()) == {271: "a camera maker"}
        assert decoded.info["icc_profile"] == b"a profile"
    assert cli("encode", "a.jpg", "--strip", "-f").code == 0
    assert (header("a.phv").icc, header("a.phv").exif) == (b"", b"")


def test_alpha_and_the_size_cap_reach_the_reader(cli: Cli) -> None:
    pil.new("RGBA", (8, 8), (10, 20, 30, 128)).save("a.png")
    outcome = cli("encode", "a.png")
    assert outcome.code == 3
    assert "--alpha drop, white or black" in outcome.err
    assert cli("encode", "a.png", "--alpha", "white").code == 0
    outcome = cli("encode", "a.png", "--alpha", "drop", "-f", "--max-pixels", "63")
    assert outcome.code == 3
    assert "over the cap of 63" in outcome.err


def test_the_python_interface_writes_the_same_bytes(cli: Cli, scene: Path) -> None:
    path = scene / "C2/00000001.png"
    assert cli("encode", path, "-o", "a.phv", "-q", 62.5).code == 0
    assert mvcodec.encode(path, quality=62.5, device="cpu") == Path("a.phv").read_bytes()
    pixels = np.asarray(pil.open(io.BytesIO(path.read_bytes())))
    by_array = mvcodec.encode(pixels, quality=62.5, camera_id="C2", frame=1)
    assert by_array == Path("a.phv").read_bytes()
    assert mvcodec.info(by_array)["camera_id"] == "C2"


def test_pictures_read_ahead_give_the_same_files_and_the_same_errors(cli: Cli, scene: Path) -> None:
    (scene / "C1/00000001.png").write_bytes(b"no picture")
    outcome = cli("encode", scene, "-o", "together", "--json")
    assert outcome.code == 6
    assert [record.get("exit_code", 0) for record in outcome.records] == [0, 3, 0, 0]
    for path in Path("together").rglob("*.phv"):
        picture = scene / path.relative_to("together").with_suffix(".png")
        assert cli("encode", picture, "-o", "alone.phv", "-f").code == 0
        assert Path("alone.phv").read_bytes() == path.read_bytes()


def test_memory_that_cannot_suffice_is_refused(cli: Cli, scene: Path) -> None:
    picture = scene / "C1/00000000.png"
    outcome = cli("encode", picture, "-o", "a.phv", "--max-memory", "100M")
    assert outcome.code == 2
    needed = "1.05G" if bfloat16_pays(torch.device("cpu")) else "1.07G"
    assert f"1 x 0.0082 megapixels need {needed} of memory, --max-memory is 100M" in outcome.err
    assert cli("encode", picture, "-o", "a.phv", "--max-memory", "much").code == 2
    assert cli("encode", picture, "-o", "a.phv", "--max-memory", "4G").code == 0
    assert cli("decode", "a.phv", "-o", "a.png", "--max-memory", "100M").code == 2
    assert cli("decode", "a.phv", "-o", "a.png", "--max-memory", "4G").code == 0


def test_effort_gives_another_file_that_decodes_as_any(cli: Cli, scene: Path) -> None:
    picture = scene / "C1/00000000.png"
    for effort in (0, 1):
        assert cli("encode", picture, "--effort", effort, "-o", f"{effort}.phv").code == 0
    assert cli("encode", picture, "-o", "default.phv").code == 0
    assert Path("0.phv").read_bytes() == Path("default.phv").read_bytes() != Path("1.phv").read_bytes()
    assert cli("decode", "1.phv", "-o", "1.png").code == 0
    assert cli("encode", picture, "--effort", 6, "-o", "6.phv").code == 2
    refused = cli("encode", picture, "--effort", 1, "--max-memory", "1.2G", "-o", "small.phv")
    assert refused.code == 2
    assert "--effort 0 needs less" in refused.err


def test_what_no_file_can_hold_is_refused_before_it_is_coded(cli: Cli, workplace: Path) -> None:
    exif = pil.Exif()
    exif[270] = "x" * 70000
    pil.fromarray(np.zeros((8, 8, 3), np.uint8)).save("told.png", exif=exif)
    pil.fromarray(np.zeros((1, 70000), np.uint8)).save("long.png")
    for name, words in (("told.png", "of EXIF data, over the 65536 of a file; say --strip"), ("long.png", "70000 x 1")):
        outcome = cli("encode", name)
        assert outcome.code == 3
        assert words in outcome.err
    assert cli("encode", "told.png", "--strip").code == 0


def test_a_rate_that_quality_100_does_not_take_is_told(cli: Cli, workplace: Path) -> None:
    pil.fromarray(np.zeros((8, 8, 3), np.uint8)).save("a.png")
    outcome = cli("encode", "a.png", "--target-size", "1M")
    assert outcome.code == 0
    assert "a.png: at quality 100 it takes no more than" in outcome.err


def test_closed_streams_are_no_defect(cli: Cli, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.png").write_bytes(b"")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        with pytest.raises(UsageError, match="stdout is closed"):
            Targets("-", ["a.png"], force=False, skip_existing=False)
        patch.setattr(sys, "stdin", None)
        with pytest.raises(UsageError, match="stdin is closed"):
            read(Source(STDIN, Path("view")))
