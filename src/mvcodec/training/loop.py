"""The training loop: stages, EMA weights, checkpoints from which a run goes on as if never stopped.

Stage `single` trains everything on lone views (K = 1). Stage `joint` freezes the encoder and the entropy model, so
that no bit changes, and trains Para-JD on sets of overlapping views of random K, K = 1 included. Stage `refine`
(refinement.py) then trains the pixel-aligned refinement alone.
"""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.errors import UsageError
from mvcodec.nn.gain import rate_distortion_lambda
from mvcodec.parahydra import ModelConfig, ParaHydra, config_for
from mvcodec.training.data import CropSampler, centre_crops, load_scenes
from mvcodec.training.klt import block_covariance
from mvcodec.weights import read_model_file

KLT_RATE = 0.02  # learning rate of the KLT layers, of that of the entropy model
TRANSFORM_RATE = 0.8  # of the residual blocks around them; BRANCH_GAIN already calms these
VALIDATION_QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class TrainConfig:
    """One run. `steps` is where the cosine ends; a run may be stopped and resumed anywhere before."""

    data: str
    run_dir: str
    profile: str = "fast"
    stage: str = "single"  # single | joint | refine
    steps: int = 4000
    batch: int = 8
    crop: int = 256
    max_views: int = 3  # of stage joint; 1 trains the decoder on lone views and leaves the fusions alone
    learning_rate: float = 5e-4
    warmup: int = 200
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 1
    device: str = "cpu"
    threads: int = 0  # 0: torch's default
    start_from: str = ""  # checkpoint or model file whose weights begin this run (another stage's, say)
    validation: str = ""  # folder of scenes; empty: no validation
    validate_every: int = 500
    checkpoint_minutes: float = 3.0
    minutes: float = 0.0  # stop (resumable) after so many; 0: run to the last step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def sample_quality(step: int, seed: int, batch: int, views: int, device: torch.device) -> Tensor:
    """t [B, K] in [0, 1]: stratified over the batch; views of one scene differ."""
    rng = np.random.default_rng((seed, step, 1))
    strata = (rng.permutation(batch * views) + rng.random(batch * views)) / (batch * views)
    return torch.from_numpy(strata.reshape(batch, views)).float().to(device)


