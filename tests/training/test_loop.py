"""The loop learns, stops, goes on as if it had not stopped, and changes no bit in the joint stage."""

import csv
import resource
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from mvcodec.codec import decode_set, encode_image
from mvcodec.errors import ModelError, MvcodecError, UsageError
from mvcodec.exact.fixed import ACTIVATION_LIMIT
from mvcodec.images import Image
from mvcodec.nn.gain import rate_distortion_lambda
from mvcodec.nn.steady_flow import SteadyFlow
from mvcodec.training import optimizers
from mvcodec.training.checkpoint import save_whole
from mvcodec.training.config import TrainConfig, learning_rate
from mvcodec.training.curves import append_rows, columns, draw, draw_if_possible
from mvcodec.training.export import export_checkpoint
from mvcodec.training.loop import Trainer, train
from mvcodec.weights import export_model, load_model
from tests.conftest import smooth_picture


@pytest.fixture
def config(scenes_folder, tmp_path):
    return TrainConfig(
        data=str(scenes_folder),
        run_dir=str(tmp_path / "run"),
        profile="tiny",
        steps=6,
        batch=2,
        crop=64,
        warmup=2,
        learning_rate=1e-3,
        threads=1,
    )


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def goes_on_as_if_not_stopped(config: TrainConfig, whole: dict[str, torch.Tensor], folder: Path) -> None:
    """Saved after three steps and resumed, the run ends with the weights of the whole one."""
    parted = replace(config, run_dir=str(folder / "parted"))
    trainer = Trainer(parted, progress=False)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    resumed = weights(train(parted, progress=False))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_resumed_run_equals_the_uninterrupted_one(config, tmp_path):
    goes_on_as_if_not_stopped(config, weights(train(config, progress=False)), tmp_path)


def test_a_resumed_run_trains_what_it_trained_before(config, single, tmp_path):
    """A part that comes with weights which know it, here what steadies the flow, is not trained all at once."""
    net = Trainer(replace(config, start_from=str(single)), progress=False).model
    net.refinement.steady = SteadyFlow()
    export_model(net, tmp_path / "steady.safetensors")
    run = replace(config, start_from=str(tmp_path / "steady.safetensors"), run_dir=str(tmp_path / "run"))
    trainer = Trainer(run, progress=False)
    trainer.save()
    trained = [{name for name, p in t.model.named_parameters() if p.requires_grad} for t in (trainer, Trainer(run))]
    assert trained[0] == trained[1]
    assert "refinement.steady.last.weight" in dict(trainer.model.named_parameters())

    checkpoint = Path(run.run_dir) / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["optimizer"]["param_groups"][0]["params"].append(10_000)  # as runs left it that trained it
    save_whole(state, checkpoint)
    with pytest.raises(UsageError, match="trained other weights; begin with --start-from"):
        Trainer(run)


