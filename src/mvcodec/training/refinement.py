"""Stage `refine`: the peers' part of the aligned refinement learns on what the codec decodes, all else frozen.

    sets of views -> decode, clean, draw back, align, warp -> crops, once                       preparation.py
    crops -> AlignedRefinement.fuse -> distortion relative to that of the view alone, which peers must not spoil

The alignment has learned by then, so it is done once; training then sees plain crops. The peerless part
(`look`, `clean_out`) belongs to stage `single` and stays as it is.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.nn.aligned_refinement import AlignedRefinement, Peer
from mvcodec.parahydra import ParaHydra
from mvcodec.precision import autocast
from mvcodec.training.checkpoint import (
    Ema,
    load_weights,
    save_whole,
    start_of,
    starting_weights,
    to_resume,
    uninterrupted,
)
from mvcodec.training.config import TrainConfig, check_settings, learning_rate
from mvcodec.training.curves import append_rows, draw_if_possible
from mvcodec.training.losses import check_distortion, distortion_of
from mvcodec.training.optimizers import FiniteSteps
from mvcodec.training.preparation import (
    CROP,
    EXAMPLES,
    PAIRS,
    PARTS,
    SIDES,
    Example,
    OutOfTime,
    Watch,
    prepare,
    refuse_foreign,
    refuse_torchrun,
)

TRAINED_CROP = {"mse": 128, "ms-ssim": CROP}  # of the examples as trained: five scales need all there is
HARM_WEIGHT = 2.0


def read_examples(files: list[Path]) -> list[Example]:
    """All examples in memory, still uint8, one entry for each set of views."""
    return [load_file(file) for file in files]


def batch_of(data: list[Example], size: int, crop: int, seed: int, step: int) -> Example:
    """Random examples in [0, 1], cut and flipped, peers left out at random; depends on (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    places = np.array([[n, k] for n, shard in enumerate(data) for k in range(len(shard["quality"]))])
    top, left = (2 * int(rng.integers((CROP - crop) // 2 + 1)) for _ in range(2))
    flips = [dim for dim in (-1, -2) if rng.random() < 0.5]
    size = min(size, len(places))
    most = int(rng.choice([1, 1, 2, 2, 3, SIDES]))  # few peers are the commonest case, and the cheapest
    picked = rng.permutation(places)[:size]
    most = min(most, max(data[n]["consistency"].shape[1] for n, _ in picked))
    chosen = []
    for n, k in picked:
        example = {}
        # Random order: a place says nothing about its peer.
        peers = torch.from_numpy(rng.permutation(data[n]["consistency"].shape[1]))[:most]
        for name, values in data[n].items():
            x = values[k]
            if "quality" not in name:
                x = (x[..., top : top + crop, left : left + crop].float() / 255).flip(flips)
            if name in ("peers", "consistency", "peer_quality"):
                x = x[peers]
                x = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
            example[name] = x
        chosen.append(example)
    batch = {name: torch.stack([example[name] for example in chosen]) for name in chosen[0]}
    keep = torch.from_numpy(rng.random((size, most)) < 0.8).float()
    batch["consistency"] = batch["consistency"] * keep[:, :, None, None, None]
    batch["peers"] = _spoil(batch["peers"], rng)
    return batch


def _spoil(peers: Tensor, rng: np.random.Generator) -> Tensor:
    """What alignment believes and is not so: exposure that changes across the picture, something in the way."""
    size, most, _, height, width = peers.shape
    colour = torch.from_numpy(rng.normal(size=(size, most, 3, 1, 1)) * (rng.random((size, most, 1, 1, 1)) < 0.3))
    peers = (peers * (1 + 0.03 * colour) + 0.01 * colour).clamp(0, 1).float()
    for b in range(size):
        if rng.random() < 0.3:
            rows, columns = (int(rng.integers(8, side // 2)) for side in (height, width))
            top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
            hidden = (b, int(rng.integers(most)), ..., slice(top, top + rows), slice(left, left + columns))
            peers[hidden] = peers[(b + 1) % size, 0, :, :rows, :columns].clone()
    return peers


class Losses(NamedTuple):
    """`total` is what training minimises; `joint` says how far it is, averaged over the batch."""

    total: Tensor
    joint: Tensor  # distortion of the view fused with its peers, of that of the view alone


def loss(model: AlignedRefinement, batch: Example, distortion: str = "mse") -> Losses:
    """Joint distortion relative to that of the view alone; harm counts more."""
    main, target = batch["main"], batch["target"]
    with autocast(main.device):
        with torch.no_grad():
            _, features = model.clean(batch["decoded"], batch["quality"])
        places = zip(*(batch[name].unbind(1) for name in ("peers", "consistency", "peer_quality")), strict=True)
        joint = model.fuse(main, features, batch["quality"], (Peer(*place) for place in places)).pictures
    joint_error, own_error = (distortion_of(target[:, None], x[:, None], distortion)[:, 0] for x in (joint, main))
    ratio = joint_error / (own_error + 1e-6)
    harm = (ratio - 1).clamp_min(0)  # peers must not do worse than none
    return Losses((ratio + HARM_WEIGHT * harm).mean(), ratio.detach().mean())


def check(config: TrainConfig) -> None:
    """UsageError for settings that this stage does not know, before anything is loaded."""
    refuse_torchrun(config.stage)
    check_distortion(config.distortion)
    check_settings(config)
    refuse_foreign(Path(config.run_dir), (PAIRS, EXAMPLES))


def refine(config: TrainConfig, progress: bool = True, quiet: bool = False) -> Path:
    """Run stage `refine` of `config`, resuming if its folder has a checkpoint; returns the checkpoint's path.

    There is no checkpoint where `minutes` ended while the run prepared; what it has prepared stays.
    """
    watch = Watch.of(config, progress, quiet)
    check(config)
    run = Path(config.run_dir)
    checkpoint = run / "checkpoint.pt"
    state = to_resume(config)
    torch.manual_seed(config.seed)
    if config.threads:
        torch.set_num_threads(config.threads)
    source = Path(config.start_from) if state is None else checkpoint
    model_config, weights, bits, _ = start_of(config) if state is None else starting_weights(checkpoint)
    model_config = replace(model_config, refine="aligned")
    net = ParaHydra(model_config)
    # What the earlier stage does not know of the refinement keeps its zero start.
    load_weights(net, {**net.state_dict(), **weights}, source)
    device = torch.device(config.device)
    net.to(device)
    refinement = net.refinement
    assert refinement is not None
    refinement.to(memory_format=torch.channels_last)
    refinement.requires_grad_(False)
    for part in PARTS:
        refinement.get_submodule(part).requires_grad_(True)
    trained = [parameter for parameter in refinement.parameters() if parameter.requires_grad]

    try:
        steady, files = prepare(net, config, state is not None, watch)
    except OutOfTime:
        return checkpoint
    data = read_examples(files)
    refinement.steady = None if steady is None else steady.to(device)

    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99))
    ema, step = Ema(refinement, config.ema), 0
    if state is not None:
        refinement.load_state_dict(state["refinement"])
        ema.shadow = {name: state["ema"][f"refinement.{name}"].to(device) for name in ema.shadow}
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]

    def save(rows: list[dict[str, float]]) -> None:
        averaged = {f"refinement.{name}": value for name, value in ema.shadow.items()}
        save_whole(
            {
                "ema": {**net.state_dict(), **averaged},
                "refinement": refinement.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "model_config": model_config.to_dict(),
                "train_config": asdict(config),
                **bits,
            },
            checkpoint,
        )
        append_rows(run / "log.csv", rows)
        draw_if_possible(run)
        rows.clear()

    watch.say(f"stage refine: training, step {step} of {config.steps}")
    saved, finite = time.monotonic(), FiniteSteps()
    rows: list[dict[str, float]] = []
    bar = tqdm(total=config.steps, initial=step, disable=not progress, unit="step")
    try:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batch = batch_of(data, config.batch, TRAINED_CROP[config.distortion], config.seed, step)
            now = loss(refinement, {name: x.to(device) for name, x in batch.items()}, config.distortion)
            optimizer.zero_grad(set_to_none=True)
            now.total.backward()
            takes = finite.takes(nn.utils.clip_grad_norm_(trained, 0.5).item())
            joint_db = -10 * math.log10(float(now.joint))
            row = {"step": step + 1, "loss": now.total.item(), "joint_db": joint_db}
            with uninterrupted():
                if takes:
                    optimizer.step()
                ema.update(refinement, step)
                step += 1
                rows.append(row)
            bar.update()
            bar.set_postfix(joint=f"{joint_db:+.2f} dB")
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save(rows)
                saved = time.monotonic()
            if watch.over():
                break
    finally:
        if rows:
            save(rows)
        bar.close()
    return checkpoint
