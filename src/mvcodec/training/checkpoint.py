"""What a run leaves behind and what it can begin from: averaged weights, whole files."""

from __future__ import annotations

import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.errors import ModelError, MvcodecError, UsageError
from mvcodec.files import atomic
from mvcodec.parahydra import ModelConfig
from mvcodec.training.config import TrainConfig
from mvcodec.weights import load_model, read_entropy_path


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
    """torch.save, whole or not at all; MvcodecError where the disk has no room."""
    with atomic(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch forgets the OSError it met
            raise MvcodecError(
                f"{path}: cannot be written; is the disk full? ({str(error).splitlines()[0]})"
            ) from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As a safetensors file, whole or not at all."""
    with atomic(path) as file:
        file.write(to_safetensors({name: x.contiguous() for name, x in tensors.items()}))


def each_made_once(
    folder: Path,
    count: int,
    seed: int,
    make: Callable[[int, np.random.Generator], Mapping[str, Tensor] | None],
    title: str,
    progress: bool,
    made: Callable[[], None],
) -> list[Path]:
    """Files of what `make` gives for 0 .. count - 1, each from a generator of its own; those that exist are kept.

    made: called after each. One of which nothing comes leaves an empty file, so that it is not made again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for n in tqdm(range(count), desc=title, disable=not progress, leave=False):
        file = folder / f"{n}.safetensors"
        if not file.exists():
            found = make(n, np.random.default_rng((seed, n)))
            if found:
                save_tensors(found, file)
            else:
                file.touch()
            made()
        if file.stat().st_size:
            files.append(file)
    return files


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a run wrote, with the defaults of settings that it is older than; ModelError if it is something else."""
    try:
        # torch.save writes a zip file; of anything else torch.load makes errors of many kinds.
        state = torch.load(checkpoint, map_location="cpu", weights_only=True) if is_zipfile(checkpoint) else None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"{checkpoint} is not a readable checkpoint: {error}") from error
    if not isinstance(state, dict) or not {"ema", "step", "model_config", "train_config"} <= state.keys():
        raise ModelError(f"{checkpoint} is not a checkpoint of mvcodec train")
    try:
        ModelConfig.from_dict(state["model_config"])
        defaults = {setting.name: setting.default for setting in fields(TrainConfig) if setting.default is not MISSING}
        state["train_config"] = defaults | state["train_config"]
    except (TypeError, ValueError) as error:
        raise ModelError(f"{checkpoint} has no valid configuration: {error}") from error
    return state


def to_resume(config: TrainConfig) -> dict[str, Any] | None:
    """The checkpoint in the run's folder, if there is one; UsageError if it is of a run of another kind."""
    checkpoint = Path(config.run_dir) / "checkpoint.pt"
    if not checkpoint.exists():
        return None
    state = read_checkpoint(checkpoint)
    for name in ("stage", "optimizer", "profile"):
        now, then = getattr(config, name), state["train_config"][name]
        if now != then:
            raise UsageError(f"{checkpoint}: was trained with --{name} {then}, not {now}; resume with that")
    return state


class Start(NamedTuple):
    """What a run begins from."""

    config: ModelConfig
    weights: dict[str, Tensor]
    bits: dict[str, dict[str, Tensor]]  # see `bits_of`
    distortion: str  # that they were trained for


def starting_weights(path: Path) -> Start:
    """Of a run's checkpoint (its averages) or a released model file; ModelError if it is neither."""
    if path.suffix == ".safetensors":
        model = load_model(path)
        config, bits = model.net.config, {"entropy": read_entropy_path(path, model.net.config)}
        return Start(config, model.net.state_dict(), bits, model.about.get("distortion", TrainConfig.distortion))
    state = read_checkpoint(path)
    config, distortion = ModelConfig.from_dict(state["model_config"]), state["train_config"]["distortion"]
    return Start(config, state["ema"], bits_of(state), distortion)


def start_of(config: TrainConfig) -> Start:
    """`starting_weights` of what a run is to begin from; UsageError if that is of another profile."""
    start = starting_weights(Path(config.start_from))
    if (found := start.config.profile) != config.profile:
        raise UsageError(f"{config.start_from}: is of profile {found}, not {config.profile}; say --profile {found}")
    return start


def bits_of(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """What fixes the integers that this checkpoint's files consist of: stages that move no bit hand it on.

    `entropy`: the entropy path of the model file that it all began with; `calibration`: that of stage quantise.
    Nothing where integers are first made at export.
    """
    return {name: state[name] for name in ("entropy", "calibration") if name in state}


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """ModelError where those of `path` do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: weights do not fit their configuration: {str(error).splitlines()[0]}") from error
