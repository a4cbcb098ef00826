"""An evaluation of a small scene with the tiny model: real files, every table, and nothing measured twice."""

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image as pil

from mvcodec import codec
from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import DesyncError, PictureError, UsageError
from mvcodec.evaluation import measure
from mvcodec.evaluation.metrics import psnr
from mvcodec.evaluation.peers import PEERS
from mvcodec.evaluation.points import Ledger, Point, Scene, View, read_scenes
from mvcodec.evaluation.points import measure as measure_point
from mvcodec.evaluation.report import evaluate, table
from mvcodec.evaluation.summary import (
    JOINT,
    MEAN,
    SEPARATE,
    check_estimate,
    curve_points,
    deltas,
    joint_gain_db,
)
from mvcodec.images import Image
from tests.conftest import smooth_picture

QUALITIES = (0.0, 30.0, 60.0, 90.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Scene `wide` of two views, scene `small` of one; a folder without pictures is no scene."""
    folder = tmp_path_factory.mktemp("scenes")
    for scene, view, size in (("wide", "a", (176, 192)), ("wide", "b", (176, 192)), ("small", "c", (64, 80))):
        (folder / scene).mkdir(exist_ok=True)
        pil.fromarray(smooth_picture(*size, seed=ord(view))).save(folder / scene / f"{view}.png")
    (folder / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def evaluation(scenes, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    said: list[str] = []
    result = evaluate(scenes, tiny_model, out, qualities=QUALITIES, peers=["jpeg"], tell=said.append)
    return result, out, said


def rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_points_are_those_of_real_files(evaluation, scenes, tiny_model):
    _, out, _ = evaluation
    points = {p.key[:1] + p.key[3:4] + p.key[6:]: p for p in Ledger(out / "mvcodec.jsonl").points.values()}
    originals = {v: np.asarray(pil.open(scenes / "wide" / f"{v}.png")) for v in "ab"}
    files = [encode_image(tiny_model, Image(originals[v]), 60.0, camera_id=v) for v in "ab"]
    for joint, name in ((False, SEPARATE), (True, JOINT)):
        for view in decode_set(tiny_model, files, joint=joint):
            camera = view.header.camera_id
            point = points[name, camera, 60.0]
            assert point.bytes == len(files["ab".index(camera)])
            assert point.bpp == 8 * point.bytes / (176 * 192)
            assert point.psnr_db == pytest.approx(psnr(originals[camera], view.pixels), abs=1e-9)
            assert point.ms_ssim is not None


def test_tables_hold_scenes_and_means(evaluation):
    result, out, _ = evaluation
    curves = rows(out / "curves.csv")
    assert {r["codec"] for r in curves} == {"jpeg", SEPARATE, JOINT}
    assert {r["scene"] for r in curves} == {"wide", "small", MEAN}
    ours = {(r["scene"], float(r["setting"])): r for r in curves if r["codec"] == SEPARATE}
    for quality in QUALITIES:
        scene_bpp = [float(ours[scene, quality]["bpp"]) for scene in ("wide", "small")]
        assert float(ours[MEAN, quality]["bpp"]) == pytest.approx(sum(scene_bpp) / 2)
    wanted = {("jpeg", SEPARATE), ("jpeg", JOINT), (SEPARATE, JOINT)}
    assert {(r["anchor"], r["test"]) for r in rows(out / "bd_rate.csv")} == wanted
    small = next(d for d in result.deltas if (d.scene, d.metric) == ("small", "ms_ssim"))
    assert math.isnan(small.percent)
    assert "lacks values" in small.reason  # 64 pixels are too few for MS-SSIM
    summary = json.loads((out / "summary.json").read_text())
    assert summary["scenes"] == ["small", "wide"]
    assert summary["peers"] == {"jpeg": "Pillow JPEG, 4:4:4, optimised"}
    assert "akima" in summary["bd_rate_method"]
    with pil.open(out / "rate_distortion.png") as figure:
        assert figure.width > 300


def test_an_untrained_fusion_gains_nothing(evaluation):
    result, _, _ = evaluation
    assert result.joint_gain_db[MEAN] == pytest.approx(0, abs=0.05)
    assert result.estimate.files == len(QUALITIES) * 3
    assert abs(result.estimate.percent) < 15  # small files, untrained prior; the sizes are of one kind


def test_a_second_run_measures_nothing_again(evaluation, scenes, tiny_model, monkeypatch):
    _, out, _ = evaluation
    before = {name: (out / name).read_bytes() for name in ("mvcodec.jsonl", "peers.jsonl", "curves.csv")}
    monkeypatch.setattr(codec, "encode_view", None)
    evaluate(scenes, tiny_model, out, qualities=QUALITIES, peers=["jpeg"])
    assert {name: (out / name).read_bytes() for name in before} == before


def test_it_is_told_when_another_model_takes_the_tables(evaluation, scenes, tiny_model, tmp_path):
    shutil.copytree(evaluation[1], tmp_path, dirs_exist_ok=True)
    said: list[str] = []
    evaluate(scenes, tiny_model, tmp_path, qualities=QUALITIES, peers=["jpeg"], tell=said.append)
    assert not [sentence for sentence in said if "replaced" in sentence]
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"weights": "0123456789abcdef"}))
    evaluate(scenes, tiny_model, tmp_path, qualities=QUALITIES, peers=["jpeg"], tell=said.append)
    (sentence,) = (s for s in said if "replaced" in s)
    assert "of the weights 0123456789abcdef, are replaced" in sentence
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_an_interrupted_run_goes_on_where_it_was(evaluation, scenes, tiny_model, tmp_path):
    _, out, _ = evaluation
    lines = (out / "mvcodec.jsonl").read_text().splitlines(keepends=True)
    ledger, peers = tmp_path / "mvcodec.jsonl", out / "peers.jsonl"
    ledger.write_text("".join(lines[:-3]) + lines[-3][:40])  # the last one cut short
    evaluate(scenes, tiny_model, tmp_path, qualities=QUALITIES, peers=["jpeg"], peer_results=peers)
    assert (tmp_path / "curves.csv").read_bytes() == (out / "curves.csv").read_bytes()
    assert Ledger(ledger).points.keys() == Ledger(out / "mvcodec.jsonl").points.keys()


def test_a_peer_that_fails_on_a_scene_is_left_out_there_and_has_no_mean(
    evaluation, scenes, tiny_model, tmp_path, monkeypatch
):
    def fussy(pictures, setting):
        if pictures[0].shape[0] < 100:
            raise ValueError("too\nsmall")
        return PEERS["jpeg"].code(pictures, setting)

    monkeypatch.setitem(PEERS, "webp", replace(PEERS["jpeg"], name="webp", code=fussy))
    for kept in evaluation[1].glob("*.jsonl"):
        shutil.copy(kept, tmp_path)
    said: list[str] = []
    result = evaluate(scenes, tiny_model, tmp_path, qualities=QUALITIES, peers=["webp", "jpeg"], tell=said.append)
    assert "webp: left out on small: too small" in said
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["left_out"] == {"webp": ["small"]}
    assert {p["codec"] for p in summary["mean_curves"]} == {"jpeg", SEPARATE, JOINT}
    (delta,) = (d for d in result.mean_deltas() if (d.anchor, d.test, d.metric) == ("webp", JOINT, "psnr"))
    assert delta.reason == "1 of 2 scenes have none"
    rows = {line.split()[0]: line for line in table(result).splitlines()}
    assert rows["webp"].count("*") > rows["jpeg"].count("*")
    assert "not of all scenes" in rows["*"]


def test_lines_that_are_no_points_are_passed_over_and_files_that_are_no_text_left_alone(evaluation, tmp_path):
    good = (evaluation[1] / "peers.jsonl").read_text().splitlines(keepends=True)[0]
    path = tmp_path / "peers.jsonl"
    path.write_text(good + good.replace('"jpeg"', '["jpeg"]') + "[]\n{}\nhello\n")
    assert len(Ledger(path).points) == 1
    path.write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"peers\.jsonl: is not a file of points"):
        Ledger(path)
    assert path.read_bytes() == b"\x89PNG"


def test_a_table_that_does_not_fit_leaves_the_old_one(evaluation, tmp_path):
    resource = pytest.importorskip("resource")
    evaluation[0].write(tmp_path)
    before = (tmp_path / "curves.csv").read_bytes()
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, most))
    try:
        with pytest.raises(OSError, match=r"curves\.csv"):
            evaluation[0].write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "curves.csv").read_bytes() == before


def test_views_and_scenes_can_be_limited(scenes):
    (scene,) = read_scenes(scenes, ["wide"], limit_views=1)
    assert [view.name for view in scene.views] == ["a"]
    with pytest.raises(UsageError, match="has no scene absent"):
        list(read_scenes(scenes, ["absent"]))
    with pytest.raises(UsageError, match="holds no pictures"):
        list(read_scenes(scenes / "notes"))


def test_a_point_is_of_all_that_were_decoded_together(tmp_path):
    """Another picture in the place of one view moves the points of its peers; put back, they count again."""
    a, b, c = (View(name, smooth_picture(8, 8, seed), seed) for name, seed in (("a", 1), ("b", 2), ("b", 3)))
    ledger = Ledger(tmp_path / "points")
    for scene in (Scene("s", (a, b)), Scene("s", (a,))):
        ledger.add([measure_point("joint", "1", scene, a, 50.0, 10, a.pixels)])
        assert ledger.get("joint", "1", scene, a, 50.0) is not None
    for other in (Scene("s", (a, c)), Scene("s", (c,))):
        assert ledger.get("joint", "1", other, other.views[0], 50.0) is None


def test_a_scene_named_twice_counts_once(scenes):
    assert [scene.name for scene in read_scenes(scenes, ["small", "small"])] == ["small"]


def test_scenes_are_those_of_training(tmp_path):
    for name in ("day1/C1/0007.png", "day1/C2/0007.png", "flat/cam1_7.png", "flat/cam2_7.png", "shard/still/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pil.fromarray(smooth_picture(8, 8)).save(tmp_path / name)
    found = {scene.name: [view.name for view in scene.views] for scene in read_scenes(tmp_path)}
    assert found == {"day1/7": ["C1", "C2"], "flat/7": ["cam1", "cam2"], "shard/still": ["a"]}
    (of_one_camera,) = read_scenes(tmp_path / "day1/C1")
    assert (of_one_camera.name, [view.name for view in of_one_camera.views]) == ("7", ["C1"])
    (tmp_path / "flat").rename(tmp_path / "mean")
    (tmp_path / "mean" / "cam1_7.png").rename(tmp_path / "mean" / "a.png")
    with pytest.raises(UsageError, match="rename the folder"):
        next(read_scenes(tmp_path))


def test_only_pictures_that_every_peer_codes_are_compared(tmp_path):
    (tmp_path / "scene").mkdir()
    pil.fromarray(smooth_picture(20, 20)[..., 0]).save(tmp_path / "scene" / "grey.png")
    with pytest.raises(PictureError, match="8-bit RGB"):
        list(read_scenes(tmp_path))


def test_too_few_qualities_are_refused_before_any_work(scenes, tiny_model, tmp_path):
    with pytest.raises(UsageError, match="at least 4"):
        evaluate(scenes, tiny_model, tmp_path, qualities=(10, 10, 20, 30))


def test_an_effort_that_the_model_cannot_serve_is_refused_before_any_work(scenes, tiny_model, tmp_path):
    trained = replace(tiny_model, about={"distortion": "ms-ssim"})
    with pytest.raises(UsageError, match="was trained for ms-ssim"):
        evaluate(scenes, trained, tmp_path, qualities=QUALITIES, peers=["jpeg"], effort=1)
    assert not list(tmp_path.iterdir())


def test_views_that_no_common_frame_holds_are_decoded_as_by_decode(tiny_model, tmp_path, monkeypatch):
    strips = {"a": smooth_picture(64, 512), "b": smooth_picture(512, 64), "c": smooth_picture(64, 256)}
    (tmp_path / "scene").mkdir()
    for name, pixels in strips.items():
        pil.fromarray(pixels).save(tmp_path / "scene" / f"{name}.png")
    frames, reconstruct = [], codec.reconstruct

    def seen(model, latents, qualities, joint, *options):
        if joint:
            frames.append([tuple(view.y_hat.shape[2:]) for view in latents])
        return reconstruct(model, latents, qualities, joint, *options)

    monkeypatch.setattr(codec, "reconstruct", seen)
    files = [encode_image(tiny_model, Image(pixels), 50.0, camera_id=name) for name, pixels in strips.items()]
    views = {view.header.camera_id: view.pixels for view in decode_set(tiny_model, files)}
    assert len(frames) == 2
    (scene,) = read_scenes(tmp_path)
    points = list(measure.measure_ours(scene, tiny_model, [50.0], Ledger(tmp_path / "l"), lambda sentence: None))
    assert frames[2:] == frames[:2]
    found = {point.view: point.psnr_db for point in points if point.codec == JOINT}
    assert found == pytest.approx({name: psnr(strips[name], views[name]) for name in strips}, abs=1e-9)


def test_a_file_that_decodes_to_something_else_stops_the_evaluation(tiny_model, scenes, tmp_path, monkeypatch):
    (scene,) = read_scenes(scenes, ["small"])
    other = SimpleNamespace(pixels=scene.views[0].pixels)
    monkeypatch.setattr(codec, "decode_set", lambda *args, **options: [other])
    with pytest.raises(DesyncError, match="differs from what its encoder saw"):
        list(measure.measure_ours(scene, tiny_model, [50.0], Ledger(tmp_path / "l"), lambda sentence: None))


def point(codec_name: str, scene: str, setting: float, bpp: float, psnr_db: float, **extra) -> Point:
    return Point(codec_name, "v", scene, "a", 1, 0, setting, int(1000 * bpp), bpp, psnr_db, 0.9 + psnr_db / 1000, extra)


def test_mean_bd_rate_is_the_mean_of_the_scenes_figures():
    points = []
    for scene, factor in (("x", 0.5), ("y", 0.8)):
        for setting in range(5):
            bpp, db = 0.1 * 2**setting, 28 + 3 * setting + len(scene)
            points += [point("jpeg", scene, setting, bpp, db), point(SEPARATE, scene, setting, factor * bpp, db)]
            points.append(point(JOINT, scene, setting, factor * bpp, db + 0.25))
    curves = curve_points(points)
    found = {(d.anchor, d.test, d.scene): d.percent for d in deltas(curves) if d.metric == "psnr"}
    assert found["jpeg", SEPARATE, "x"] == pytest.approx(-50)
    assert found["jpeg", SEPARATE, "y"] == pytest.approx(-20)
    assert found["jpeg", SEPARATE, MEAN] == pytest.approx(-35)
    assert found[SEPARATE, JOINT, MEAN] == pytest.approx(100 * (2 ** (-0.25 / 3) - 1))
    assert joint_gain_db(curves) == pytest.approx({"x": 0.25, "y": 0.25, MEAN: 0.25})


def test_estimate_is_compared_without_the_header():
    files = [point(SEPARATE, "x", i, 1.0, 30.0, overhead_bytes=100, estimated_bytes=e) for i, e in ((0, 900), (1, 750))]
    check = check_estimate([*files, point(JOINT, "x", 0, 1.0, 30.0)])
    assert (check.files, check.payload_bytes, check.estimated_bytes) == (2, 1800, 1650)
    assert check.percent == pytest.approx(100 * (1800 / 1650 - 1))
    assert check.worst_percent == pytest.approx(20)
