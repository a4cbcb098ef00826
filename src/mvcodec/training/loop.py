"""The training loop: stages, EMA weights, checkpoints from which a run goes on as if never stopped.

Stage `single` trains everything on lone views (K = 1). Stage `quantise` (rounding.py) trains the entropy model with
rounded weights and activations. Stage `joint` freezes the encoder and the entropy model, so that no bit changes, and
trains Para-JD's fusions on sets of overlapping views of random K. Stage `decoder` freezes the same and trains the
synthesis and the cleaning, on lone views, together with the step back into the quantiser's cells. Stage `refine`
(refinement.py) trains the pixel-aligned refinement alone, stage `cells` (cells.py) what the step back into the cells
knows of each coefficient; neither runs in this loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.errors import UsageError
from mvcodec.evaluation.metrics import MS_SSIM_MIN_SIDE
from mvcodec.parahydra import ModelConfig, ParaHydra, TrainingOutput, config_for
from mvcodec.precision import autocast
from mvcodec.training.checkpoint import (
    Ema,
    bits_of,
    load_weights,
    save_whole,
    start_of,
    to_resume,
    uninterrupted,
)
from mvcodec.training.config import TrainConfig, check_settings, learning_rate, parallax_weight
from mvcodec.training.curves import append_rows, columns, draw_if_possible
from mvcodec.training.data import centre_crops, check_validation, load_scenes, refuse_overlap
from mvcodec.training.distributed import Processes, WholeBatchNoise, own_device
from mvcodec.training.klt import block_covariance
from mvcodec.training.layout import memory_format
from mvcodec.training.losses import check_distortion, loss_of
from mvcodec.training.optimizers import OPTIMIZERS, FiniteSteps, optimizers_for, take_up
from mvcodec.training.parallax_supervision import ParallaxSupervision
from mvcodec.training.rounding import calibration_on, count_in_integers
from mvcodec.training.sampling import Batches, CropSampler

VALIDATION_QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Trainer:
    """One run in one folder: checkpoint.pt, log.csv, validation.csv, curves.png."""

    def __init__(self, config: TrainConfig, progress: bool = True, quiet: bool = False) -> None:
        check(config)
        state = to_resume(config)
        self.device = own_device(config.device)
        self.processes = Processes.join(self.device)
        self.config, self.progress, self.quiet = config, progress and self.processes.first, quiet
        if config.threads:
            torch.set_num_threads(config.threads)
        self.run = Path(config.run_dir)
        start = start_of(config) if state is None and config.start_from else None  # before pictures are read for long
        self.scenes = load_scenes(Path(config.data), self.progress)
        validates = bool(config.validation) and self.processes.first
        self.validation = load_scenes(Path(config.validation), self.progress) if validates else []
        check_validation(self.validation)
        size = config.crop, config.crop_width or config.crop
        sampler = CropSampler(self.scenes, size, config.seed, config.jitter, config.synthetic)
        self.batches = Batches(sampler, config, self.processes.rank, self.processes.world)
        if not sampler.usable(1):
            raise UsageError(f"no picture is as large as the crops, {size[1]}x{size[0]}; give a smaller --crop")
        if self.joint and not config.synthesis and self.batches.most_views < 2:
            raise UsageError(f"no scene has two views of at least {size[1]}x{size[0]} to fuse; --synthetic makes some")
        self.run.mkdir(parents=True, exist_ok=True)
        self.ahead: Iterator[tuple[Tensor, Tensor]] | None = None
        self.step = 0
        self.finite = FiniteSteps()
        self.unwritten: list[dict[str, float]] = []  # rows of the log
        checkpoint = self.run / "checkpoint.pt"
        torch.manual_seed(config.seed)
        self.bits: dict[str, dict[str, Tensor]] = {}
        if state is not None:
            self.model = ParaHydra(ModelConfig.from_dict(state["model_config"]))
            self.bits = bits_of(state)
        elif start is not None:
            model_config, weights, bits, _ = start
            self.model = ParaHydra(model_config)
            load_weights(self.model, weights, Path(config.start_from))
            if self.keeps_bits:
                self.bits = bits
        else:
            self.model = ParaHydra(config_for(config.profile))
            if self.model.config.transform == "klt":
                self.model.start_as_klt(block_covariance(self.scenes))
        quantise = config.stage == "quantise"
        if quantise and state is None:
            self.bits = {"calibration": calibration_on(self.model, Path(config.data))}
        self.model.to(self.device).to(memory_format=memory_format(self.device))
        if quantise:
            count_in_integers(self.model, self.bits["calibration"])
        if state is not None:
            load_weights(self.model, state["model"], checkpoint)
        if not quantise:
            self._choose_parameters()  # of a network that has all its parts: some come with weights that know them
        self.optimizers = optimizers_for(self.model, config.optimizer)
        self.ema = Ema(self.model, config.ema)
        if state is not None:
            # Layers younger than the checkpoint keep their start.
            self.ema.shadow |= {k: v.to(self.device) for k, v in state["ema"].items()}
            for name, optimizer in self.optimizers.items():
                try:
                    take_up(optimizer, state[name])
                except ValueError as error:
                    raise UsageError(
                        f"{checkpoint}: was written by a run that trained other weights; begin with --start-from it"
                    ) from error
            self.step = state["step"]
        network = self.processes.wrap(self.model, self.device, unused=config.synthesis)  # the fusions, by lone views
        self.network: Callable[..., TrainingOutput] = torch.compile(network) if config.compile else network

    def _choose_parameters(self) -> None:
        """Let gradients reach what this stage trains, and nothing else."""
        if self.config.stage == "joint":
            self.model.requires_grad_(False)
            self.model.para_jd.requires_grad_(self.config.synthesis)
            self.model.gain.log_inverse.requires_grad_(self.config.synthesis)
            self.model.para_jd.fusions.requires_grad_(True)
            return
        if self.config.stage == "decoder":
            self.model.requires_grad_(False)
            self.model.para_jd.requires_grad_(True)
            self.model.gain.log_inverse.requires_grad_(True)
        if self.model.cells is not None:  # of no use where pictures are not drawn back
            self.model.cells.requires_grad_(self.config.stage == "decoder")
            for estimate in self.model.cells.children():  # stage `cells` has these
                estimate.requires_grad_(False)
        self.model.para_jd.fusions.requires_grad_(False)  # gains are zero: nothing to learn alone
        if self.model.refinement is not None:
            self.model.refinement.requires_grad_(False)
            self.model.refinement.look.requires_grad_(True)  # the part that needs no peers
            self.model.refinement.clean_out.requires_grad_(True)

    @property
    def joint(self) -> bool:
        return self.config.stage == "joint"

    @property
    def keeps_bits(self) -> bool:
        """Whether what encodes stays as it is: files of the model that it began with are decoded by this one."""
        return self.config.stage in ("joint", "decoder")

    @property
    def way(self) -> dict[str, bool]:
        """What of the network this stage runs."""
        joint, stage = self.joint, self.config.stage
        way = {"joint": joint, "fuse": joint, "rate": not joint}
        return way | {"decode": stage != "quantise", "constrain": stage == "decoder"}

    def autocast(self) -> torch.autocast:
        return autocast(self.device)

    def train_step(self) -> dict[str, float]:
        """One update; depends on (seed, step) and the weights alone."""
        config, step, processes = self.config, self.step, self.processes
        if self.ahead is None:
            self.ahead = self.batches.from_step(step)
        pixels, quality = next(self.ahead)
        pictures, t = pixels.to(self.device, non_blocking=True).float().div_(255), quality.to(self.device)
        if memory_format(self.device) is torch.contiguous_format:  # crops lie as pictures do; convolutions would follow
            pictures = pictures.contiguous()
        part = self.batches.part_at(step)
        exact = processes.world > 1 and not config.compile  # compiled noise cannot be drawn for the whole batch
        torch.manual_seed(hash((config.seed, step, 0 if exact else processes.rank)) & 0x7FFFFFFF)
        rate = learning_rate(config, step)
        groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = rate * group["factor"]
        parallax = ParallaxSupervision(self.model.para_jd)
        guide = parallax_weight(config, step)
        with self.autocast(), WholeBatchNoise(part) if exact else nullcontext(), parallax if guide else nullcontext():
            out = self.network(pictures, t, **self.way)
        loss, bpp, mse = loss_of(pictures, out.pictures, out.bits, t, config.distortion)
        look = parallax.loss(pictures) if guide else loss.new_zeros(())
        # The mean over processes becomes the mean over the whole batch.
        terms = torch.stack((loss + guide * look, bpp, mse, look)) * part.share * processes.world
        self.model.zero_grad(set_to_none=True)
        terms[0].backward()
        # Clipped group by group: the KLT layers' large gradients must not shrink everyone else's.
        norms = [nn.utils.clip_grad_norm_(group["params"], config.clip) for group in groups]
        norm = torch.stack([x.to(self.device) for x in norms]).max().item()  # on the CPU where nothing had a gradient
        takes = self.finite.takes(norm)
        total, bits, error, off = processes.mean(terms.detach()).tolist()
        row = {
            "step": step + 1,
            "views": pictures.shape[1],
            "loss": total,
            "bpp": bits,
            "psnr": -10 * math.log10(max(error, 1e-12)) if self.way["decode"] else math.nan,
            "norm": norm,
            "lr": rate,
            **({"parallax": off} if config.parallax else {}),
        }
        with uninterrupted():
            if takes:
                for optimizer in self.optimizers.values():
                    optimizer.step()
            self.ema.update(self.model, step)
            self.step += 1
            self.unwritten.append(row)
        return row

    @torch.no_grad()
    def validate(self, crop: int = 256) -> list[dict[str, float | str]]:
        """Per quality: mean bpp (estimated) and mean PSNR of separate (and in stage joint, joint) decoding, with
        averaged weights."""
        rows: list[dict[str, float | str]] = []
        way = {"fuse": self.joint, "constrain": self.way["constrain"]}
        with self.ema.applied_to(self.model), self.autocast():
            for quality in VALIDATION_QUALITIES:
                bpps: list[float] = []
                alone: list[float] = []
                together: list[float] = []
                for _, crops in centre_crops(self.validation, crop):
                    pictures = crops.to(self.device)
                    t = torch.full(pictures.shape[:2], quality, device=self.device)
                    torch.manual_seed(0)
                    for joint, psnrs in ((False, alone), (True, together))[: 1 + self.joint]:
                        out = self.model(pictures, t, joint, **way)
                        mse = (out.pictures.clamp(0, 1) - pictures).square().mean(dim=(2, 3, 4))
                        psnrs.extend((-10 * torch.log10(mse)).flatten().tolist())
                    bpps.extend((out.bits / crops.shape[-1] ** 2).flatten().tolist())
                rows.append(
                    {
                        "step": self.step,
                        "quality": quality,
                        "bpp": float(np.mean(bpps)),
                        "psnr_separate": float(np.mean(alone)),
                        **({"psnr_joint": float(np.mean(together))} if self.joint else {}),
                    }
                )
        return rows

    def save(self) -> None:
        if not self.processes.first:
            return
        save_whole(
            {
                "model": self.model.state_dict(),
                "ema": self.ema.shadow,
                **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "step": self.step,
                "model_config": self.model.config.to_dict(),
                "train_config": asdict(self.config),
                **self.bits,
            },
            self.run / "checkpoint.pt",
        )

    def fit(self) -> None:
        """Train to the last step, or until `minutes` are over; checkpoint on the way and at the end."""
        started = saved = time.monotonic()
        bar = tqdm(total=self.config.steps, initial=self.step, disable=not self.progress, unit="step")
        began = self.step
        try:
            if (
                self.step
                and self._validates()
                and self.step not in columns(self.run / "validation.csv").get("step", [])
            ):
                self._validate(bar)  # an interrupt came before
            while self.step < self.config.steps:
                last = self.train_step()
                bar.update()
                bar.set_postfix(loss=f"{last['loss']:.3f}", bpp=f"{last['bpp']:.3f}", psnr=f"{last['psnr']:.2f}")
                if self._validates():
                    self._validate(bar)
                now = time.monotonic()
                if now - saved > 60 * self.config.checkpoint_minutes:
                    self._keep()
                    saved = now
                if self._over(now - started):
                    break
        finally:
            if self.step > began:
                self._keep()
            bar.close()
            self.ahead = None
        self.processes.wait()  # the checkpoint is there for all

    def _keep(self) -> None:
        """Checkpoint, log and curves, as far as the run has come."""
        self.save()
        if self.processes.first:
            append_rows(self.run / "log.csv", self.unwritten)
            draw_if_possible(self.run)
        self.unwritten.clear()

    def _validates(self) -> bool:
        last = self.step == self.config.steps
        return bool(self.validation) and (last or self.step % self.config.validate_every == 0)

    def _validate(self, bar: tqdm) -> None:
        rows = self.validate()
        append_rows(self.run / "validation.csv", rows)
        if not self.quiet:
            bar.write("\n".join(format_validation(row) for row in rows))

    def _over(self, seconds: float) -> bool:
        """Whether the time is over by the clock of process 0; the others follow it, so that none waits for another."""
        if not self.config.minutes:
            return False
        over = float(self.processes.first and seconds > 60 * self.config.minutes)
        return bool(self.processes.mean(torch.tensor(over, device=self.device)) > 0)


def format_validation(row: dict[str, float | str]) -> str:
    found = (
        f"step {row['step']:6d}  q {row['quality']:.2f}  {row['bpp']:.4f} bpp  separate {row['psnr_separate']:.2f} dB"
    )
    return f"{found}  joint {row['psnr_joint']:.2f} dB" if "psnr_joint" in row else found


def check(config: TrainConfig) -> None:
    """UsageError for settings that cannot go together, before anything is loaded."""
    check_settings(config)
    if config.optimizer not in OPTIMIZERS:
        raise UsageError(f"optimizer {config.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
    check_distortion(config.distortion)
    smallest = min(config.crop, config.crop_width or config.crop)
    if config.distortion == "ms-ssim" and smallest < MS_SSIM_MIN_SIDE:
        raise UsageError(f"MS-SSIM needs crops of at least {MS_SSIM_MIN_SIDE} pixels a side, not {smallest}")
    if config.compile and not config.device.startswith("cuda"):
        raise UsageError("torch.compile is for CUDA; on the CPU it gains nothing here")


def train(config: TrainConfig, progress: bool = True, quiet: bool = False) -> Path:
    """Run `config`, resuming from its folder's checkpoint if there is one; returns the checkpoint's path.

    progress: with bars; quiet: without lines on validation and phases, too. Stages refine and cells may end without a
    checkpoint where `minutes` are few.
    """
    for name in (config.data, config.validation):
        if name and Path(config.run_dir).resolve().is_relative_to(Path(name).resolve()):
            raise UsageError(
                f"{config.run_dir}: lies within {name}, whose pictures the curves would join; name another"
            )
    if config.stage == "refine":
        from mvcodec.training.refinement import refine

        return refine(config, progress, quiet)
    if config.stage == "cells":
        from mvcodec.training.cells import learn_cells

        return learn_cells(config, progress, quiet)
    if config.validation:
        refuse_overlap(Path(config.data), Path(config.validation))
    trainer = Trainer(config, progress, quiet)
    trainer.fit()
    trainer.processes.leave()
    return trainer.run / "checkpoint.pt"
