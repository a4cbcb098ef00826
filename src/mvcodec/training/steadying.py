"""First part of stage `refine`: the network that steadies the flow learns what coding noise does to flow.

    two views -> decode, clean -> align -> flow                                                 kept on disk
    the same, uncoded          -> align -> what the flow should have been, where it is sure
    flow -> SteadyFlow -> distance from that, in pixels, relative to that of the flow

Texture counts more than walls and sky, where a wrong flow costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvcodec.nn.alignment import grey_values, sights
from mvcodec.nn.filters import blur, gradient
from mvcodec.nn.steady_flow import CELL, SteadyFlow, evidence
from mvcodec.training.checkpoint import each_made_once
from mvcodec.training.optimizers import fit

TRIES = 300  # pairs of windows, of which about half overlap; half a second of one core each
OVERLAP = 0.4  # mean consistency of the uncoded views from which a pair is a lesson
STEPS = 3000  # of 0.1 s
PAIRS = 2  # of views, one way, in a step
LEARNING_RATE, WARM_UP = 2e-3, 0.02  # the latter of the steps
LOST = 3.0  # pixels from the teacher's flow beyond which it is not noise
SMALL = 0.05  # pixels: below, the loss is quadratic
PLAIN = 8.0  # gradient, of 255: half of what counts most

SEEN = ("main", "side", "flow", "back", "consistency", "quality")  # of one way, by the network

Lesson = dict[str, Tensor]  # two ways of a pair: [2, C, H, W] each, quality [2, 2]
Coder = Callable[[Tensor, list[float]], Tensor]  # views [K, 3, H, W] and their qualities -> decoded and cleaned


@torch.no_grad()
def lesson(views: Tensor, coder: Coder, rng: np.random.Generator) -> Lesson | None:
    """Of two views [2, 3, H, W] in [0, 1]; None where they do not overlap."""
    height, width = (side // CELL * CELL for side in views.shape[-2:])
    views = views[..., :height, :width]
    teacher = list(sights(views))
    sure = torch.cat([sight.consistency for sight in teacher])
    if sure.mean() < OVERLAP:
        return None
    qualities = [float(q) for q in rng.random(2)]  # all of them: beyond what it has seen it does harm
    if rng.random() < 0.7:
        qualities[1] = qualities[0]
    cleaned = coder(views, qualities)
    found = list(sights(cleaned))
    flow, target = (torch.cat([sight.flow for sight in way]) for way in (found, teacher))
    along, down = gradient(blur(255 * views.mean(1, keepdim=True)))
    texture = blur(blur(along.square() + down.square())).sqrt()
    near = (target - flow).norm(dim=1, keepdim=True) < LOST
    return {
        "grey": grey_values(cleaned),
        "flow": flow,
        "consistency": torch.cat([sight.consistency for sight in found]),
        "target": target,
        "weight": sure * near * (0.3 + texture / (texture + PLAIN)),
        "quality": torch.tensor([qualities, qualities[::-1]]),
    }


def one_way(lesson: Lesson, way: int, flips: tuple[bool, bool], transposed: bool) -> Lesson:
    """[1, C, H, W] each, with what flow needs of the other way; mirrored across, down, and along the diagonal."""
    here, there = slice(way, way + 1), slice(1 - way, 2 - way)
    parts = {name: x[here] for name, x in lesson.items() if name != "grey"}
    parts |= {"main": lesson["grey"][here], "side": lesson["grey"][there], "back": lesson["flow"][there]}
    signs = torch.tensor([-1.0 if flip else 1.0 for flip in flips]).view(1, 2, 1, 1)
    for name, x in parts.items():
        if name != "quality":
            x = x.flip([dim for dim, flip in zip((-1, -2), flips, strict=True) if flip])
            x = x * signs if x.shape[1] == 2 else x
            parts[name] = (x.mT.flip(1) if transposed and x.shape[1] == 2 else x.mT if transposed else x).contiguous()
    return parts


def loss(steady: SteadyFlow, way: Lesson) -> Tensor:
    """Mean distance from the teacher's flow, relative to that of the flow as found."""
    main, side, flow, back, consistency, quality = (way[name] for name in SEEN)
    steadied = steady(flow, evidence(main, side, flow, back, consistency, quality))
    after, before = (
        (((x - way["target"]).square().sum(1, keepdim=True) + SMALL**2).sqrt() * way["weight"]).sum()
        for x in (steadied, flow)
    )
    return after / (before + 1)


def prepare(
    draw: Callable[[np.random.Generator], Tensor | None],
    folder: Path,
    coder: Coder,
    seed: int,
    progress: bool,
    made: Callable[[], None],
) -> list[Path]:
    """One file for each pair of views that overlaps, by `each_made_once`. draw: two views, if it finds any."""

    def make(_: int, rng: np.random.Generator) -> Lesson | None:
        views = draw(rng)
        return None if views is None else lesson(views, coder, rng)

    return each_made_once(folder, TRIES, seed, make, "flow of coded and uncoded views", progress, made)


def learn(
    steady: SteadyFlow,
    files: list[Path],
    seed: int,
    progress: bool,
    kept: Path | None = None,
    made: Callable[[], None] = lambda: None,
) -> None:
    """Train in place, on the processor, by `optimizers.fit`; leaves it as it is where no pair overlaps."""
    if not files:
        return

    def draw(rng: np.random.Generator) -> Iterator[Tensor]:
        for n in rng.integers(len(files), size=PAIRS):
            across, down, transposed = (bool(x) for x in rng.random(3) < 0.5)
            way = one_way(load_file(files[n]), int(rng.integers(2)), (across, down), transposed)
            yield loss(steady, way) / PAIRS

    fit(steady, draw, STEPS, LEARNING_RATE, WARM_UP, seed, "steadying the flow", progress, kept, made)
