"""Muon: orthogonal steps of AdamW's size, on hidden convolutions alone. What learns goes on where it was ended."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvcodec.errors import MvcodecError, UsageError
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.training.config import TrainConfig
from mvcodec.training.loop import Trainer, train
from mvcodec.training.optimizers import (
    ADAM_SIZE,
    KLT_RATE,
    LOST,
    FiniteSteps,
    Muon,
    fit,
    optimizers_for,
    orthogonalised,
    take_up,
)


@pytest.mark.parametrize("shape", [(20, 90), (90, 20), (30, 30)])
def test_singular_values_become_alike(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.logspace(-1.5, 0, shape[1]))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalised(matrix) / values.mean(), u @ v, rtol=0, atol=0.15)


def test_steps_have_the_size_of_adamws():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = 1e-3 * torch.randn(weight.shape)
    Muon([{"params": [weight]}], lr=1e-2).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(1e-2 * ADAM_SIZE, rel=0.2)


def test_every_parameter_has_one_optimizer_and_its_rate():
    model = ParaHydra(config_for("tiny"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = optimizers_for(model, "muon")
    of = {
        kind: {names[p]: group["factor"] for group in optimizer.param_groups for p in group["params"]}
        for kind, optimizer in found.items()
    }
    assert of["optimizer"].keys() | of["muon"].keys() == set(names.values())
    assert not of["optimizer"].keys() & of["muon"].keys()
    assert of["optimizer"]["g_a.klt.weight"] == KLT_RATE
    assert "para_jd.fine.stage8.blocks.0.conv1.weight" in of["muon"]
    assert all(name.endswith(".weight") and model.get_parameter(name).ndim == 4 for name in of["muon"])
    assert list(optimizers_for(model, "adamw")) == ["optimizer"]


def test_moments_of_weights_that_lay_otherwise_are_still_theirs():
    """A run may begin on a processor with channels last and go on where the other order is faster."""
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 6, 3, 3), torch.randn(4, 8, 6, 3, 3)

    def begun(order: torch.memory_format) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        layer = nn.Conv2d(6, 8, 3, bias=False)
        layer.weight.data.copy_(start)
        layer.to(memory_format=order)
        return layer.weight, optimizers_for(layer, "adamw")["optimizer"]

    def stepped(weight: nn.Parameter, optimizer: torch.optim.Optimizer, some: Tensor) -> Tensor:
        for gradient in some:
            weight.grad = torch.empty_like(weight).copy_(gradient)
            optimizer.step()
        return weight.detach().clone()

    for group in (kept := begun(torch.channels_last))[1].param_groups:
        group["lr"] = 0.01
    middle = stepped(*kept, gradients[:2])
    weight, optimizer = begun(torch.contiguous_format)
    weight.data.copy_(middle)
    take_up(optimizer, deepcopy(kept[1].state_dict()))
    torch.testing.assert_close(stepped(weight, optimizer, gradients[2:]), stepped(*kept, gradients[2:]))


def test_muon_resumes_as_if_it_had_not_stopped(scenes_folder, tiny_model_file, tmp_path):
    config = TrainConfig(
        data=str(scenes_folder),
        run_dir=str(tmp_path / "whole"),
        profile="tiny",
        optimizer="muon",
        steps=4,
        batch=1,
        crop=64,
        warmup=1,
        threads=1,
        start_from=str(tiny_model_file),
    )
    whole = torch.load(train(config, progress=False), weights_only=True)["model"]
    parted = replace(config, run_dir=str(tmp_path / "parted"))
    train(replace(parted, minutes=1e-9), progress=False)  # stops after a step
    resumed = torch.load(train(parted, progress=False), weights_only=True)
    assert resumed["step"] == 4
    assert all(torch.equal(resumed["model"][name], value) for name, value in whole.items())
    with pytest.raises(UsageError, match="was trained with --optimizer muon, not adamw"):
        Trainer(replace(parted, optimizer="adamw"), progress=False)


def test_steps_without_finite_gradients_are_left_out_until_they_are_too_many():
    finite = FiniteSteps()
    assert [finite.takes(norm) for norm in (1.0, float("nan"), float("inf"), 2.0)] == [True, False, False, True]
    for _ in range(LOST - 1):
        assert not finite.takes(float("nan"))
    with pytest.raises(MvcodecError, match="not finite"):
        finite.takes(float("nan"))


def test_a_fit_that_was_interrupted_goes_on_and_with_other_settings_begins_anew(tmp_path):
    def fitted(steps: int, kept: Path | None = None, last: int = -1) -> tuple[list[float], Tensor]:
        torch.manual_seed(0)
        network, taken = nn.Linear(3, 1), []

        def draw(rng: np.random.Generator) -> Iterator[Tensor]:
            yield (network(torch.from_numpy(rng.normal(size=(4, 3))).float()) - 1).square().mean()

        def made() -> None:
            taken.append(1)
            if len(taken) == last:
                raise KeyboardInterrupt

        losses = fit(network, draw, steps, 1e-2, 0.1, 3, "", False, kept, made)
        return losses, network.weight.detach()

    kept = tmp_path / "learning.pt"
    for last in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            fitted(6, kept, last)
    (losses, weight), (wanted, whole) = fitted(6, kept), fitted(6)
    assert losses == wanted
    assert torch.equal(weight, whole)
    assert fitted(5, kept)[0] == fitted(5)[0]
