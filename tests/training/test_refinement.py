"""Stage `refine`: only the refinement learns, on what the codec decodes, and a stopped run goes on as if it had not."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import UsageError
from mvcodec.images import Image
from mvcodec.training import preparation, refinement, steadying
from mvcodec.training.export import export_checkpoint
from mvcodec.training.loop import train
from mvcodec.training.preparation import decode_alone, to_tensor
from mvcodec.weights import load_model
from tests.conftest import smooth_picture


@pytest.fixture
def config(after_single, tmp_path, monkeypatch):
    for name, value in {"WINDOW": 128, "PAIR_WINDOW": 128, "CROP": 96, "SETS": 2}.items():
        monkeypatch.setattr(preparation, name, value)
    for name, value in {"CROP": 96, "TRAINED_CROP": {"mse": 64}}.items():
        monkeypatch.setattr(refinement, name, value)
    for name, value in {"TRIES": 2, "STEPS": 2, "OVERLAP": 0.0}.items():
        monkeypatch.setattr(steadying, name, value)
    return replace(after_single, stage="refine", run_dir=str(tmp_path / "refine"), steps=4)


def test_only_the_refinement_learns_and_the_model_id_stays(config, tmp_path, capsys):
    before = torch.load(config.start_from, weights_only=True)["ema"]
    checkpoint = train(config, progress=False)
    told = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert told == ["reading", "decoding", "steadying", "decoding", "training,"]
    after = torch.load(checkpoint, weights_only=True)["ema"]
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert {"refinement.pair_out.weight", "refinement.steady.last.weight"} <= changed
    assert after["refinement.steady.last.weight"].any()
    peerless = ("refinement.look.", "refinement.clean_out.")
    assert all(name.startswith("refinement.") and not name.startswith(peerless) for name in changed)
    single = export_checkpoint(config.start_from, tmp_path / "single.safetensors")
    assert export_checkpoint(checkpoint, tmp_path / "refined.safetensors") == single
    refined = load_model(tmp_path / "refined.safetensors").net
    assert refined.config.refine == "aligned"
    assert refined.refinement.steady is not None


def test_what_it_learns_from_is_what_the_decoder_shows(tiny_model):
    """Cleaned, here so badly that it leaves the cells of the integers, and drawn back into them."""
    net = deepcopy(tiny_model.net)
    torch.nn.init.constant_(net.refinement.clean_out.bias, 0.8)
    model, picture = replace(tiny_model, net=net), smooth_picture(70, 100, 3)
    (view,) = decode_set(model, [encode_image(model, Image(picture), 90)])
    decoded, settled = decode_alone(net)(to_tensor([picture]), [0.9])
    cleaned = net.refinement.clean(decoded, torch.tensor([0.9]))[0]
    inside = (..., slice(0, 64), slice(0, 64))  # beyond the edge a file's picture fades
    wanted = to_tensor([view.pixels])
    apart = [float((255 * (x - wanted)[inside]).abs().mean()) for x in (settled, cleaned, decoded)]
    assert apart[0] < 0.5  # pixels are rounded
    assert apart[1] > 10
    assert apart[2] > 0.7


def test_a_resumed_run_equals_the_uninterrupted_one(config, tmp_path, interrupted, capsys, monkeypatch):
    whole = torch.load(train(config, progress=False), weights_only=True)["refinement"]
    parted = replace(config, run_dir=str(tmp_path / "parted"))
    lessons, learn = [], steadying.learn

    def learning(*lesson):
        lessons.append(lesson)
        learn(*lesson)

    monkeypatch.setattr(steadying, "learn", learning)
    capsys.readouterr()
    # Two tries of pairs, each step of the network they teach, and that it has learned, two sets of views: each ends a
    # run. Then training's first step does.
    for _ in range(6 + steadying.STEPS):
        assert not (tmp_path / "parted" / "checkpoint.pt").exists()
        train(replace(parted, minutes=1e-9), progress=False, quiet=True)
    assert len(lessons) == steadying.STEPS + 1
    assert not capsys.readouterr().err
    assert torch.load(tmp_path / "parted" / "checkpoint.pt", weights_only=True)["step"] == 1
    interrupted(lambda: train(parted, progress=False))
    resumed = torch.load(train(parted, progress=False), weights_only=True)
    assert resumed["step"] == 4
    assert all(torch.equal(resumed["refinement"][name], value) for name, value in whole.items())


def test_what_was_prepared_of_another_model_is_prepared_anew(config, tmp_path):
    other = torch.load(config.start_from, weights_only=True)
    other["ema"]["gain.log_gain"] += 0.5
    torch.save(other, tmp_path / "other.pt")
    changed = replace(config, steps=1, start_from=str(tmp_path / "other.pt"), batch=400)  # more than there are
    clean = train(replace(changed, run_dir=str(tmp_path / "clean")), progress=False).parent
    run = train(config, progress=False).parent
    kept = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    train(replace(config, steps=5), progress=False)
    assert kept == {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    (run / "checkpoint.pt").unlink()
    train(changed, progress=False)
    assert kept
    for file in kept:
        assert file.read_bytes() == (clean / file.relative_to(run)).read_bytes()


def test_folders_that_no_run_prepared_are_refused_and_left(config, tmp_path):
    run = tmp_path / "refine"
    for name in ("pairs", "examples"):
        own = run / name / "0.safetensors"  # as an older version would have left it, or anybody
        own.parent.mkdir(parents=True)
        own.write_text("mine")
        with pytest.raises(UsageError, match=f"holds `{name}`"):
            train(config, progress=False)
        assert [path for path in run.rglob("*") if path.is_file()] == [own]
        own.unlink()  # an empty folder is nobody's


def test_of_what_was_prepared_before_only_that_is_deleted(tmp_path):
    folder = preparation.only_of(tmp_path / "pairs", "one")
    for name in ("0.safetensors", "17.safetensors", "steady.safetensors", "notes.txt", "mine.safetensors"):
        (folder / name).touch()
    preparation.only_of(folder, "one")
    assert (folder / "17.safetensors").exists()
    preparation.only_of(folder, "another")
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "notes.txt", "of.txt"]


@pytest.mark.parametrize(
    "settings",
    [
        {"validation": "scenes"},
        {"compile": True},
        {"optimizer": "muon"},
        {"crop": 128},
        {"crop_width": 384},
        {"max_views": 4},
        {"jitter": 0.5},
        {"synthetic": 0.5},
        {"parallax": 0.3},
        {"synthesis": True},
        {"workers": 2},
    ],
)
def test_settings_of_other_stages_are_refused(config, settings):
    option = next(iter(settings)).replace("_", "-")
    with pytest.raises(UsageError, match=f"--{option} is nothing that stage refine knows"):
        refinement.refine(replace(config, **settings))


def test_an_unknown_distortion_is_refused(config):
    with pytest.raises(UsageError, match="none of mse, ms-ssim"):
        train(replace(config, distortion="vmaf"), progress=False)


def test_a_stage_without_a_codec_to_start_from_is_refused(config):
    with pytest.raises(UsageError, match="needs a checkpoint or model file"):
        train(replace(config, start_from=""), progress=False)