def loss_of(pictures: Tensor, decoded: Tensor, bits: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (6) per view, weighted by lambda^-1/4 so that no rate drowns the others. -> (loss, bpp, mse), means."""
    bpp = bits / (pictures.shape[-1] * pictures.shape[-2])
    mse = (decoded - pictures).square().mean(dim=(2, 3, 4))
    lam = rate_distortion_lambda(t)
    weight = (lam / rate_distortion_lambda(torch.full_like(t, 0.5))) ** -0.25
    return (weight * (bpp + lam * 255**2 * mse)).mean(), bpp.mean(), mse.mean()


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
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)


def save_whole(value: Any, path: Path) -> None:
    """torch.save to a temporary file, then rename: a checkpoint is there whole or not at all."""
    temporary = path.with_suffix(".partial")
    torch.save(value, temporary)
    temporary.replace(path)


def starting_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights to begin from: a run's checkpoint (its averages) or a released model file."""
    if path.suffix == ".safetensors":
        tensors, model_config, _ = read_model_file(path)
        return model_config, {name: x.float() for name, x in tensors.items() if not name.startswith("tables.")}
    state = torch.load(path, map_location="cpu", weights_only=True)
    return ModelConfig.from_dict(state["model_config"]), state["ema"]


class Trainer:
    """One run in one folder: checkpoint.pt, log.csv, validation.csv."""

    def __init__(self, config: TrainConfig, progress: bool = True) -> None:
        self.config, self.progress = config, progress
        if config.threads:
            torch.set_num_threads(config.threads)
        self.device = torch.device(config.device)
        self.run = Path(config.run_dir)
        self.run.mkdir(parents=True, exist_ok=True)
        self.scenes = load_scenes(Path(config.data), progress)
        self.validation = load_scenes(Path(config.validation), progress) if config.validation else []
        self.sampler = CropSampler(self.scenes, config.crop, config.seed)
        self.step = 0
        checkpoint = self.run / "checkpoint.pt"
        torch.manual_seed(config.seed)
        if checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
            self.model = ParaHydra(ModelConfig.from_dict(state["model_config"]))
        elif config.start_from:
            state = None
            model_config, weights = starting_weights(Path(config.start_from))
            self.model = ParaHydra(model_config)
            self.model.load_state_dict(weights)
        else:
            state = None
            self.model = ParaHydra(config_for(config.profile))
            if self.model.config.transform == "klt":
                self.model.start_as_klt(block_covariance(self.scenes))
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self._choose_parameters()
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.ema = Ema(self.model, config.ema)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.ema.shadow = {k: v.to(self.device) for k, v in state["ema"].items()}
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _choose_parameters(self) -> None:
        """Let gradients reach what this stage trains, and nothing else."""
        if self.config.stage == "joint":
            self.model.requires_grad_(False)
            self.model.para_jd.requires_grad_(True)
            self.model.para_jd.fusions.requires_grad_(self.fuse)
            self.model.gain.log_inverse.requires_grad_(True)
        elif self.config.stage == "single":
            self.model.para_jd.fusions.requires_grad_(False)  # gains are zero: nothing to learn alone
            if self.model.refinement is not None:
                self.model.refinement.requires_grad_(False)
                self.model.refinement.look.requires_grad_(True)  # the part that needs no peers
                self.model.refinement.clean_out.requires_grad_(True)
        else:
            raise UsageError(f"stage {self.config.stage!r} is none of single, joint, refine")

    def _groups(self) -> list[dict[str, Any]]:
        """The transforms start near an optimum: they move slower than the entropy model, the KLT layers slowest.

        A weight behind 768 pixels of one sign moves an output by hundreds of its own steps.
        """
        factors = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                klt, transform = ".klt." in name, ".stage" in name
                factors[parameter] = KLT_RATE if klt else TRANSFORM_RATE if transform else 1.0
        return [
            {"params": [p for p, f in factors.items() if f == factor], "factor": factor}
            for factor in sorted(set(factors.values()))
        ]

    @property
    def joint(self) -> bool:
        return self.config.stage == "joint"

    @property
    def fuse(self) -> bool:
        """Lone views alone say nothing about how to fuse several."""
        return self.joint and self.config.max_views > 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def views_at(self, step: int) -> int:
        if self.config.stage == "single":
            return 1
        rng = np.random.default_rng((self.config.seed, step, 2))
        return 1 if not self.fuse or rng.random() < 0.15 else int(rng.integers(2, self.config.max_views + 1))

    def train_step(self) -> dict[str, float]:
        """One update; depends on (seed, step) and the weights alone."""
        config, step = self.config, self.step
        torch.manual_seed(hash((config.seed, step)) & 0x7FFFFFFF)
        views = self.views_at(step)
        batch = max(1, config.batch // views)
        pictures = self.sampler.batch(step, batch, views).to(self.device)
        t = sample_quality(step, config.seed, batch, views, self.device)
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        with self.autocast():
            out = self.model(pictures, t, joint=self.joint, fuse=self.fuse, rate=not self.joint)
        loss, bpp, mse = loss_of(pictures, out.pictures, out.bits, t)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Clipped group by group: the KLT layers' large gradients must not shrink everyone else's.
        norms = [nn.utils.clip_grad_norm_(group["params"], config.clip) for group in self.optimizer.param_groups]
        norm = torch.stack(norms).max()
        if torch.isfinite(norm):
            self.optimizer.step()
        self.ema.update(self.model, step)
        self.step += 1
        return {
            "step": self.step,
            "views": views,
            "loss": loss.item(),
            "bpp": bpp.item(),
            "psnr": -10 * math.log10(max(mse.item(), 1e-12)),
            "norm": norm.item(),
            "lr": rate,
        }

    @torch.no_grad()
    def validate(self, crop: int = 256) -> list[dict[str, float | str]]:
        """Per quality: mean bpp (estimated) and mean PSNR of separate and joint decoding, with averaged weights."""
        rows: list[dict[str, float | str]] = []
        with self.ema.applied_to(self.model), self.autocast():
            for quality in VALIDATION_QUALITIES:
                bpps: list[float] = []
                alone: list[float] = []
                together: list[float] = []
                for _, crops in centre_crops(self.validation, crop):
                    pictures = crops.to(self.device)
                    t = torch.full(pictures.shape[:2], quality, device=self.device)
                    torch.manual_seed(0)
                    for joint, psnrs in ((False, alone), (True, together)):
                        if joint and not self.joint:
                            psnrs.extend(alone[-pictures.shape[1] :])
                            continue
                        out = self.model(pictures, t, joint, fuse=self.fuse)
                        mse = (out.pictures.clamp(0, 1) - pictures).square().mean(dim=(2, 3, 4))
                        psnrs.extend((-10 * torch.log10(mse)).flatten().tolist())
                    bpps.extend((out.bits / crops.shape[-1] ** 2).flatten().tolist())
                rows.append(
                    {
                        "step": self.step,
                        "quality": quality,
                        "bpp": float(np.mean(bpps)),
                        "psnr_separate": float(np.mean(alone)),
                        "psnr_joint": float(np.mean(together)),
                    }
                )
        return rows

    def save(self) -> None:
        save_whole(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.shadow,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "model_config": self.model.config.to_dict(),
                "train_config": asdict(self.config),
            },
            self.run / "checkpoint.pt",
        )

    def fit(self) -> None:
        """Train to the last step, or until `minutes` are over; checkpoint on the way and at the end."""
        started = saved = time.monotonic()
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not self.progress, unit="step")
        pending: list[dict[str, float]] = []
        try:
            while self.step < self.config.steps:
                pending.append(self.train_step())
                bar.update()
                last = pending[-1]
                bar.set_postfix(loss=f"{last['loss']:.3f}", bpp=f"{last['bpp']:.3f}", psnr=f"{last['psnr']:.2f}")
                if self.validation and self.step % self.config.validate_every == 0:
                    rows = self.validate()
                    append_rows(self.run / "validation.csv", rows)
                    bar.write("\n".join(format_validation(row) for row in rows))
                now = time.monotonic()
                if now - saved > 60 * self.config.checkpoint_minutes:
                    self.save()
                    append_rows(self.run / "log.csv", pending)
                    pending.clear()
                    saved = now
                if self.config.minutes and now - started > 60 * self.config.minutes:
                    break
        finally:
            self.save()
            append_rows(self.run / "log.csv", pending)
            bar.close()


def format_validation(row: dict[str, float | str]) -> str:
    return (
        f"step {row['step']:6d}  q {row['quality']:.2f}  {row['bpp']:.4f} bpp  "
        f"separate {row['psnr_separate']:.2f} dB  joint {row['psnr_joint']:.2f} dB"
    )


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV, writing its header first if it is new."""
    if not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Run `config`, resuming from its folder's checkpoint if there is one; returns the checkpoint's path."""
    if config.stage == "refine":
        from mvcodec.training.refinement import refine

        return refine(config, progress)
    trainer = Trainer(config, progress)
    trainer.fit()
    return trainer.run / "checkpoint.pt"