def test_an_interrupt_waits_for_the_end_of_a_step(config, tmp_path, interrupted):
    config = replace(config, steps=3, batch=1)
    whole = train(config, progress=False)
    parted = replace(config, run_dir=str(tmp_path / "parted"))
    interrupted(lambda: train(parted, progress=False))
    assert torch.load(Path(parted.run_dir) / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = train(parted, progress=False)
    after = weights(resumed)
    assert all(torch.equal(after[name], value) for name, value in weights(whole).items())
    assert (resumed.parent / "log.csv").read_text() == (whole.parent / "log.csv").read_text()


def cost(rows) -> float:
    """Eq. (6) summed over the validated qualities."""
    lambdas = rate_distortion_lambda(torch.tensor([row["quality"] for row in rows], dtype=torch.float64))
    return sum(
        row["bpp"] + lam * 255**2 * 10 ** (-row["psnr_separate"] / 10)
        for row, lam in zip(rows, lambdas.tolist(), strict=True)
    )


def test_training_lowers_the_cost_and_logs_every_step(config, scenes_folder):
    longer = replace(config, steps=30, learning_rate=3e-3, validation=str(scenes_folder), ema=0.9)
    trainer = Trainer(longer, progress=False)
    # The KLT start is hard to better in 30 steps; a mistaken idea of the scales is not.
    trainer.model.para_em.ln_spread += 1.5
    trainer.ema.shadow["para_em.ln_spread"] += 1.5
    before = cost(trainer.validate(crop=64))
    trainer.fit()
    assert cost(trainer.validate(crop=64)) < 0.95 * before
    with (trainer.run / "log.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, 31))


@pytest.fixture(scope="module")
def single(scenes_folder, tmp_path_factory):
    """Checkpoint of a short first stage."""
    run = str(tmp_path_factory.mktemp("single"))
    return train(TrainConfig(str(scenes_folder), run, "tiny", steps=2, batch=2, crop=64, threads=1), progress=False)


def changed_by(config: TrainConfig) -> set[str]:
    """Names of what a run moved."""
    before = torch.load(config.start_from, weights_only=True)["ema"]
    after = weights(train(config, progress=False))
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def test_joint_stage_trains_the_fusions_and_leaves_every_bit_and_lone_view_alone(config, single):
    joint = replace(config, stage="joint", start_from=str(single), crop_width=128, parallax=0.3)
    changed = changed_by(joint)
    assert all(name.startswith("para_jd.fusions.") for name in changed)
    assert "para_jd.fusions.0.fusion.gain" in changed
    assert any("column_skm" in name for name in changed)
    with (Path(joint.run_dir) / "log.csv").open(newline="") as file:
        guided = [float(row["parallax"]) for row in csv.DictReader(file)]
    assert guided[0] > 0.3  # attention knows nothing yet
    assert guided[3:] == [0, 0, 0]  # the second half goes without


def test_joint_stage_may_train_the_synthesis_too_and_leaves_every_bit_alone(config, single):
    changed = changed_by(replace(config, stage="joint", start_from=str(single), synthesis=True))
    assert all(name.startswith("para_jd.") or name == "gain.log_inverse" for name in changed)
    assert any(name.startswith("para_jd.fine.") for name in changed)


def test_decoder_stage_trains_what_turns_integers_into_pictures_and_goes_on_as_if_not_stopped(config, single, tmp_path):
    run = replace(config, stage="decoder", start_from=str(single))
    changed = changed_by(run)
    synthesis = ("para_jd.coarse.", "para_jd.fine.", "gain.log_inverse")
    decoder = (*synthesis, "refinement.look.", "refinement.clean_out.", "cells.")
    assert {next(part for part in decoder if name.startswith(part)) for name in changed} == set(decoder)
    goes_on_as_if_not_stopped(run, weights(Path(run.run_dir) / "checkpoint.pt"), tmp_path)


def test_decoder_stage_sees_the_pictures_that_files_give(config, tiny_model_file):
    """To the precision of the levels, and drawn back into their cells from where a poor decoder left them."""
    trainer = Trainer(replace(config, stage="decoder", start_from=str(tiny_model_file)))
    model = load_model(tiny_model_file)
    for net in (trainer.model, model.net):
        torch.nn.init.constant_(net.refinement.clean_out.bias, 0.5)  # 8 of 255 too bright
    calm = smooth_picture(64, 128) // 2 + 64
    clipped = (3 * calm.astype(int) - 256).clip(0, 255).astype(np.uint8)
    for picture, quality in product((calm, clipped), (15, 90)):
        (decoded,) = decode_set(model, [encode_image(model, Image(picture), quality, camera_id="a")])
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, None].float() / 255
        t = torch.tensor([[quality / 100]])

        def apart(constrain: bool, decoded=decoded.pixels, pixels=pixels, t=t) -> float:
            with torch.no_grad():
                seen = trainer.model(pixels, t, **trainer.way | {"constrain": constrain}).pictures[0, 0]
            return float(np.abs(255 * seen.permute(1, 2, 0).numpy() - decoded).mean())

        assert trainer.way["constrain"]
        assert apart(True) < 1  # rounding to levels alone is 0.25
        assert apart(False) > 2


def test_quantise_stage_rounds_what_it_trains_and_goes_on_as_if_not_stopped(config, single, tmp_path):
    run = replace(config, stage="quantise", start_from=str(single))
    changed = changed_by(run)
    assert changed
    assert all(name.startswith(("h_s.", "para_em.")) for name in changed)
    goes_on_as_if_not_stopped(run, weights(Path(run.run_dir) / "checkpoint.pt"), tmp_path)


def test_quantise_stage_is_exported_with_the_grids_it_was_trained_on(config, single, tmp_path):
    checkpoint = train(replace(config, stage="quantise", start_from=str(single)), progress=False)
    state = torch.load(checkpoint, weights_only=True)
    export_checkpoint(checkpoint, tmp_path / "rounded.safetensors")
    layer = load_model(tmp_path / "rounded.safetensors").net.h_s.conv3
    limit, shift, bits = (
        state["calibration"][f"h_s.conv3.{name}"] for name in ("input_limit", "input_shift", "fraction_bits")
    )
    assert layer.integers.input_limit == limit.item() < ACTIVATION_LIMIT
    assert (layer.integers.input_shift == shift.numpy()).all()
    step = 2.0 ** -(shift[:, None, None] + bits[:, None, None, None]).float()
    assert ((layer.weight - state["ema"]["h_s.conv3.weight"]).abs() <= step / 2 + 1e-6).all()


def test_a_released_model_file_is_a_start(config, tiny_model_file, tiny_model):
    trainer = Trainer(replace(config, start_from=str(tiny_model_file)), progress=False)
    assert trainer.step == 0
    assert torch.equal(trainer.model.g_a.klt.weight, tiny_model.net.g_a.klt.weight)


def test_a_start_of_another_profile_is_refused(config, tiny_model_file):
    with pytest.raises(UsageError, match=r"tiny.safetensors: is of profile tiny, not paper; say --profile tiny"):
        Trainer(replace(config, profile="paper", start_from=str(tiny_model_file)), progress=False)
    with pytest.raises(UsageError, match="say --profile tiny"):
        train(
            TrainConfig(
                data=config.data,
                run_dir=config.run_dir,
                profile="fast",
                stage="refine",
                start_from=str(tiny_model_file),
            )
        )


def test_joint_stage_mixes_lone_views_and_sets(config):
    trainer = Trainer(replace(config, stage="joint", synthesis=True), progress=False)
    assert {trainer.batches.views_at(step) for step in range(60)} == {1, 2}


def test_validation_reports_every_quality(config, scenes_folder):
    trainer = Trainer(replace(config, validation=str(scenes_folder)), progress=False)
    rows = trainer.validate(crop=64)
    assert [row["quality"] for row in rows] == [0, 0.25, 0.5, 0.75, 1]
    assert rows[0]["bpp"] < rows[-1]["bpp"]
    assert rows[0]["psnr_separate"] < rows[-1]["psnr_separate"]
    assert "psnr_joint" not in rows[0]  # nothing that this stage learns or measures
    joint = Trainer(replace(config, stage="joint", validation=str(scenes_folder)), progress=False)
    assert all(row["psnr_joint"] > 0 for row in joint.validate(crop=64))


def test_rate_warms_up_and_decays(config):
    rates = [learning_rate(replace(config, steps=100, warmup=10), step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3)
    assert rates[-1] < 3e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "both"}, "none of single, decoder, refine, cells, joint, quantise"),
        ({"stage": "quantise"}, "stage quantise needs a checkpoint or model file"),
        ({"stage": "decoder"}, "stage decoder needs a checkpoint or model file"),
        ({"stage": "decoder", "parallax": 0.3}, "--parallax is nothing that stage decoder knows"),
        ({"synthesis": True}, "--synthesis is nothing that stage single knows"),
        ({"stage": "quantise", "max_views": 2}, "--max-views is nothing that stage quantise knows"),
        ({"optimizer": "sgd"}, "none of adamw, muon"),
        ({"distortion": "vmaf"}, "none of mse, ms-ssim"),
        ({"distortion": "ms-ssim"}, "at least 161 pixels a side, not 64"),
        ({"distortion": "ms-ssim", "crop": 192, "crop_width": 64}, "at least 161 pixels a side, not 64"),
        ({"crop": 256}, "no picture is as large as the crops, 256x256"),
        ({"compile": True}, "torch.compile is for CUDA"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, message):
    with pytest.raises(UsageError, match=message):
        Trainer(replace(config, **settings), progress=False)
    assert not Path(config.run_dir).exists()


