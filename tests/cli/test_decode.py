"""`mvcodec decode`: views meet by time, what is missing is told, what is asked for is written."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as pil

import mvcodec
from mvcodec import api, container
from mvcodec.cli.decode import _helpers
from mvcodec.cli.maps import Maps, colours
from mvcodec.errors import BitstreamError, ModelError, UsageError
from mvcodec.frames import Source
from tests.conftest import write_tiny_model

from .conftest import Cli


def pixels(path: Path | str) -> np.ndarray:
    with pil.open(path) as picture:
        return np.asarray(picture)


def test_output_mirrors_input_and_views_of_an_instant_meet(cli: Cli, coded: Path) -> None:
    outcome = cli("decode", coded, "-o", "out", "--json")
    assert outcome.code == 0
    assert outcome.err == ""
    by_name = {Path(r["output"]).as_posix(): r for r in outcome.records}
    assert sorted(by_name) == [f"out/{camera}/0000000{frame}.png" for camera in ("C1", "C2") for frame in (0, 1)]
    assert by_name["out/C1/00000001.png"]["peers"] == ["C2"]
    for name, size in (("out/C1/00000000.png", (50, 70, 3)), ("out/C2/00000000.png", (64, 64, 3))):
        assert pixels(name).shape == size


def test_argument_order_changes_nothing(cli: Cli, coded: Path) -> None:
    files = [coded / "C1/00000000.phv", coded / "C2/00000000.phv"]
    assert cli("decode", *files, "-o", "a").code == 0
    assert cli("decode", *files[::-1], "-o", "b").code == 0
    for name in ("C1/00000000.png", "C2/00000000.png"):
        np.testing.assert_array_equal(pixels(Path("a", name)), pixels(Path("b", name)))


def test_a_concatenation_streams_through_stdin(cli: Cli, coded: Path) -> None:
    everything = b"".join(path.read_bytes() for path in sorted(coded.rglob("*.phv")))
    assert cli("decode", "-", "-o", "piped", stdin=everything).code == 0
    assert cli("decode", coded, "-o", "plain").code == 0
    names = sorted(path.relative_to("plain") for path in Path("plain").rglob("*.png"))
    assert names == sorted(path.relative_to("piped") for path in Path("piped").rglob("*.png"))
    for name in names:
        np.testing.assert_array_equal(pixels(Path("plain", name)), pixels(Path("piped", name)))


def test_no_two_parts_of_a_stream_are_written_to_one_place(cli: Cli, workplace: Path) -> None:
    """Views that name no camera, and names that differ in what no file name may hold."""
    cameras = ("", "", "cam:1", "cam?1")
    array = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    parts = [mvcodec.encode(array, camera_id=camera, quality=10 * k) for k, camera in enumerate(cameras)]
    outcome = cli("decode", "-", "-o", "out", "--json", stdin=b"".join([*parts, parts[0]]))
    assert outcome.code == 0
    assert [(r["file"], Path(r["output"]).name) for r in outcome.records if "output" in r] == [
        ("-[0]", "view.png"),
        ("-[1]", "view.1.png"),
        ("-[2]", "cam_1.png"),
        ("-[3]", "cam_1.1.png"),
    ]
    assert {"file": "-[4]", "same_as": "-[0]"} in outcome.records
    Path("in/a").mkdir(parents=True)
    Path("in/a/all.phv").write_bytes(parts[0] + parts[1])
    Path("in/a/view.phv").write_bytes(parts[2])
    assert cli("decode", "in", "-o", "mirrored").code == 0
    assert sorted(path.name for path in Path("mirrored/a").iterdir()) == ["view.1.png", "view.2.png", "view.png"]


def test_damage_behind_a_part_does_not_rename_it(cli: Cli, workplace: Path) -> None:
    part = mvcodec.encode(np.zeros((8, 8), np.uint8), camera_id="C1", frame=3)
    Path("all.phv").write_bytes(part + b"damaged")
    for command in (["decode", "-o", "out"], ["verify"]):
        outcome = cli(*command, "all.phv", "--json")
        assert outcome.code == 6
        assert [(r["file"], r.get("exit_code", 0)) for r in outcome.records] == [("all.phv[1]", 4), ("all.phv[0]", 0)]
    assert Path("out/C1/00000003.png").exists()


def test_a_part_that_was_cut_short_costs_no_other(cli: Cli, workplace: Path) -> None:
    """Nor does one whose header is damaged; with --partial what is there of it is decoded."""
    array = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
    first, second, third = (mvcodec.encode(array, camera_id=f"C{k}", frame=3) for k in (1, 2, 3))
    Path("all.phv").write_bytes(first[:-20] + second[:12] + b"?" + second[13:] + third)
    outcome = cli("decode", "all.phv", "-o", "out", "--partial", "--json")
    assert outcome.code == 6
    assert "all.phv[1]: in the file starting at byte" in outcome.err
    assert {r["file"]: bool(r.get("damage")) for r in outcome.records if "output" in r} == {
        "all.phv[0]": True,
        "all.phv[2]": False,
    }


def test_each_view_that_cannot_be_written_is_named(cli: Cli, coded: Path) -> None:
    Path("out").mkdir()
    Path("out/C1").touch()  # where a folder would have to be
    outcome = cli("decode", coded, "-o", "out", "--json")
    assert outcome.code == 6
    failed = [r["file"] for r in outcome.records if "error" in r]
    assert failed == [str(coded / "C1/00000000.phv"), str(coded / "C1/00000001.phv")]
    assert all("out/C1" in r["error"] for r in outcome.records if "error" in r)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "a.png", "--format", "jpg"], "--format jpg: but a.png is the name of another kind"),
        (["-o", "a.gif"], "no picture is written with the ending"),
        (["-o", ""], "-o: is empty"),
        (["-o", "/dev/null"], "is no folder"),
        (["--only", "C1", "--only", "C9"], "--only C9: no such camera; there are C1"),
    ],
)
def test_what_cannot_be_meant_is_refused(cli: Cli, coded: Path, options: list[str], words: str) -> None:
    outcome = cli("decode", coded / "C1/00000000.phv", *options)
    assert outcome.code == 2
    assert words in outcome.err


def test_pictures_can_leave_through_stdout(cli: Cli, coded: Path) -> None:
    outcome = cli("decode", coded / "C1/00000000.phv", "-o", "-", "--format", "ppm")
    assert outcome.code == 0
    assert np.asarray(pil.open(io.BytesIO(outcome.out))).shape == (50, 70, 3)


def test_a_missing_camera_is_told_and_the_rest_decoded(cli: Cli, coded: Path) -> None:
    (coded / "C2/00000001.phv").unlink()
    outcome = cli("decode", coded, "-o", "out")
    assert outcome.code == 0
    assert "frame 1: without C2" in outcome.err
    assert len(list(Path("out").rglob("*.png"))) == 3
    outcome = cli("decode", coded, "-o", "out", "-f", "--require", "2")
    assert outcome.code == 6
    assert "00000001.phv: 1 of the 2 views required" in outcome.err


def test_only_one_camera_is_written_but_the_others_still_help(cli: Cli, coded: Path) -> None:
    outcome = cli("decode", coded, "-o", "out", "--only", "C2", "--json")
    assert outcome.code == 0
    assert [(r["camera_id"], r["peers"]) for r in outcome.records] == [("C2", ["C1"])] * 2
    assert not Path("out/C1").exists()
    outcome = cli("decode", coded, "-o", "out2", "--only", "C9")
    assert outcome.code == 2
    assert "no such camera; there are C1, C2" in outcome.err
    (coded / "C2/00000000.phv").write_bytes(b"damaged")
    assert cli("decode", coded / "C1/00000000.phv", coded / "C2/00000000.phv", "-o", "out3", "--only", "C2").code == 4


def test_preview_decodes_each_view_alone(cli: Cli, coded: Path) -> None:
    assert [r["peers"] for r in cli("decode", coded, "-o", "p", "--preview", "--json").records] == [[]] * 4
    alone = mvcodec.decode(coded / "C1/00000000.phv")
    np.testing.assert_array_equal(pixels("p/C1/00000000.png"), alone.pixels)


def test_a_truncated_file_gives_what_arrived_when_partial_is_asked(cli: Cli, coded: Path) -> None:
    path = coded / "C1/00000000.phv"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    outcome = cli("decode", coded, "-o", "out")
    assert outcome.code == 6
    assert f"mvcodec: {path}: truncated" in outcome.err
    assert len(list(Path("out").rglob("*.png"))) == 3
    records = cli("decode", coded, "-o", "out", "-f", "--require", 2, "--json").records
    assert [(r["file"], r.get("exit_code", 0)) for r in records] == [
        (str(path), 4),
        (str(coded / "C2/00000000.phv"), 1),
        (str(coded / "C1/00000001.phv"), 0),
        (str(coded / "C2/00000001.phv"), 0),
    ]
    outcome = cli("decode", path, "-o", "part.png", "--partial", "--json")
    assert outcome.code == 0
    assert "truncated" in outcome.records[0]["damage"]
    assert "decoded what is intact" in outcome.err
    assert pixels("part.png").shape == (50, 70, 3)


def test_the_same_file_twice_is_one_view(cli: Cli, coded: Path) -> None:
    shutil.copy(coded / "C1/00000000.phv", "copy.phv")
    files = [coded / "C1/00000000.phv", coded / "C2/00000000.phv", "copy.phv"]
    outcome = cli("decode", *files, "-o", "out")
    assert outcome.code == 0
    assert f"{files[0]}, copy.phv: are the same file; it is decoded once" in outcome.err
    np.testing.assert_array_equal(pixels("out/copy.png"), pixels("out/coded/C1/00000000.png"))
    peers = {r["file"]: r["peers"] for r in cli("decode", *files, "-o", "out", "-f", "--json").records}
    assert peers == {str(files[0]): ["C2"], str(files[1]): ["C1"], "copy.phv": ["C2"]}
    assert "2 of the 3 views required" in cli("decode", *files, "-o", "out", "-f", "--require", 3).err
    data = bytearray(Path("copy.phv").read_bytes())
    data[-20] ^= 1
    files[0].write_bytes(data)
    files[2] = shutil.copy(files[0], "copy.phv")
    outcome = cli("decode", *files, "-o", "out", "-f", "--json")
    assert {r["file"]: r.get("exit_code", 0) for r in outcome.records} == {
        str(f): c for f, c in zip(files, (4, 0, 4), strict=True)
    }


def test_a_camera_that_is_there_twice_is_one_of_two_rigs(cli: Cli, scene: Path) -> None:
    shutil.copytree(scene, "data/north")
    shutil.copytree(scene, "data/south")
    assert cli("encode", "data/south", "-o", "sites/south", "-q", 30).code == 0
    assert cli("encode", "data/north", "-o", "sites/north", "-q", 60).code == 0
    Path("sites/north/C2/00000001.phv").unlink()
    shutil.copy(scene / "C1/00000000.png", "still.png")
    assert cli("encode", "still.png", "-o", "sites/still.phv").code == 0
    outcome = cli("decode", "sites", "-o", "together", "--json")
    assert outcome.code == 0
    assert outcome.err.splitlines() == ["frame 1 in north: without C2"]
    peers = {Path(r["output"]).relative_to("together").as_posix(): r["peers"] for r in outcome.records}
    assert len(peers) == 8
    assert peers["north/C1/00000000.png"] == ["C2"]
    assert peers["north/C1/00000001.png"] == []
    assert cli("decode", "sites/south", "-o", "apart").code == 0
    for name in ("C1/00000000.png", "C2/00000001.png"):
        np.testing.assert_array_equal(pixels(Path("together/south", name)), pixels(Path("apart", name)))


def test_a_camera_that_is_there_twice_in_one_rig_is_decoded_alone(cli: Cli, coded: Path, scene: Path) -> None:
    other = coded / "C1/other.phv"
    assert cli("encode", scene / "C1/00000001.png", "--frame", 0, "-o", other).code == 0
    outcome = cli("decode", coded, "-o", "out", "--json")
    assert outcome.code == 0
    names = coded / "C1/00000000.phv", other
    assert outcome.err == f"camera C1 is there 2 times, {names[0]}, {names[1]}: each is decoded alone\n"
    peers = {Path(r["output"]).as_posix(): r["peers"] for r in outcome.records}
    assert peers["out/C1/00000000.png"] == peers["out/C1/other.png"] == peers["out/C2/00000000.png"] == []
    assert peers["out/C2/00000001.png"] == ["C1"]
    assert cli("decode", coded, "-o", "preview", "--preview", "--json").err == ""


def test_still_scenes_in_one_tree_stay_apart(cli: Cli) -> None:
    for name, shade in (("door/a.png", 10), ("door/b.png", 60), ("desk/a.png", 200)):
        Path(name).parent.mkdir(exist_ok=True)
        pil.new("RGB", (40, 40), (shade, shade, 0)).save(name)
    assert cli("encode", "door", "desk", "-o", "coded").code == 0
    outcome = cli("decode", "coded", "-o", "out", "--json")
    assert outcome.code == 0
    peers = {Path(r["output"]).as_posix(): r["peers"] for r in outcome.records}
    assert peers == {"out/desk/a.png": [], "out/door/a.png": ["b"], "out/door/b.png": ["a"]}


def test_timestamps_meet_within_the_window(cli: Cli, scene: Path) -> None:
    for camera, time_us in (("C1", 5_000), ("C2", 5_400)):
        picture = scene / camera / "00000000.png"
        pattern = "scene/{camera}/00000000"
        args = ["--names", pattern, "--timestamp-us", time_us, "-o", f"coded/{camera}.phv"]
        assert cli("encode", picture, *args).code == 0
    peers = [r["peers"] for r in cli("decode", "coded", "-o", "a", "--json").records]
    assert peers == [[], []]
    peers = [r["peers"] for r in cli("decode", "coded", "-o", "b", "--window-us", 500, "--json").records]
    assert peers == [["C2"], ["C1"]]


def test_a_view_that_cannot_be_decoded_does_not_take_the_others_along(cli: Cli, coded: Path) -> None:
    stream = container.unpack((coded / "C1/00000000.phv").read_bytes())
    first = replace(stream.slices[0], check=stream.slices[0].check ^ 1)
    desynchronised = replace(stream, slices=(first, *stream.slices[1:]))
    of_another_model = replace(stream, header=replace(stream.header, model_id=bytes(8)))
    for bad, code in ((desynchronised, 7), (of_another_model, 5)):
        (coded / "C1/00000000.phv").write_bytes(container.pack(bad))
        files = [coded / "C1/00000000.phv", coded / "C2/00000000.phv"]
        for order in (files, files[::-1]):
            outcome = cli("decode", *order, "-o", "out/", "-f", "--json")
            assert outcome.code == 6
            told = {r["file"]: r.get("exit_code", r.get("peers")) for r in outcome.records}
            assert told == {str(files[0]): code, str(files[1]): []}
        assert cli("decode", *files, "-o", "out/", "-f", "--require", 2).code == 6
        assert cli("decode", files[0], "-o", "out/", "-f").code == code


def test_format_follows_the_name_or_the_option(cli: Cli, coded: Path) -> None:
    path = coded / "C1/00000000.phv"
    assert cli("decode", path, "-o", "a.tif").code == 0
    assert cli("decode", path, "-o", "out/", "--format", "bmp").code == 0
    for name, kind in (("a.tif", "TIFF"), ("out/00000000.bmp", "BMP")):
        with pil.open(name) as picture:
            assert picture.format == kind
    outcome = cli("decode", path, "-o", "a.xyz")
    assert outcome.code == 2
    assert "no picture is written with the ending '.xyz'" in outcome.err
    outcome = cli("decode", coded, "-o", "a.tif", "-f")
    assert outcome.code == 2
    assert "a.tif: is one file, but there are 4 outputs" in outcome.err


def test_a_file_that_claims_too_many_pixels_is_refused(cli: Cli, coded: Path) -> None:
    outcome = cli("decode", coded / "C2/00000000.phv", "--max-pixels", 64 * 64 - 1)
    assert outcome.code == 4
    assert "64 x 64 pixels, over the cap of 4095" in outcome.err


def test_running_out_of_memory_is_a_sentence(cli: Cli, coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("mvcodec.codec.decode_set", allocate)
    outcome = cli("decode", coded / "C2/00000000.phv")
    assert outcome.code == 1
    assert "C2/00000000.phv: out of memory" in outcome.err


def test_existing_pictures_are_kept_or_skipped(cli: Cli, coded: Path) -> None:
    args = ["decode", coded, "-o", "out"]
    assert cli(*args).code == 0
    assert cli(*args).code == 2
    Path("out/C1/00000000.png").write_bytes(b"mine")
    Path("out/C2/00000001.png").unlink()
    outcome = cli(*args, "--skip-existing", "--json")
    done = [Path(r["output"]).as_posix() for r in outcome.records if not r.get("skipped")]
    assert done == ["out/C2/00000001.png"]
    assert len(outcome.records) == 4
    assert Path("out/C1/00000000.png").read_bytes() == b"mine"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1), (9, 5, 3)])
def test_python_round_trip_keeps_size_colour_and_depth(cli: Cli, dtype: type, shape: tuple[int, ...]) -> None:
    array = np.full(shape, 77, dtype)
    views = mvcodec.decode_set([mvcodec.encode(array, camera_id=name) for name in "ba"])
    assert [view.header.camera_id for view in views] == ["a", "b"]
    for view in views:
        assert (view.pixels.shape, view.pixels.dtype) == (shape, np.dtype(dtype))


def test_python_takes_bytes_of_any_kind_and_any_default_of_torch(cli: Cli) -> None:
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = mvcodec.encode(array)
    (expected,) = mvcodec.decode_set([data])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert mvcodec.encode(array) == data
        for kind in (bytearray, memoryview):
            assert np.array_equal(mvcodec.decode(kind(data)).pixels, expected.pixels)
    finally:
        torch.set_default_dtype(before)


def test_python_decodes_files_of_several_models(cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(models, "both")
    write_tiny_model(Path("both/other.safetensors"), anchor_lattice=True)
    monkeypatch.setenv("MVCODEC_MODELS", "both")
    array = np.full((9, 5, 3), 77, np.uint8)
    written_with = {"c": "tiny", "b": "other", "a": "tiny"}
    files = [mvcodec.encode(array, camera_id=k, model=f"both/{name}.safetensors") for k, name in written_with.items()]
    views = mvcodec.decode_set(files)
    assert [(view.header.camera_id, view.peers) for view in views] == [("a", ("c",)), ("b", ()), ("c", ("a",))]
    with pytest.raises(ModelError, match="pass the model it was written with"):
        mvcodec.decode_set(files, model="both/tiny.safetensors")


def test_a_model_that_cannot_be_read_hides_no_other(cli: Cli, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mvcodec.encode(np.full((9, 5, 3), 77, np.uint8))
    shutil.copytree(models, "with_a_bad_one")
    Path("with_a_bad_one/a_bad_one.safetensors").write_bytes(b"cut")
    monkeypatch.setenv("MVCODEC_MODELS", "with_a_bad_one")
    api._name_of_id.cache_clear()
    assert mvcodec.decode(data).pixels.shape == (9, 5, 3)


def test_python_errors_are_ours(cli: Cli) -> None:
    with pytest.raises(UsageError, match="no files"):
        mvcodec.decode_set([])
    for how, message in (
        ({"max_peers": 0}, "no number of peers"),
        ({"maps": True, "joint": False}, "not without joint"),
        ({"maps": True, "refine": False}, "not without joint and refine"),
        ({"device": "toaster"}, "none of auto, cpu, cuda"),
    ):
        with pytest.raises(UsageError, match=message):
            mvcodec.decode_set([mvcodec.encode(np.zeros((4, 4), np.uint8))], **how)
    with pytest.raises(BitstreamError, match="4 x 4 pixels, over the cap of 15"):
        mvcodec.decode(mvcodec.encode(np.zeros((4, 4), np.uint8)), max_pixels=15)
    with pytest.raises(mvcodec.MvcodecError, match="give uint8"):
        mvcodec.encode(np.zeros((4, 4)))
    with pytest.raises(AttributeError, match="has no attribute 'compress'"):
        mvcodec.compress  # noqa: B018


def test_python_says_what_it_takes(cli: Cli) -> None:
    array = np.zeros((4, 4), np.uint8)
    data = mvcodec.encode(array, frame=np.int64(7))
    Path("a.phv").write_bytes(data)
    for file in (data, memoryview(data), "a.phv", Path("a.phv")):
        assert mvcodec.info(file)["frame"] == 7
    for picture in (array.tolist(), b"\x89PNG", None):
        with pytest.raises(UsageError, match=f"picture is a {type(picture).__name__}"):
            mvcodec.encode(picture)
    for how, message in (
        ({"frame": 1.5}, "1.5 is no whole number"),
        ({"timestamp_us": "7"}, "'7' is no whole number"),
        ({"camera_id": 3}, "3 is not a str"),
        ({"device": "meta"}, "none of auto, cpu, cuda"),
        ({"device": None}, "none of auto, cpu, cuda"),
        ({"model": 5}, "model is a int"),
        ({"quality": "60"}, "no number between 0 and 100"),
        ({"quality": np.array([60])}, "no number between 0 and 100"),
        ({"effort": 1.5}, "no whole number between 0 and 5"),
        ({"max_memory": "4G"}, "no number of bytes"),
        ({"max_memory": 0}, "no number of bytes"),
        ({"max_memory": float("inf")}, "no number of bytes"),
    ):
        with pytest.raises(UsageError, match=message):
            mvcodec.encode(array, **how)
    pil.fromarray(array).save("flat.png")
    for how, message in (({"alpha": "Drop"}, "none of refuse, drop"), ({"max_pixels": None}, "no number of pixels")):
        with pytest.raises(UsageError, match=message):
            mvcodec.encode("flat.png", **how)
    (view,) = mvcodec.decode_set([data])
    assert view == view
    assert len({view, mvcodec.load_model()}) == 2
    for how, message in (({"max_peers": 1.5}, "no number of peers"), ({"max_pixels": "3"}, "no number of pixels")):
        with pytest.raises(UsageError, match=message):
            mvcodec.decode_set([data], **how)
    for file in ("a.phv", Path("a.phv"), data, None):
        with pytest.raises(UsageError, match="takes a list of files"):
            mvcodec.decode_set(file)
    for take in (mvcodec.info, mvcodec.decode):
        with pytest.raises(UsageError, match="give its path or its bytes"):
            take(3)


def test_each_peer_and_its_mean_weight_are_told(cli: Cli, coded: Path) -> None:
    """An untrained refinement changes nothing, but weighs its peers; a view's own weight is the rest of 1."""
    views = [r for r in cli("decode", coded, "-o", "out", "--json").records if r["output"].endswith("0000.png")]
    assert [r["peers"] for r in views] == [["C2"], ["C1"]]
    for record in views:
        assert len(record["weights"]) == 1
        assert 0 <= record["weights"][0] <= 0.5
    said = cli("decode", coded / "C1/00000000.phv", coded / "C2/00000000.phv", "-o", "again").err
    given = views[0]["weights"][0]
    assert (f"with C2 ({given:.0%})" if given >= 0.005 else ", alone") in said
    for option in ("--preview", "--no-refine"):
        assert [r["weights"] for r in cli("decode", coded, "-o", f"out{option}", option, "--json").records] == [
            None
        ] * 4


