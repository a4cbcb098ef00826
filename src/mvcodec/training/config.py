"""What one training run is: its settings, and the TOML files that give them (`configs/`, `mvcodec train --config`)."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvcodec.errors import UsageError
from mvcodec.files import shipped

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


STAGES = ("single", "decoder", "refine", "cells", "joint", "quantise")
LOOP = tuple(stage for stage in STAGES if stage not in ("refine", "cells"))  # those of loop.py
LATER = ("decoder", "refine", "cells", "quantise")  # that make no sense from nothing
KNOWN_TO = {  # settings that not every stage knows
    **dict.fromkeys(
        ("validation", "validate_every", "compile", "optimizer", "workers", "crop", "crop_width", "jitter"), LOOP
    ),
    **dict.fromkeys(("max_views", "synthetic", "parallax", "synthesis"), ("joint",)),
}


@dataclass(frozen=True)
class TrainConfig:
    """One run. `steps` is where the cosine ends; a run may be stopped and resumed anywhere before."""

    data: str
    run_dir: str
    profile: str = "fast"
    stage: str = "single"  # of STAGES
    steps: int = 4000
    batch: int = 8  # views per step, over all processes
    crop: int = 256
    crop_width: int = 0  # 0: as `crop`; attention learns no parallax beyond the crop, and most of it is sideways
    max_views: int = 6  # of stage joint
    parallax: float = 0.0  # weight of `ParallaxSupervision`, to begin with: how far attention is off (stage joint)
    synthesis: bool = False  # stage joint trains the synthesis too: then lone views, too, decode differently
    distortion: str = "mse"  # mse | ms-ssim
    jitter: float = 0.0  # share of the views that get another camera's colours and exposure
    synthetic: float = 0.0  # share of the sets whose views are made from one picture (stage joint)
    optimizer: str = "adamw"  # adamw | muon
    learning_rate: float = 5e-4
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 1
    device: str = "cpu"
    threads: int = 0  # 0: torch's default
    workers: int = 0  # processes that cut crops ahead; 0: none
    compile: bool = False  # torch.compile; CUDA only
    start_from: str = ""  # checkpoint or model file whose weights begin this run (another stage's, say)
    validation: str = ""  # folder of scenes; empty: no validation
    validate_every: int = 500
    checkpoint_minutes: float = 3.0
    minutes: float = 0.0  # stop (resumable) after so many; 0: run to the last step


def check_settings(config: TrainConfig) -> None:
    """UsageError for a stage that there is not, settings that this one does not know, or nothing to start from."""
    if config.stage not in STAGES:
        raise UsageError(f"stage {config.stage!r} is none of {', '.join(STAGES)}")
    for name, stages in KNOWN_TO.items():
        if config.stage not in stages and getattr(config, name) != getattr(TrainConfig, name):
            option = name.replace("_", "-")
            raise UsageError(f"--{option} is nothing that stage {config.stage} knows; leave it out")
    begun = config.start_from or (Path(config.run_dir) / "checkpoint.pt").exists()
    if config.stage in LATER and not begun:
        raise UsageError(f"stage {config.stage} needs a checkpoint or model file to start from")


def parallax_weight(config: TrainConfig, step: int) -> float:
    """Linear to nothing at half of the stage: attention is shown where to look, then looks where it pays."""
    return config.parallax * max(0.0, 1 - 2 * step / config.steps)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, of a short run no more than a tenth, then cosine to 2 % of the peak."""
    warmup = min(config.warmup, config.steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def read_config(name: str, known: Collection[str]) -> dict[str, Any]:
    """The settings in a TOML file, or in a shipped one by its name ("fast-single").

    Raises UsageError if there is no such file, it is no TOML, or a key is none of `known`.
    """
    shipped_file = shipped("configs") / f"{name}.toml"
    file = shipped_file if shipped_file.is_file() else Path(name)
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in shipped("configs").glob("*.toml")))
        raise UsageError(f"--config {name}: no such file, and none of {names}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: is not TOML: {error}") from error
    if unknown := [key for key in values if key not in known]:
        raise UsageError(f"{file}: unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return values
