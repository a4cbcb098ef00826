"""Training the aligned refinement on pictures that some codec has decoded, each view alone.

    scene -> degrade (the codec; WebP until there is one) -> align -> warp -> crops on disk        `cache`
    crops -> AlignedRefinement.clean and .fuse -> MSE relative to the separate decode's            `train`
    validation scenes, whole pictures: separate, clean alone, with peers                           `evaluate`

Alignment has no weights, so it is done once per scene; training then sees plain crops:

    python -m mvcodec.training.refinement cache --scenes DATA/train --cache DIR [--codec MODEL.safetensors]
    python -m mvcodec.training.refinement train --cache DIR --out FILE.safetensors --seconds 1800
    python -m mvcodec.training.refinement evaluate --scenes DATA/val --weights FILE.safetensors [--codec ...]
"""

import argparse
import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from click import echo
from numpy.typing import NDArray
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from torch import Tensor

from mvcodec.nn.aligned_refinement import AlignedRefinement, see_through_peers
from mvcodec.nn.alignment import align
from mvcodec.training.data import global_shift
from mvcodec.weights import load_model

CROP = 192
SIDES = 3  # peers kept per example; absent ones have consistency 0

Picture = NDArray[np.uint8]  # [H, W, 3]
# views and one quality in [0, 1] for each -> the views as decoded alone, uint8
Degrade = Callable[[list[Picture], list[float]], list[Picture]]
Example = dict[str, Tensor]


def webp(views: list[Picture], qualities: list[float]) -> list[Picture]:
    """Stand-in codec: WebP at 5 .. 75, about 29 .. 37 dB."""
    decoded = []
    for view, quality in zip(views, qualities, strict=True):
        data = io.BytesIO()
        PillowImage.fromarray(view).save(data, "WEBP", quality=round(5 + 70 * quality))
        decoded.append(np.asarray(PillowImage.open(data).convert("RGB")))
    return decoded