def test_stages_that_have_nothing_to_go_on_are_refused(config, single):
    alone = Path(config.run_dir) / "alone" / "scene"
    alone.mkdir(parents=True)
    shutil.copy(Path(config.data) / "scene0" / "view0.png", alone)
    with pytest.raises(UsageError, match="no scene has two views of at least 128x64"):
        Trainer(replace(config, stage="joint", crop_width=128, data=str(alone.parent)), progress=False)
    with pytest.raises(UsageError, match="was trained with --stage single, not quantise"):
        Trainer(replace(config, stage="quantise", run_dir=str(single.parent)), progress=False)


def test_validation_on_the_training_data_is_refused(config):
    with pytest.raises(UsageError, match="is also a training picture"):
        train(replace(config, validation=config.data), progress=False)


def test_a_run_within_its_pictures_is_refused(config):
    with pytest.raises(UsageError, match="lies within"):
        train(replace(config, run_dir=f"{config.data}/run"), progress=False)


def test_a_run_of_another_kind_is_not_resumed(config, single, tmp_path):
    for settings in (
        {"stage": "joint"},
        {"stage": "refine", "crop": 256},
        {"optimizer": "muon"},
        {"profile": "fast"},
    ):
        (name, value), *_ = settings.items()
        with pytest.raises(UsageError, match=f"was trained with --{name} .*, not {value}"):
            train(replace(config, run_dir=str(single.parent), data=str(tmp_path / "none"), **settings), progress=False)


