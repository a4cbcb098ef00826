"""What a run leaves behind and what it can begin from: averaged weights, whole files."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvcodec.files import atomic
from mvcodec.parahydra import ModelConfig
from mvcodec.weights import load_model


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the `with` Ctrl-C waits: what belongs together, as weights and the step they are of, changes together."""
    if threading.current_thread() is not threading.main_thread():  # others are never interrupted, and may not ask
        yield
        return
    came = False

    def wait(*_: object) -> None:
        nonlocal came
        came = True

    handler = signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


class Ema:
    """Exponential moving average of the weights, with a short memory at the start."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in model.state_dict().items():
            self.shadow[name].lerp_(value, 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights, inside the `with`."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        try:
            model.load_state_dict(self.shadow)
            yield
        finally:
            with uninterrupted():
                model.load_state_dict(own)


def save_whole(value: Any, path: Path) -> None:
    """torch.save, whole or not at all."""
    with atomic(path) as file:
        torch.save(value, file)


def starting_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights to begin from: a run's checkpoint (its averages) or a released model file."""
    if path.suffix == ".safetensors":
        net = load_model(path).net
        return net.config, net.state_dict()
    state = torch.load(path, map_location="cpu", weights_only=True)
    return ModelConfig.from_dict(state["model_config"]), state["ema"]
