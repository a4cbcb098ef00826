"""Stage `refine`: the pixel-aligned refinement learns on what the codec decodes, each view alone, all else frozen.

    scene -> encode and decode each view -> align -> warp -> crops       once per scene, kept in the run's folder
    crops -> AlignedRefinement.fuse -> MSE relative to the separate decode's

Alignment has no weights, so it is done once; training then sees plain crops.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.errors import UsageError
from mvcodec.nn.aligned_refinement import AlignedRefinement, see_through_peers
from mvcodec.nn.alignment import align
from mvcodec.parahydra import PAD_MULTIPLE, ParaHydra
from mvcodec.training.checkpoint import Ema, save_whole, starting_weights
from mvcodec.training.config import TrainConfig, learning_rate
from mvcodec.training.curves import append_rows
from mvcodec.training.data import Picture, Scene, load_scenes

WINDOW = 512  # side of the part of a scene that is decoded and aligned
CROP = 192  # of the examples kept
TRAINED_CROP = 128  # of the examples as trained
SIDES = 3  # peers kept per example; absent ones have consistency 0
ROUNDS = 2  # windows per scene

# views and one quality in [0, 1] for each -> the views as decoded alone, uint8
Degrade = Callable[[list[Picture], list[float]], list[Picture]]
Example = dict[str, Tensor]


def decode_alone(net: ParaHydra) -> Degrade:
    """The codec itself without its refinement; no bits are written, so it is quick."""
    device = net.gain.log_gain.device

    @torch.no_grad()
    def degrade(views: list[Picture], qualities: list[float]) -> list[Picture]:
        pictures = to_tensor(views)
        height, width = pictures.shape[-2:]
        padded = F.pad(pictures.to(device), (0, -width % PAD_MULTIPLE, 0, -height % PAD_MULTIPLE), mode="replicate")
        with torch.autocast(device.type, torch.bfloat16):
            decoded = [
                net(
                    x[None, None],
                    torch.tensor([[quality]], device=device),
                    joint=False,
                    fuse=False,
                    rate=False,
                    clean=False,
                )
                for x, quality in zip(padded, qualities, strict=True)
            ]
        return [
            (255 * out.pictures[0, 0, :, :height, :width].clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
            for out in decoded
        ]

    return degrade


def to_tensor(views: list[Picture]) -> Tensor:
    """uint8 [H, W, 3] each -> [K, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255


def overlapping_windows(scene: Scene, size: int, rng: np.random.Generator) -> list[Picture]:
    """A random window of every view that has the first one's size, moved by the global shift between the views."""
    height, width, _ = scene.views[0].shape
    rows, columns = min(size, height), min(size, width)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    windows = []
    for view, (down, right) in zip(scene.views, scene.shifts, strict=True):
        if view.shape == scene.views[0].shape:
            y, x = int(np.clip(top + down, 0, height - rows)), int(np.clip(left + right, 0, width - columns))
            windows.append(view[y : y + rows, x : x + columns])
    return windows


def examples(views: list[Picture], degrade: Degrade, rng: np.random.Generator, crops: int = 5) -> Example:
    """Crops of every view of a scene with its most consistent peers; all uint8 but the qualities."""
    qualities = [float(rng.random())] * len(views)
    if rng.random() < 0.5:
        qualities = [float(q) for q in rng.random(len(views))]
    decoded = to_tensor(degrade(views, qualities))
    target = to_tensor(views)
    alignment = align(decoded)
    found = []
    for i in range(len(views)):
        overlap = alignment.consistency[i].mean((-3, -2, -1))
        overlap[i] = -1
        peers = [int(j) for j in overlap.argsort(descending=True)[: min(SIDES, len(views) - 1)]]
        seen = see_through_peers(decoded, alignment, i, peers)
        for top, left in _spots(seen.consistency.amax(0)[0], crops, rng):
            window = (..., slice(top, top + CROP), slice(left, left + CROP))
            empty = (SIDES - len(peers), 1, CROP, CROP)
            found.append({
                "target": target[i][window],
                "main": decoded[i][window],
                "peers": torch.cat((seen.pictures[window], torch.zeros(empty).expand(-1, 3, -1, -1))),
                "consistency": torch.cat((seen.consistency[window], torch.zeros(empty))),
                "quality": torch.tensor(qualities[i]),
                "peer_quality": torch.tensor([qualities[j] for j in peers] + [0.0] * (SIDES - len(peers))),
            })  # fmt: skip
    stacked = {name: torch.stack([example[name] for example in found]) for name in found[0]}
    return {k: x if "quality" in k else (255 * x).round().byte() for k, x in stacked.items()}


def _spots(consistency: Tensor, count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Corners of crops: of three random ones the one peers cover best, so there is something to learn."""
    height, width = consistency.shape
    for _ in range(count):
        corners = [(int(rng.integers(height - CROP + 1)), int(rng.integers(width - CROP + 1))) for _ in range(3)]
        yield max(corners, key=lambda c: float(consistency[c[0] : c[0] + CROP, c[1] : c[1] + CROP].mean()))


def cache(scenes: list[Scene], folder: Path, degrade: Degrade, seed: int, progress: bool) -> list[Path]:
    """One file of examples per scene and round; files that exist are kept. Scenes too small for a crop are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    jobs = [(n, r) for r in range(ROUNDS) for n in range(len(scenes))]
    for n, r in tqdm(jobs, desc="decoding and aligning", disable=not progress, leave=False):
        rng = np.random.default_rng((seed, r, n))
        windows = overlapping_windows(scenes[n], WINDOW, rng)[: SIDES + 1]
        if len(windows) < 2 or min(windows[0].shape[:2]) < CROP:
            continue
        file = folder / f"{n}.{r}.safetensors"
        if not file.exists():
            partial = file.with_suffix(".partial")
            save_file(examples(windows, degrade, rng), partial)
            partial.replace(file)
        files.append(file)
    if not files:
        raise UsageError(f"no scene has two views of one size, at least {CROP}x{CROP}: nothing to refine")
    return files


def read_examples(files: list[Path]) -> Example:
    """All examples in memory, still uint8."""
    shards = [load_file(file) for file in files]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def batch_of(data: Example, size: int, seed: int, step: int) -> Example:
    """Random examples in [0, 1], cut and flipped, peers dropped at random; depends on (seed, step) alone."""
    rng = np.random.default_rng((seed, step))
    index = torch.from_numpy(rng.choice(len(data["quality"]), size))
    top, left = (2 * int(rng.integers((CROP - TRAINED_CROP) // 2 + 1)) for _ in range(2))
    flips = [dim for dim in (-1, -2) if rng.random() < 0.5]
    batch = {}
    for name, values in data.items():
        x = values[index]
        if "quality" not in name:
            x = (x[..., top : top + TRAINED_CROP, left : left + TRAINED_CROP].float() / 255).flip(flips)
        batch[name] = x
    # The commonest case is one peer, and the cheapest; places that stay empty in all examples only cost time.
    used = int((batch["consistency"].amax((2, 3, 4)) > 0).sum(1).amax().clamp(min=1))
    used = 1 if rng.random() < 0.2 else used
    batch = {k: x[:, :used] if k in ("peers", "consistency", "peer_quality") else x for k, x in batch.items()}
    keep = torch.from_numpy(rng.random((size, used)) < rng.choice([0.4, 0.7, 1.0])).float()
    batch["consistency"] = batch["consistency"] * keep[:, :, None, None, None]
    return batch


def loss(model: AlignedRefinement, batch: Example) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, clean ratio, joint ratio): MSE with and without peers, relative to the separate decode's."""
    main, target = batch["main"], batch["target"]
    with torch.autocast(main.device.type, torch.bfloat16):
        joint, alone, _ = model.fuse(
            main, batch["quality"], batch["peers"], batch["consistency"], batch["peer_quality"]
        )
    separate = _mse(main, target) + 1e-6
    clean_ratio, joint_ratio = _mse(alone, target) / separate, _mse(joint, target) / separate
    harm = (joint_ratio - clean_ratio.detach()).clamp_min(0)  # peers must not do worse than none
    return (joint_ratio + clean_ratio + 2 * harm).mean() / 2, clean_ratio.detach().mean(), joint_ratio.detach().mean()


def _mse(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).square().mean((1, 2, 3))


def refine(config: TrainConfig, progress: bool = True) -> Path:
    """Run stage `refine` of `config`, resuming if its folder has a checkpoint; returns the checkpoint's path."""
    run = Path(config.run_dir)
    checkpoint = run / "checkpoint.pt"
    source = checkpoint if checkpoint.exists() else Path(config.start_from)
    if not source.is_file():
        raise UsageError("stage refine needs the checkpoint of an earlier stage to start from")
    torch.manual_seed(config.seed)
    model_config, weights = starting_weights(source)
    model_config = replace(model_config, refine="aligned")
    net = ParaHydra(model_config)
    # What the earlier stage does not know of the refinement keeps its zero start.
    net.load_state_dict({**net.state_dict(), **weights})
    device = torch.device(config.device)
    net.to(device)
    refinement = net.refinement
    assert refinement is not None
    files = cache(load_scenes(Path(config.data), progress), run / "examples", decode_alone(net), config.seed, progress)
    data = read_examples(files)

    optimizer = torch.optim.AdamW(refinement.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    ema, step = Ema(refinement, config.ema), 0
    if source == checkpoint:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
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
            },
            checkpoint,
        )
        append_rows(run / "log.csv", rows)
        rows.clear()

    started = saved = time.monotonic()
    rows: list[dict[str, float]] = []
    bar = tqdm(total=config.steps, initial=step, disable=not progress, unit="step")
    try:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batch = {k: x.to(device) for k, x in batch_of(data, config.batch, config.seed, step).items()}
            value, clean_ratio, joint_ratio = loss(refinement, batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(refinement.parameters(), 0.5)
            optimizer.step()
            ema.update(refinement, step)
            step += 1
            clean_db, joint_db = (-10 * math.log10(float(x)) for x in (clean_ratio, joint_ratio))
            rows.append({"step": step, "loss": value.item(), "clean_db": clean_db, "joint_db": joint_db})
            bar.update()
            bar.set_postfix(clean=f"{clean_db:+.2f} dB", joint=f"{joint_db:+.2f} dB")
            if time.monotonic() - saved > 60 * config.checkpoint_minutes:
                save(rows)
                saved = time.monotonic()
            if config.minutes and time.monotonic() - started > 60 * config.minutes:
                break
    finally:
        save(rows)
        bar.close()
    return checkpoint
