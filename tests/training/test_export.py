"""`mvcodec export` and `train --config`: what a checkpoint becomes, and who has the last word on a setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvcodec.cli import main
from mvcodec.errors import ModelError
from mvcodec.training.curves import append_rows
from mvcodec.training.export import export_checkpoint
from mvcodec.weights import load_model, read_model_file


def call(*args: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in args])
    return int(exit_.value.code or 0)


@pytest.fixture(scope="module")
def run(scenes_folder: Path, tiny_model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step by a settings file whose batch is overridden."""
    folder = tmp_path_factory.mktemp("config")
    settings = folder / "mine.toml"
    settings.write_text(
        f'data = "{scenes_folder}"\nprofile = "tiny"\nsteps = 1\nbatch = 8\ncrop = 64\nlr = 1e-3\njitter = 0.5\n'
        f'start-from = "{tiny_model_file}"\nthreads = 1\nvalidate-every = 7\n'
    )
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", str(settings), "--out", str(folder / "run"), "--batch", "2", "--quiet"])
    assert not exit_.value.code
    return folder / "run"


def test_options_go_before_the_file_and_the_file_before_the_defaults(run):
    used = torch.load(run / "checkpoint.pt", weights_only=True)["train_config"]
    assert (used["batch"], used["crop"], used["learning_rate"], used["jitter"]) == (2, 64, 1e-3, 0.5)
    assert used["validate_every"] == 7
    assert used["seed"] == 1
    assert (run / "curves.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setps = 3", "unknown setting 'setps'; known: batch, "),
        ("resume = true", "unknown setting 'resume'"),
        ('steps = "many"', "'many' is not a valid integer"),
        ('stage = "both"', "'both' is not one of"),
        ("steps = 1.9", "steps cannot be 1.9"),
        ("steps = true", "steps cannot be True"),
        ("steps = [1, 2]", "steps cannot be [1, 2]"),
        ("lr = {a = 1}", "lr cannot be {'a': 1}"),
        ("lr = 1979-05-27", "lr cannot be datetime.date"),
        ("steps = 1e400", "steps cannot be inf"),
        ("lr = 1e400", "inf is not a finite number"),
        ("start-from = 5", "start-from cannot be 5"),
        ('start-from = "nowhere.pt"', "start-from: File 'nowhere.pt' does not exist"),
        ("crop = 8", "crop: 8 is not in the range"),
    ],
)
def test_a_mistaken_settings_file_is_told_in_one_sentence(scenes_folder, tmp_path, capfd, text, message):
    (tmp_path / "mine.toml").write_text(text)
    assert call("train", scenes_folder, "--config", tmp_path / "mine.toml", "--out", tmp_path / "run") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert f"--config {tmp_path / 'mine.toml'}: " in error or "unknown setting" in error
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    ["--seed -1", f"--seed {2**64}", "--threads 1000000", "--lr nan", "--lr inf", "--parallax nan", "--minutes nan"],
)
def test_a_number_that_cannot_be_is_a_usage_error(scenes_folder, tmp_path, capfd, option):
    assert call("train", scenes_folder, "--out", tmp_path / "run", *option.split()) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_export_gives_the_model_file_that_training_gave_and_a_card(run, tmp_path, capfd):
    append_rows(
        run / "validation.csv",
        [{"step": 1, "quality": q, "bpp": 0.5 + q, "psnr_separate": 30.0, "psnr_joint": 31.0} for q in (0.0, 1.0)],
    )
    target = tmp_path / "new" / "mine.safetensors"
    data = torch.load(run / "checkpoint.pt", weights_only=True)["train_config"]["data"]
    assert call("export", run / "checkpoint.pt", "-o", target, "--calibrate", data, "--card", "--json") == 0
    record = json.loads(capfd.readouterr().out)
    assert record["steps"] == 1
    exported, trained = read_model_file(target), read_model_file(run / "tiny.safetensors")
    assert exported[1:] == trained[1:]
    assert all(torch.equal(exported[0][name], value) for name, value in trained[0].items())
    card = target.with_suffix(".md").read_text()
    assert f"model id `{record['model_id']}`" in card
    assert "| 100 | 1.5000 | 30.00 | 31.00 |" in card
    assert "| crop | 64 |" in card
    assert call("export", run / "checkpoint.pt", "-o", target) == 2
    assert "say --force" in capfd.readouterr().err
    assert call("export", run / "checkpoint.pt", "-o", target, "--force") == 0
    assert call("export", run / "checkpoint.pt", "-o", tmp_path / "mine.pt") == 2


def test_a_checkpoint_older_than_a_setting_has_its_default(run, tmp_path):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    del state["train_config"]["distortion"]
    torch.save(state, tmp_path / "old.pt")
    assert call("export", tmp_path / "old.pt", "-o", tmp_path / "old.safetensors") == 0
    assert load_model(tmp_path / "old.safetensors").about["distortion"] == "mse"


def test_bits_of_another_model_keep_its_id(run, tmp_path, capfd):
    wide, kept = tmp_path / "wide.safetensors", tmp_path / "kept.safetensors"
    assert call("export", run / "checkpoint.pt", "-o", wide) == 0  # not calibrated: other integers
    assert call("export", run / "checkpoint.pt", "-o", kept, "--bits-of", run / "tiny.safetensors") == 0
    capfd.readouterr()
    ids = [load_model(path).id for path in (run / "tiny.safetensors", wide, kept)]
    assert ids[0] == ids[2] != ids[1]


def test_what_is_no_checkpoint_is_not_exported(tmp_path, capfd):
    for name, content in (("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        assert call("export", tmp_path / name) == 5
        assert f"{name} is not a checkpoint of mvcodec train" in capfd.readouterr().err
    torch.save({"step": 1}, tmp_path / "other.pt")
    with pytest.raises(ModelError, match="not a checkpoint of mvcodec train"):
        export_checkpoint(tmp_path / "other.pt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