def test_what_is_no_checkpoint_is_no_start(config, single, tmp_path):
    torch.save({"step": 1}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(single.read_bytes()[:1000])
    other = torch.load(single, weights_only=True)
    torch.save({**other, "ema": {}}, tmp_path / "empty.pt")
    for name in ("foreign.pt", "text.pt", "cut.pt", "empty.pt"):
        with pytest.raises(ModelError, match=rf"{name}.* (is not a checkpoint|do not fit)"):
            train(replace(config, start_from=str(tmp_path / name)), progress=False)


def test_a_run_whose_gradients_are_never_finite_ends_and_keeps_its_weights(config, monkeypatch):
    monkeypatch.setattr(optimizers, "LOST", 3)
    trainer = Trainer(config, progress=False)
    trainer.train_step()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.gain.log_gain.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(MvcodecError, match="gradients of 3 steps in a row"):
        trainer.fit()
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.run / "checkpoint.pt").items())


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(tmp_path):
    file = tmp_path / "checkpoint.pt"
    save_whole({"step": 1}, file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises((MvcodecError, OSError)) as caught:
            save_whole({"weights": torch.zeros(1 << 18)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(file) in str(caught.value)
    assert torch.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_stages_that_move_no_bit_hand_on_where_the_bits_come_from(config, single, tiny_model_file, tmp_path):
    """From a model file by joint and decoder, from stage quantise by joint: the id of the first stays."""
    joint = replace(config, stage="joint", steps=1, start_from=str(tiny_model_file))
    again = replace(
        joint, stage="decoder", run_dir=str(tmp_path / "again"), start_from=str(train(joint, progress=False))
    )
    identity = load_model(tiny_model_file).id
    assert export_checkpoint(train(again, progress=False), tmp_path / "a.safetensors", Path(config.data)) == identity
    quantise = replace(config, stage="quantise", steps=1, run_dir=str(tmp_path / "q"), start_from=str(single))
    rounded = train(quantise, progress=False)
    fused = train(replace(joint, run_dir=str(tmp_path / "j"), start_from=str(rounded)), progress=False)
    ids = [export_checkpoint(file, tmp_path / "b.safetensors") for file in (rounded, fused)]
    assert ids[0] == ids[1]


def test_validation_that_was_interrupted_is_made_up_for_and_told_once(config, scenes_folder, tmp_path, capsys):
    """The last step is validated, too, whatever --validate-every says."""
    run = replace(config, steps=3, validation=str(scenes_folder), validate_every=2)
    trainer = Trainer(run, progress=False, quiet=True)
    trainer.validate = lambda: [{"step": trainer.step, "quality": 0.0, "bpp": 1.0, "psnr_joint": 30.0}]
    trainer.fit()
    file = trainer.run / "validation.csv"
    assert columns(file)["step"] == [2, 3]
    assert not capsys.readouterr().out
    append_rows(file, [{"step": 2, "quality": 0.5, "bpp": 1.0, "psnr_joint": 30.0}])  # as if gone on from before
    assert columns(file)["step"] == [2]
    trainer.fit()  # ended at step 3, whose rows are gone
    assert columns(file)["step"] == [2, 3]


def test_a_checkpoint_of_before_is_gone_on_from(config):
    """What ran before there were jitter, synthetic views or workers resumes."""
    trainer = Trainer(config, progress=False)
    trainer.train_step()
    trainer.save()
    file = trainer.run / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    for name in ("distortion", "jitter", "synthetic", "optimizer", "workers", "compile"):
        del state["train_config"][name]
    torch.save(state, file)
    assert Trainer(config, progress=False).step == 1


def test_curves_are_drawn_from_the_logs(tmp_path):
    draw(tmp_path)
    assert not list(tmp_path.iterdir())
    append_rows(tmp_path / "log.csv", [{"step": step, "loss": 1 / step} for step in range(1, 120)])
    draw(tmp_path)
    before = (tmp_path / "curves.png").read_bytes()
    row = {"step": 100, "bpp": 0.5, "psnr_joint": 30.0}
    append_rows(tmp_path / "validation.csv", [{**row, "quality": q, "bpp": q + 0.1} for q in (0, 1)])
    draw(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() != before


def test_a_log_may_lose_and_gain_columns_and_be_cut(tmp_path):
    log = tmp_path / "log.csv"
    log.touch()
    append_rows(log, [{"step": 1, "loss": 2.0, "parallax": 0.5}, {"step": 2, "loss": 2.0, "parallax": 0.5}])
    append_rows(log, [{"step": 2, "loss": 1.0}])
    assert columns(log)["loss"] == [2, 1]
    with log.open("a") as file:
        file.write("3,0.")
    append_rows(log, [{"step": 3, "loss": 1.0}])
    assert columns(log)["step"] == [1, 2, 3]
    log.write_text("something else\n1\n")
    draw_if_possible(tmp_path)
