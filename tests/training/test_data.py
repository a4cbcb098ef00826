"""Scenes, their global shifts, and crops that show the same place."""

import os
import shutil
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mvcodec.errors import PictureError, UsageError
from mvcodec.training import data
from mvcodec.training.data import (
    calibration_pictures,
    centre_crops,
    check_validation,
    find_scenes,
    global_shift,
    load_scenes,
    read_rgb,
    refuse_overlap,
)
from mvcodec.training.klt import block_covariance
from mvcodec.training.sampling import CropSampler, Part
from tests.training.conftest import SHIFT


def noise(seed: int, *shape: int):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_every_folder_of_pictures_is_a_scene(scenes_folder):
    assert {name: len(files) for name, files in find_scenes(scenes_folder).items()} == {"scene0": 2, "scene1": 2}


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "scene").mkdir()
    (tmp_path / "scene" / "view.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"view\.png: is not a picture"):
        load_scenes(tmp_path)


def test_a_picture_is_seen_as_the_codec_sees_it(tmp_path):
    grey = noise(1, 6, 9)
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    assert (read_rgb(tmp_path / "deep.png") == grey[..., None]).all()
    alpha = noise(2, 6, 9, 4)
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    assert (read_rgb(tmp_path / "alpha.png") == alpha[..., :3]).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(alpha[..., :3]).save(tmp_path / "turned.png", exif=turned)
    assert (read_rgb(tmp_path / "turned.png") == np.rot90(alpha[..., :3], -1)).all()


@pytest.mark.parametrize("size", [(20_000, 10_000), (15_000, 10_000)])
def test_a_picture_beyond_the_cap_is_one_sentence(tmp_path, size):
    header = b"IHDR" + struct.pack(">2I5B", *size, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT")
    with pytest.raises(PictureError, match=r"huge\.png: .* pixels(?!.*--max-pixels)"):
        read_rgb(tmp_path / "huge.png")


def test_global_shift_takes_a_point_of_the_reference_to_the_other():
    blocks = noise(0, 40, 50, 3).repeat(8, axis=0).repeat(8, axis=1)
    reference, other = blocks[:256, :320], blocks[16:272, 24:344]
    assert global_shift(reference, other) == (-16, -24)
    assert global_shift(reference, reference) == (0, 0)


def test_shifts_are_found_once_and_again_when_a_file_changes(scenes_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "scenes"
    shutil.copytree(scenes_folder, folder)
    searches: list[str] = []
    monkeypatch.setattr(data, "global_shift", lambda *views: searches.append("") or global_shift(*views))
    first = load_scenes(folder)
    assert len(searches) == 2
    assert [scene.shifts for scene in load_scenes(folder)] == [scene.shifts for scene in first]
    assert len(searches) == 2
    os.utime(folder / "scene1" / "view1.png", ns=(0, 0))
    load_scenes(folder)
    assert len(searches) == 3
    (cache,) = (tmp_path / "cache").rglob("*.json")
    for text in ("spoilt", "5", "null", "[1]", '{"scene0": 3}', '{"scene0": {"files": []}}'):
        cache.write_text(text)
        assert load_scenes(folder)[0].shifts == first[0].shifts
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"view0.png", "view1.png"}


def test_validation_on_training_pictures_is_refused(scenes_folder, tmp_path):
    apart = tmp_path / "apart" / "scene"
    apart.mkdir(parents=True)
    Image.fromarray(noise(5, 70, 70, 3)).save(apart / "view.png")
    refuse_overlap(scenes_folder, apart.parent)
    for validation in (scenes_folder, scenes_folder / "scene1", scenes_folder.parent):
        with pytest.raises(UsageError, match="is also a training picture"):
            refuse_overlap(scenes_folder, validation)
    shutil.copy(scenes_folder / "scene1" / "view0.png", apart / "copy.png")
    with pytest.raises(UsageError, match=r"copy\.png: is also a training picture"):
        refuse_overlap(scenes_folder, apart.parent)


def test_crops_of_a_set_show_the_same_place(scenes_folder):
    scenes = load_scenes(scenes_folder)
    assert scenes[0].shifts[1] == (-SHIFT[0], -SHIFT[1])
    crops = CropSampler(scenes, (64, 64), seed=3).batch(0, Part.of(24, 0, 1), 2)
    assert crops.shape == (24, 2, 3, 64, 64)
    agreement = (crops[:, 0].float() - crops[:, 1]).abs().mean(dim=(1, 2, 3))
    assert (agreement == 0).sum() >= 12  # the others touch a border and are moved inside


def test_wide_crops_of_a_set_show_the_same_place(scenes_folder):
    crops = CropSampler(load_scenes(scenes_folder), (64, 128), seed=3, synthetic=0.5).batch(0, Part.of(24, 0, 1), 2)
    assert crops.shape == (24, 2, 3, 64, 128)
    assert ((crops[:, 0] == crops[:, 1]).flatten(1).all(1)).any()


def test_a_batch_depends_on_seed_and_step_alone(scenes_folder):
    scenes = load_scenes(scenes_folder)
    first, again = (CropSampler(scenes, (64, 64), seed=3).batch(7, Part.of(2, 0, 1), 2) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, CropSampler(scenes, (64, 64), seed=3).batch(8, Part.of(2, 0, 1), 2))
    assert not torch.equal(first, CropSampler(scenes, (64, 64), seed=4).batch(7, Part.of(2, 0, 1), 2))


def test_sets_larger_than_any_scene_are_refused(scenes_folder):
    with pytest.raises(UsageError, match="no scene has 3 views"):
        CropSampler(load_scenes(scenes_folder), (64, 64), 0).batch(0, Part.of(1, 0, 1), 3)


def test_validation_crops_are_fixed(scenes_folder):
    scenes = load_scenes(scenes_folder)
    (name, crops), _ = centre_crops(scenes, 64)
    assert name == "scene0"
    assert crops.shape == (1, 2, 3, 64, 64)
    assert torch.equal(crops[0, 0], crops[0, 1])


def test_small_views_give_smaller_validation_crops_and_stay_out_of_training(scenes_folder):
    scene = load_scenes(scenes_folder)[0]
    uneven = replace(scene, views=(scene.views[0], scene.views[1][:100]))
    assert [crops.shape[-1] for _, crops in centre_crops([scene, uneven, scene], 128)] == [128, 64, 128]
    assert CropSampler([uneven], (128, 128), 0).batch(0, Part.of(1, 0, 1), 1).shape[-1] == 128
    with pytest.raises(UsageError, match="no scene has 2 views of at least 128x128"):
        CropSampler([uneven], (128, 128), 0).batch(0, Part.of(1, 0, 1), 2)
    with pytest.raises(UsageError, match="at least 64 pixels"):
        check_validation([replace(scene, views=(scene.views[0][:50], scene.views[1]))])


def test_views_of_a_few_pixels_harm_nothing(tmp_path):
    for name, size in (("small/a", 1), ("small/b", 12), ("small/c", 80)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(size, size, size, 3)).save(tmp_path / f"{name}.png")
    (scene,) = load_scenes(tmp_path)
    assert scene.shifts == ((0, 0),) * 3
    assert block_covariance([scene], blocks_per_view=20).isfinite().all()
    (crop,) = calibration_pictures(tmp_path)  # not the first view, which is too small
    assert crop.shape == (1, 3, 64, 64)
    (tmp_path / "small" / "c.png").unlink()
    with pytest.raises(UsageError, match="at least 64 pixels a side to calibrate on"):
        calibration_pictures(tmp_path)
