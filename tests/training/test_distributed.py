"""Two processes that share each batch compute what one process computes, and resume as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mvcodec.errors import UsageError
from mvcodec.training.config import TrainConfig
from mvcodec.training.loop import Trainer, train
from mvcodec.training.sampling import Part

# In float32: bfloat16 gradients are rounded before they are averaged.
PROGRAM = """
import json, sys, torch
from contextlib import nullcontext
from mvcodec.training.config import TrainConfig
from mvcodec.training.loop import Trainer, train
Trainer.autocast = lambda self: nullcontext()
*both, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for settings in both:
    stage = settings["stage"]
    trainer = Trainer(TrainConfig(**settings | {"run_dir": f"{folder}/{stage}"}), progress=False)
    row = trainer.train_step()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    if trainer.processes.first:
        torch.save({"loss": row["loss"], "gradients": gradients}, f"{folder}/{stage}.pt")
trainer.fit()  # single to its end, uninterrupted
parted = TrainConfig(**settings | {"run_dir": f"{folder}/parted", "minutes": 1e-9})
Trainer(parted, progress=False).fit()  # stops after a step
train(parted, progress=False)
"""


@pytest.fixture(scope="module")
def configs(scenes_folder: Path, tiny_model_file: Path) -> dict[str, TrainConfig]:
    # The odd batch gives the processes unequal parts; in the joint stage, one set of two views, one gets none.
    single = TrainConfig(
        data=str(scenes_folder),
        run_dir="",
        profile="tiny",
        start_from=str(tiny_model_file),
        steps=2,
        batch=3,
        crop=64,
        warmup=1,
        clip=1e9,
        seed=2,
        threads=1,
    )
    # The synthesis, or else, gains being zero, hardly anything had a gradient.
    return {"joint": replace(single, stage="joint", max_views=2, parallax=0.5, synthesis=True), "single": single}


@pytest.fixture(scope="module")
def folder(configs: dict[str, TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: gradients of a step of either stage, a whole run and an interrupted one."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join(sys.path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *(json.dumps(asdict(c)) for c in configs.values()), str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@pytest.mark.parametrize("stage", ["single", "joint"])
def test_gradients_are_those_of_one_process(configs, folder, stage, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "autocast", lambda self: nullcontext())
    trainer = Trainer(replace(configs[stage], run_dir=str(tmp_path)), progress=False)
    row = trainer.train_step()
    assert row["views"] == {"single": 1, "joint": 2}[stage]
    two = torch.load(folder / f"{stage}.pt", weights_only=True)
    assert two["loss"] == pytest.approx(row["loss"], rel=1e-5)
    seen = 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            torch.testing.assert_close(two["gradients"][name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
            seen += 1
    assert seen > 10


def test_a_resumed_run_of_two_equals_the_uninterrupted_one(folder):
    whole, parted = (torch.load(folder / name / "checkpoint.pt", weights_only=True) for name in ("single", "parted"))
    assert whole["step"] == parted["step"] == 2
    assert all(torch.equal(value, parted["model"][name]) for name, value in whole["model"].items())
    assert (folder / "parted" / "log.csv").read_text().count("\n") == 3  # one process writes


def test_a_batch_is_parted_without_gap_or_overlap():
    for whole in range(1, 9):
        for world in range(1, 5):
            parts = [Part.of(whole, rank, world) for rank in range(world)]
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(whole))
            assert sum(part.share for part in parts) == pytest.approx(1)
            assert all(len(part.indices) for part in parts)  # DDP needs a forward pass from everyone


def test_refinement_is_refused_under_torchrun(configs, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="runs in one process"):
        train(replace(configs["single"], stage="refine", run_dir=str(tmp_path)), progress=False)