def test_a_peer_that_gave_nothing_is_not_said_to_help() -> None:
    view = SimpleNamespace(weights=(0.0, 0.25, 0.004), peers=("C1", "C2", "C3"))
    assert _helpers(view) == "C2 (25%)"
    assert _helpers(SimpleNamespace(weights=(0.0,), peers=("C2",))) == ""


def test_maps_show_what_each_peer_contributed(cli: Cli, coded: Path) -> None:
    outcome = cli("decode", coded, "-o", "out", "--only", "C1", "--maps", "maps", "--json")
    expected = [f"maps/C1/0000000{frame}.from_C2.png" for frame in (0, 1)]
    assert sorted(p.as_posix() for p in Path("maps").rglob("*.*")) == expected
    assert [Path(m).as_posix() for r in outcome.records for m in r["maps"]] == expected
    assert pixels(expected[0]).shape == pixels("out/C1/00000000.png").shape == (50, 70, 3)
    assert not pixels(expected[0])[..., 2].any()  # red to green
    # nothing is overwritten unasked, and it is told before any work
    again = cli("decode", coded, "-o", "new", "--maps", "maps")
    assert again.code == UsageError.exit_code
    assert "from_C2.png: exists; overwrite with -f" in again.err
    assert not Path("new").exists()
    Path(expected[0]).write_bytes(b"mine")
    assert cli("decode", coded, "-o", "new", "--maps", "maps", "--skip-existing").code == 0
    assert Path(expected[0]).read_bytes() == b"mine"
    assert cli("decode", coded, "-o", "new", "--maps", "maps", "-f").code == 0
    assert Path(expected[0]).read_bytes() != b"mine"


