"""Batches: random crops that show the same place in every view, each seen by a camera of its own colours.

Every set of crops depends on (seed, step, its place in the batch) alone: a resumed run sees what the uninterrupted one
would, processes that share a batch each cut their part, and workers may cut ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mvcodec.errors import UsageError
from mvcodec.training.config import TrainConfig
from mvcodec.training.data import Picture, Scene
from mvcodec.training.losses import sample_quality
from mvcodec.training.synthetic import synthetic_views

LONE = 0.15  # share of the joint stage's steps on lone views
GAIN, OFFSET, GAMMA = 0.12, 0.03, 0.15  # largest change by another camera: of a channel, of the range, of ln gamma


@dataclass(frozen=True)
class Part:
    """What one process has of a batch: sets `start` to `stop` of `whole`. An empty part repeats set 0, weightless."""

    start: int
    stop: int
    whole: int

    @staticmethod
    def of(whole: int, rank: int, world: int) -> Part:
        return Part(whole * rank // world, whole * (rank + 1) // world, whole)

    @property
    def indices(self) -> range:
        return range(self.start, self.stop) if self.stop > self.start else range(1)

    @property
    def share(self) -> float:
        """Of the whole batch's mean."""
        return (self.stop - self.start) / self.whole


@dataclass(frozen=True)
class CropSampler:
    """Random crops [B, K, 3, H, W] uint8: `batch` sets of `views` overlapping views each."""

    scenes: list[Scene]
    size: tuple[int, int]  # H, W
    seed: int
    jitter: float = 0.0
    synthetic: float = 0.0

    @cached_property
    def large(self) -> list[Scene]:
        """The scenes, of each the views that are at least of the crop's size."""
        found = []
        for scene in self.scenes:
            keep = [i for i, view in enumerate(scene.views) if np.greater_equal(view.shape[:2], self.size).all()]
            views, shifts = tuple(scene.views[i] for i in keep), tuple(scene.shifts[i] for i in keep)
            found.append(replace(scene, views=views, shifts=shifts))
        return found

    def usable(self, views: int) -> list[Scene]:
        """Scenes with so many views of at least the crop's size."""
        return [scene for scene in self.large if len(scene.views) >= views]

    def most_views(self, limit: int) -> int:
        """The largest K up to `limit` of which there are sets."""
        found = [len(scene.views) for scene in self.usable(1)]
        return limit if self.synthetic else min(limit, max(found, default=1))

    def batch(self, step: int, part: Part, views: int) -> Tensor:
        sets = self.usable(views)
        if not sets and not (self.synthetic and self.usable(1)):
            height, width = self.size
            raise UsageError(f"no scene has {views} views of at least {width}x{height}")
        crops = [self._crop_set(sets, views, np.random.default_rng((self.seed, step, 0, i))) for i in part.indices]
        return torch.from_numpy(np.stack(crops)).permute(0, 1, 4, 2, 3)

    def _crop_set(self, sets: list[Scene], views: int, rng: np.random.Generator) -> Picture:
        if views > 1 and rng.random() < self.share_made(sets):
            scene = _pick(self.usable(1), rng)
            crops = synthetic_views(scene.views[rng.integers(len(scene.views))], views, self.size, rng)
        else:
            crops = overlapping_crops(_pick(sets, rng), views, self.size, rng)
        flip = rng.integers(0, 4)  # the same for all views, so that geometry stays consistent
        if flip & 1:
            crops = crops[:, :, ::-1]
        if flip & 2:
            crops = crops[:, ::-1]
        return np.stack([other_camera(crop, rng) if rng.random() < self.jitter else crop for crop in crops])

    def share_made(self, sets: list[Scene]) -> float:
        """Of sets made from one picture: `synthetic`, and more where so few scenes have as many views that they would
        come again and again."""
        pairs = sum(len(scene.views) for scene in self.usable(2))
        found = sum(len(scene.views) for scene in sets)
        return max(self.synthetic, 1 - found / max(1, pairs)) if self.synthetic else 0.0


def _pick(scenes: list[Scene], rng: np.random.Generator) -> Scene:
    """A scene counts by its number of views: each photograph is seen about equally often."""
    weight = np.array([len(s.views) for s in scenes], dtype=np.float64)
    return scenes[rng.choice(len(scenes), p=weight / weight.sum())]


def overlapping_crops(scene: Scene, views: int, size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """[K, *size, 3]: a random crop of a random view, and the same place in others, by the global shifts."""
    order = rng.permutation(len(scene.views))[:views]
    base_row, base_column = scene.shifts[order[0]]
    height, width = scene.views[order[0]].shape[:2]
    rows, columns = size
    row, column = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    crops = []
    for view in order:
        picture, (dr, dc) = scene.views[view], scene.shifts[view]
        top = int(np.clip(row + dr - base_row, 0, picture.shape[0] - rows))
        left = int(np.clip(column + dc - base_column, 0, picture.shape[1] - columns))
        crops.append(picture[top : top + rows, left : left + columns])
    return np.stack(crops)


def other_camera(picture: Picture, rng: np.random.Generator) -> Picture:
    """The picture as a camera with its own exposure, white balance, black level and gamma would give it."""
    exposure = rng.uniform(-GAIN, GAIN)
    gain = 1 + exposure + rng.uniform(-GAIN / 2, GAIN / 2, 3)
    offset = rng.uniform(-OFFSET, OFFSET)
    tone = np.linspace(0, 1, 256)[:, None] ** np.exp(rng.uniform(-GAMMA, GAMMA))
    table: NDArray[np.uint8] = np.rint(255 * np.clip(gain * tone + offset, 0, 1)).astype(np.uint8)  # [256, 3]
    return np.stack([table[picture[..., c], c] for c in range(3)], axis=-1)


@dataclass(frozen=True)
class Batches(Dataset):
    """Step -> (pictures uint8 [B, K, 3, H, W], t [B, K]) of one process's part."""

    sampler: CropSampler
    config: TrainConfig
    rank: int = 0
    world: int = 1

    def views_at(self, step: int) -> int:
        """K of a step: 2 to max_views, all alike often, and lone views for a synthesis that learns, too."""
        if self.config.stage != "joint" or self.most_views == 1:
            return 1
        rng = np.random.default_rng((self.config.seed, step, 2))
        lone = self.config.synthesis and rng.random() < LONE
        return 1 if lone else int(rng.integers(2, self.most_views + 1))

    @cached_property
    def most_views(self) -> int:
        return self.sampler.most_views(self.config.max_views)

    def part_at(self, step: int) -> Part:
        return Part.of(max(1, self.config.batch // self.views_at(step)), self.rank, self.world)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        views, part = self.views_at(step), self.part_at(step)
        quality = sample_quality(step, self.config.seed, part.whole, views)
        return self.sampler.batch(step, part, views), quality[list(part.indices)]

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `step` to the last one, cut ahead by `workers` processes."""
        workers = self.config.workers
        return iter(
            DataLoader(
                self,
                batch_size=None,
                sampler=range(step, self.config.steps),
                num_workers=workers,
                pin_memory=self.config.device.startswith("cuda"),
                multiprocessing_context="fork" if workers else None,  # the pictures are shared, not copied
            )
        )
