"""What moves the weights, and how fast: AdamW, or Muon on the hidden convolutions and AdamW on the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of a weight matrix is replaced by
the nearest orthogonal matrix, so that every direction of it moves, not only the few with large gradients. Scaled to the
size of AdamW's steps (Liu et al. 2025, arXiv 2502.16982), so that both go by one learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from mvcodec.errors import MvcodecError
from mvcodec.training.checkpoint import save_whole, uninterrupted

OPTIMIZERS = ("adamw", "muon")
KLT_RATE = 0.02  # learning rate of the KLT layers, of that of the entropy model
CELLS_RATE = 100.0  # of the three numbers of each channel that draw back into cells
TRANSFORM_RATE = 0.8  # of the residual blocks around them; BRANCH_GAIN already calms these
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al.'s quintic: singular values into about 0.7..1.2 in five steps
ADAM_SIZE = 0.2  # root mean square of AdamW's steps
RATES = {".klt.": KLT_RATE, ".stage": TRANSFORM_RATE, "cells.": CELLS_RATE}  # by what a name has in it
LOST = 50  # steps in a row whose gradients are not finite, after which a run gives up
# Not hidden: layers between pixels, symbols or distribution parameters and the features.
EDGES = (".klt.", ".enter.", ".leave.", ".last.", ".out.", "clean_out.", "look.0.", "h_a.conv1.", "z_prior.")


def optimizers_for(model: nn.Module, kind: str) -> dict[str, Optimizer]:
    """Optimizers of the parameters that this stage trains, by the name of their state in a checkpoint.

    Each group has a `factor` of the learning rate: the transforms start near an optimum and move slower than the
    entropy model, the KLT layers slowest. A weight behind 768 pixels of one sign moves an output by hundreds of steps.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((rate for part, rate in RATES.items() if part in name), 1.0)
            groups.setdefault((kind == "muon" and is_hidden(name, parameter), factor), []).append(parameter)

    def of(muon: bool) -> list[dict[str, Any]]:
        return [{"params": groups[key], "factor": key[1]} for key in sorted(groups) if key[0] == muon]

    found: dict[str, Optimizer] = {"optimizer": AdamW(of(False), betas=(0.9, 0.99), weight_decay=0.0, fused=True)}
    if of(True):
        found["muon"] = Muon(of(True))
    return found


def take_up(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load its state, laid out as the weights are here: a fused step pairs numbers by where they lie, and a run may
    have begun on a processor that has another order (layout.py)."""
    optimizer.load_state_dict(state)
    for parameter, held in optimizer.state.items():
        for name, value in held.items():
            if value.shape == parameter.shape:
                held[name] = torch.empty_like(parameter).copy_(value)


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a dense convolution's weight between features."""
    return parameter.ndim == 4 and parameter.shape[1] > 1 and not any(edge in name for edge in EDGES)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised. For convolution weights [out, in, h, w], taken as [out, in h w]."""

    def __init__(self, groups: list[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(state["momentum"], group["momentum"]).flatten(1))
                size = ADAM_SIZE * max(update.shape) ** 0.5
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)


def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of matrix = U S V^T [m, n], by Newton-Schulz.

    The iteration X <- (a + b X X^T + c (X X^T)^2) X runs on X X^T alone: half the work where m << n.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalised(matrix.T, steps).T
    a, b, c = NEWTON_SCHULZ
    x = matrix / (matrix.norm() + 1e-7)
    gram, product = x @ x.T, torch.eye(len(x), device=x.device)
    for _ in range(steps):
        factor = b * gram + c * gram @ gram
        factor.diagonal().add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    return product @ x


class FiniteSteps:
    """Which steps are taken: those with finite gradients. One that is not may be a rare crop; many are a defect."""

    def __init__(self) -> None:
        self.lost = 0

    def takes(self, norm: float) -> bool:
        """Whether gradients of this norm move the weights. MvcodecError after `LOST` in a row that do not."""
        self.lost = 0 if math.isfinite(norm) else self.lost + 1
        if self.lost >= LOST:
            raise MvcodecError(f"the gradients of {LOST} steps in a row are not finite; the weights stay as they were")
        return not self.lost


def fit(
    network: nn.Module,
    draw: Callable[[np.random.Generator], Iterable[Tensor]],
    steps: int,
    rate: float,
    warm_up: float,
    seed: int,
    title: str,
    progress: bool,
    kept: Path | None = None,
    made: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train a small network in place -> the loss of each step, the sum of the parts that `draw` gives for it.

    Each part is gone back through before the next is drawn. rate: at its peak, after a share `warm_up` of the steps.
    kept: where what interrupts this, `made` after any step for one, leaves it to go on from as if nothing had happened.
    """
    optimizer = AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=warm_up)
    parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule}
    finite, losses = FiniteSteps(), list[float]()
    settings = [steps, rate, warm_up, seed]
    state = torch.load(kept, weights_only=True) if kept is not None and kept.exists() else {}
    if state.get("settings") == settings:  # with others it begins anew
        losses += state["losses"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    try:
        for step in tqdm(range(len(losses), steps), desc=title, disable=not progress, leave=False):
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for loss in draw(np.random.default_rng((seed, step))):
                loss.backward()
                total += loss.item()
            takes = finite.takes(nn.utils.clip_grad_norm_(network.parameters(), 1.0).item())
            with uninterrupted():
                if takes:
                    optimizer.step()
                schedule.step()
                losses.append(total)
            made()
    except BaseException:
        if kept is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_whole({"settings": settings, "losses": losses, **states}, kept)
        raise
    return losses