def test_maps_that_are_not_there_are_written_though_the_picture_is(cli: Cli, coded: Path) -> None:
    assert cli("decode", coded, "-o", "out").code == 0
    picture = Path("out/C1/00000000.png")
    picture.write_bytes(b"mine")
    again = ["decode", coded, "-o", "out", "--maps", "maps", "--skip-existing", "--json"]
    assert len([m for r in cli(*again).records for m in r["maps"]]) == len(list(Path("maps").rglob("*.png"))) == 4
    assert picture.read_bytes() == b"mine"
    Path("maps/C2/00000001.from_C1.png").unlink()
    done = [r for r in cli(*again).records if not r.get("skipped")]
    assert [r["file"] for r in done] == [str(coded / "C2/00000001.phv")]
    assert all(r["skipped"] for r in cli(*again).records)
    alone = ["decode", coded / "C1/00000001.phv", "-o", "alone.png", "--maps", "none", "--skip-existing", "--json"]
    assert [r.get("skipped", False) for _ in range(2) for r in cli(*alone).records] == [False, True]


@pytest.mark.parametrize(("asked", "against"), [(["--maps", "m"], "--preview"), (["--max-peers", "1"], "--no-refine")])
def test_what_is_about_peers_needs_them(cli: Cli, coded: Path, asked: list[str], against: str) -> None:
    outcome = cli("decode", coded, "-o", "out", *asked, against)
    assert outcome.code == UsageError.exit_code
    assert f"{asked[0]} is about the peers that {against} leaves out" in outcome.err


def test_each_peer_has_a_map_of_its_own(workplace: Path) -> None:
    view = Source(Path("C1.phv"), Path("C1.phv"))
    paths = Maps("maps", [view], False, False).write(view, ["cam:1", "cam?1", ""], np.zeros((3, 4, 4), np.uint8))
    assert [path.name for path in paths] == ["C1.from_cam_1.png", "C1.from_cam_1.1.png", "C1.from_view2.png"]
    assert all(path.exists() for path in paths)


def test_maps_are_red_for_nothing_and_green_for_a_half() -> None:
    shares = np.array([[0, 64, 128, 255]], np.uint8)
    drawn = colours(shares)[0].astype(int)
    for found, expected in zip(drawn, [(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 0)], strict=True):
        assert abs(found - expected).max() <= 2
