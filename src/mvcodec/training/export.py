"""A checkpoint's averaged weights -> a model file that `mvcodec --model` takes."""

from __future__ import annotations

from pathlib import Path

import torch

from mvcodec.parahydra import ModelConfig, ParaHydra
from mvcodec.weights import export_model

ABOUT = ("stage", "batch", "crop", "seed")  # what of the run's settings the model file tells


def export_checkpoint(checkpoint: Path, target: Path) -> bytes:
    """Write the model file, whole or not at all; returns the model id."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    net = ParaHydra(ModelConfig.from_dict(state["model_config"]))
    net.load_state_dict(state["ema"])
    about = {name: str(state["train_config"][name]) for name in ABOUT}
    return export_model(net, target, {"steps": str(state["step"]), **about})