def codec(weights: Path) -> Degrade:
    """The codec itself, each view alone, without refinement; nothing is written to files, so it is quick."""
    net = load_model(weights).net.float()

    @torch.no_grad()
    def degrade(views: list[Picture], qualities: list[float]) -> list[Picture]:
        pictures = to_tensor(views)
        height, width = pictures.shape[-2:]
        padded = F.pad(pictures, (0, -width % 64, 0, -height % 64), mode="replicate")
        with torch.autocast("cpu", torch.bfloat16):
            decoded = [
                net(picture[None, None], torch.tensor([[quality]]), joint=False).pictures[0, 0, :, :height, :width]
                for picture, quality in zip(padded, qualities, strict=True)
            ]
        return [(255 * x.float().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy() for x in decoded]

    return degrade


def read_scene(folder: Path, limit: int | None = None) -> list[Picture]:
    """The views of a scene that have the first one's size."""
    views = [np.asarray(PillowImage.open(path).convert("RGB")) for path in sorted(folder.glob("*.webp"))]
    return [view for view in views if view.shape == views[0].shape][:limit]


def overlapping_windows(views: list[Picture], size: int, rng: np.random.Generator) -> list[Picture]:
    """A random window of every view, moved by the global shift between the views: a quarter of the work."""
    height, width, _ = views[0].shape
    rows, columns = min(size, height), min(size, width)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    windows = []
    for view in views:
        down, right = global_shift(views[0], view)
        y, x = int(np.clip(top + down, 0, height - rows)), int(np.clip(left + right, 0, width - columns))
        windows.append(view[y : y + rows, x : x + columns])
    return windows


def to_tensor(views: list[Picture]) -> Tensor:
    """uint8 [H, W, 3] each -> [K, 3, H, W] in [0, 1]"""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255


# --- cache ---


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


def cache(
    scenes: Path, out: Path, degrade: Degrade, *, seed: int = 0, limit: int = 4, rounds: int = 1, window: int = 512
) -> None:
    """One file of examples per scene and round, in random order of scenes; files that exist are kept."""
    out.mkdir(parents=True, exist_ok=True)
    folders = sorted({path.parent for path in scenes.rglob("*.webp")})
    for r in range(rounds):
        rng = np.random.default_rng((seed, r))
        for n in rng.permutation(len(folders)):
            file = out / f"{folders[n].name}.{r}.safetensors"
            views = read_scene(folders[n], limit)
            if file.exists() or len(views) < 2:
                continue
            start = time.time()
            own = np.random.default_rng((seed, r, n))
            save_file(examples(overlapping_windows(views, window, own), degrade, own), file)
            echo(f"{file.name}: {len(views)} views, {time.time() - start:.1f} s")


# --- train ---


def batches(files: list[Path], size: int, crop: int, rng: np.random.Generator) -> Iterator[Example]:
    """Endless random batches in [0, 1], flipped, cut to `crop`, peers dropped at random."""
    shards = [load_file(file) for file in files]
    data = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    del shards
    while True:
        index = torch.from_numpy(rng.choice(len(data["quality"]), size, replace=False))
        top, left = (2 * int(rng.integers((CROP - crop) // 2 + 1)) for _ in range(2))
        batch = {}
        for name, values in data.items():
            x = values[index]
            if "quality" not in name:
                x = x[..., top : top + crop, left : left + crop].float() / 255
            batch[name] = x
        flips = [dim for dim in (-1, -2) if rng.random() < 0.5]
        batch = {name: x if "quality" in name else x.flip(flips) for name, x in batch.items()}
        # the commonest case is one peer, and the cheapest; places that stay empty in all examples only cost time
        used = int((batch["consistency"].amax((2, 3, 4)) > 0).sum(1).amax().clamp(min=1))
        used = 1 if rng.random() < 0.2 else used
        batch = {k: x[:, :used] if k in ("peers", "consistency", "peer_quality") else x for k, x in batch.items()}
        keep = torch.from_numpy(rng.random((size, used)) < rng.choice([0.4, 0.7, 1.0])).float()
        batch["consistency"] = batch["consistency"] * keep[:, :, None, None, None]
        yield batch


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


def train(
    model: AlignedRefinement,
    files: list[Path],
    out: Path,
    *,
    seconds: float,
    batch: int = 8,
    crop: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train for a given time: cosine decay over it, averaged weights written to `out` once a minute."""
    model.to(memory_format=torch.channels_last).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    start, saved, seen = time.time(), 0.0, torch.zeros(2)
    for step, example in enumerate(batches(files, batch, crop, np.random.default_rng(seed))):
        elapsed = time.time() - start
        done = min(elapsed / seconds, 1.0)
        decay = 0.5 + 0.5 * math.cos(math.pi * done)
        optimiser.param_groups[0]["lr"] = rate * min(1, step / 100) * decay + 1e-6
        value, clean_ratio, joint_ratio = loss(model, example)
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                average[name].lerp_(weight, 1 - min(0.998, (1 + step) / (10 + step)))
        seen.lerp_(torch.tensor([float(clean_ratio), float(joint_ratio)]), 0.01 if step > 100 else 1 / (step + 1))
        if done >= 1 or elapsed - saved > 60:
            saved = elapsed
            save_file({name: weight.contiguous() for name, weight in average.items()}, out)
            gains = [-10 * math.log10(x) for x in seen.tolist()]
            echo(f"{elapsed:.0f} s, step {step}: clean {gains[0]:+.3f} dB, joint {gains[1]:+.3f} dB")
        if done >= 1:
            return


# --- evaluate ---


def evaluate(model: AlignedRefinement, scenes: Path, degrade: Degrade, qualities: tuple[float, ...]) -> None:
    """Print a table: dB of the separate decode, without peers, with peers, and the extremes over views."""
    model.eval()
    echo("scene | K | quality | separate dB | clean | joint | peers' gain | worst view | best")
    total = []
    for folder in sorted({path.parent for path in scenes.rglob("*.webp")}):
        views = read_scene(folder)
        target = to_tensor(views)
        for quality in qualities:
            decoded = to_tensor(degrade(views, [quality] * len(views)))
            levels = torch.full((len(views),), quality)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                alone = model(decoded, levels, peers=False).pictures
                joint = model(decoded, levels).pictures
            db = [-10 * _mse(x, target).log10() for x in (decoded, alone, joint)]
            gain = db[2] - db[1]
            row = [float(x.mean()) for x in (*db, gain)] + [float(gain.min()), float(gain.max())]
            total.append(row)
            echo(f"{folder.name} | {len(views)} | {quality:.2f} | " + " | ".join(f"{x:.3f}" for x in row))
    echo("mean | | | " + " | ".join(f"{x:.3f}" for x in np.mean(total, axis=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("cache", "train", "evaluate"))
    parser.add_argument("--scenes", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--codec", type=Path, help="weights of the codec; without it WebP stands in")
    parser.add_argument("--weights", type=Path, help="refinement to start from or to evaluate")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--views", type=int, default=4, help="of a scene at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quality", type=float, nargs="+", default=[0.2, 0.6])
    options = parser.parse_args()
    degrade = codec(options.codec) if options.codec else webp
    torch.manual_seed(options.seed)
    model = AlignedRefinement()
    if options.weights:
        model.load_state_dict(load_file(options.weights))
    if options.verb == "cache":
        cache(options.scenes, options.cache, degrade, seed=options.seed, limit=options.views, rounds=options.rounds)
    elif options.verb == "train":
        files = sorted(options.cache.glob("*.safetensors"))
        train(model, files, options.out, seconds=options.seconds, rate=options.rate, seed=options.seed)
    else:
        evaluate(model, options.scenes, degrade, tuple(options.quality))


if __name__ == "__main__":
    main()
