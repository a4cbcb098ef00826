"""Whether one training run is ahead of another, in minutes: BD-rates on crops of training scenes.

    python benchmarks/compare_weights.py ../shared/data/train models/fast.safetensors runs/a/checkpoint.pt

One crop from the middle of the first picture of every fourth scene, five qualities; rates are estimates of the entropy
model on rounded symbols, pictures decoded alone, as they are cleaned and as they are drawn back into their cells. What
is reported of a model comes from `mvcodec evaluate` on scenes that it has never seen; this only ranks runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mvcodec.evaluation.bdrate import Curve, bd_rate
from mvcodec.parahydra import ParaHydra
from mvcodec.precision import autocast
from mvcodec.training.checkpoint import load_weights, starting_weights
from mvcodec.training.data import centres, find_scenes

QUALITIES = (5, 30, 55, 80, 100)
WAYS = {"cleaned": False, "drawn back": True}


def crops(folder: Path, every: int, side: int) -> list[Tensor]:
    """[1, 1, 3, side, side] in [0, 1] from the middle of the first picture of every so manieth scene that has it."""
    firsts = [views[0] for views in list(find_scenes(folder).values())[::every]]
    return [crop[None] for crop in centres(firsts, side) if crop.shape[-2:] == (side, side)]


@torch.no_grad()
def curves(weights: Path, pictures: Sequence[Tensor]) -> dict[str, list[Curve]]:
    """Of each picture one curve, by the way it is decoded."""
    start = starting_weights(weights)
    net = ParaHydra(start.config)
    load_weights(net, start.weights, weights)
    net.to(memory_format=torch.channels_last).eval()
    found: dict[str, list[Curve]] = {way: [] for way in WAYS}
    for picture in pictures:
        for way, constrain in WAYS.items():
            points = [point(net, picture, quality, constrain) for quality in QUALITIES]
            found[way].append(Curve(*zip(*points, strict=True)))
    return found


def point(net: ParaHydra, picture: Tensor, quality: float, constrain: bool) -> tuple[float, float]:
    """Bits per pixel and PSNR."""
    torch.manual_seed(0)
    with autocast(picture.device):
        out = net(picture, torch.full((1, 1), quality / 100), joint=False, fuse=False, constrain=constrain)
    error = (out.pictures.clamp(0, 1) - picture).square().mean().item()
    return out.bits.item() / (picture.shape[-1] * picture.shape[-2]), -10 * math.log10(error)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of scenes")
    parser.add_argument("weights", type=Path, nargs="+", help="model files or checkpoints; the first is the anchor")
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--side", type=int, default=384)
    given = parser.parse_args(arguments)
    pictures = crops(given.data, given.every, given.side)
    anchor = curves(given.weights[0], pictures)
    for weights in given.weights[1:]:
        for way, found in curves(weights, pictures).items():
            rates = [bd_rate(a, b) for a, b in zip(anchor[way], found, strict=True)]
            error = statistics.stdev(rates) / math.sqrt(len(rates)) if len(rates) > 1 else math.nan
            mean = statistics.mean(rates)
            print(f"{weights}, {way}: {mean:+.2f} % (standard error {error:.2f}, {len(rates)} crops)", flush=True)


if __name__ == "__main__":
    main()
