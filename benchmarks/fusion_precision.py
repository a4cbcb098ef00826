"""How precisely must a peer be aligned before it helps, and can blocks of 8 x 8 pixels be enough? An oracle answers.

    python benchmarks/fusion_precision.py CHECKPOINT ../shared/data/train --sets 170

Flow found between the *uncoded* views, averaged over blocks of 8 x 8 (the grid of Para-JD's second fusion), fetches the
peer's part for each block of the main view; a linear rule, 192 values to 192, fitted in closed form for each of three
classes of consistency, then says from the difference of the two what the main view's coding error is. One row for each
way to fetch, dB of PSNR over the view decoded alone, on every fourth scene, which the rule has not seen:

    blocks      whole blocks at the nearest position: an attention over blocks that is always right
    mixed       blocks of both neighbours, mixed by distance: a soft attention that is always right
    quarters    blocks of 4 x 4, nearest: the same at 1/4
    pixels      pixels, bicubic: what no attention over blocks can do; then with Gaussian errors in the flow, in pixels
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.nn.alignment import sights
from mvcodec.nn.warping import pixel_grid, sample, warp
from mvcodec.parahydra import ParaHydra
from mvcodec.training.checkpoint import starting_weights
from mvcodec.training.data import load_scenes
from mvcodec.training.preparation import decode_alone, to_tensor
from mvcodec.training.sampling import CropSampler, overlapping_crops

BLOCK = 8
CLASSES = ((0.0, 0.3), (0.3, 0.6), (0.6, 1.01))  # of consistency
ERRORS = (0.5, 1.0, 2.0, 4.0)  # pixels
Fetch = Callable[[Tensor, Tensor], Tensor]  # peer [1, 3, H, W], flow [1, 2, H / 8, W / 8] -> [1, 3, H, W]


class Case(NamedTuple):
    """One view and one peer of it."""

    held: bool
    target: Tensor  # [1, 3, H, W], as main and peer
    main: Tensor
    peer: Tensor
    flow: Tensor  # [1, 2, H / 8, W / 8]
    consistency: Tensor  # [H / 8 W / 8]


def cases(net: ParaHydra, data: Path, sets: int, crop: tuple[int, int], seed: int = 1) -> Iterator[Case]:
    sampler, decode = CropSampler(load_scenes(data), crop, seed), decode_alone(net)
    scenes = sampler.usable(2)
    for n in range(sets):
        rng = np.random.default_rng((seed, n))
        target = to_tensor(list(overlapping_crops(scenes[n % len(scenes)], 2, crop, rng)))
        cleaned = decode(target, [float(q) for q in rng.random(2)])[1]
        for i, sight in enumerate(sights(target)):
            flow, consistency = (F.avg_pool2d(x, BLOCK) for x in (sight.flow, sight.consistency))
            pictures = (x[k : k + 1] for x, k in ((target, i), (cleaned, i), (cleaned, 1 - i)))
            yield Case(n % len(scenes) % 4 == 0, *pictures, flow, consistency.flatten())


def blocks(peer: Tensor, flow: Tensor, side: int = BLOCK, mode: str = "nearest") -> Tensor:
    flow = F.interpolate(flow, scale_factor=BLOCK // side, mode="bilinear") / side
    parts = F.pixel_unshuffle(peer, side)
    moved = sample(parts, pixel_grid(*parts.shape[-2:], flow) + flow, mode)
    return F.pixel_shuffle(moved, side)


def pixels(peer: Tensor, flow: Tensor, error: float = 0.0) -> Tensor:
    noise = torch.randn(flow.shape, generator=torch.Generator().manual_seed(int(1e4 * flow.abs().sum()) % 2**31))
    return warp(peer, F.interpolate(flow + error * noise, scale_factor=BLOCK, mode="bilinear"))


def rows(x: Tensor) -> Tensor:
    """[1, 3, H, W] -> its blocks [N, 192]."""
    return F.pixel_unshuffle(x, BLOCK)[0].flatten(1).T


def gains(found: Sequence[Case], fetch: Fetch) -> list[float]:
    """dB of each held-back case with the rule that the others give."""
    width = 3 * BLOCK * BLOCK
    squares, products = torch.zeros(2, len(CLASSES), width, width, dtype=torch.float64)

    def classes(case: Case) -> Iterator[tuple[int, Tensor]]:
        for c, (low, high) in enumerate(CLASSES):
            yield c, (case.consistency >= low) & (case.consistency < high)

    for case in (case for case in found if not case.held):
        apart, error = rows(fetch(case.peer, case.flow) - case.main), rows(case.target - case.main)
        weight = 1 / (error.square().mean() + 1e-6)  # so that every quality counts
        for c, of_class in classes(case):
            x = apart[of_class]
            squares[c] += (weight * x.T @ x).double()
            products[c] += (weight * x.T @ error[of_class]).double()
    ridge = 1e-2 * squares.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(width) + 1e-9 * torch.eye(width)
    rule = torch.linalg.solve(squares + ridge, products).float()
    decibels = []
    for case in (case for case in found if case.held):
        apart, error = rows(fetch(case.peer, case.flow) - case.main), rows(case.target - case.main)
        left = error.clone()
        for c, of_class in classes(case):
            left[of_class] -= apart[of_class] @ rule[c]
        decibels.append(float(10 * torch.log10(error.square().mean() / left.square().mean())))
    return decibels


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", type=int, default=170, help="pairs of crops")
    parser.add_argument("--crop", type=int, nargs=2, default=(256, 384), metavar=("H", "W"))
    given = parser.parse_args(arguments)
    config, weights, *_ = starting_weights(given.checkpoint)
    net = ParaHydra(config)
    net.load_state_dict(weights)
    found = list(cases(net.eval(), given.data, given.sets, tuple(given.crop)))
    ways: dict[str, Fetch] = {
        "blocks": blocks,
        "mixed": lambda peer, flow: blocks(peer, flow, mode="bilinear"),
        "quarters": lambda peer, flow: blocks(peer, flow, side=4),
        "pixels": pixels,
        **{f"pixels, flow off by {e}": lambda peer, flow, e=e: pixels(peer, flow, e) for e in ERRORS},  # type: ignore[misc]
    }
    print(f"{sum(case.held for case in found)} views held back of {len(found)}\n\n| fetched | mean | worst | best |")
    print("|---|---|---|---|")
    for name, fetch in ways.items():
        values = gains(found, fetch)
        print(f"| {name} | {np.mean(values):+.4f} dB | {min(values):+.4f} | {max(values):+.4f} |", flush=True)


if __name__ == "__main__":
    main()
