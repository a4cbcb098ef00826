"""Scenes of overlapping photographs in memory, and random crops that show the same place in every view.

A scene is a folder of pictures (`DATA/scene/view.webp`, also one level deeper for shards). All are decoded once and
kept as uint8. Every batch depends on (seed, step) alone, so that a resumed run sees what the uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mvcodec.errors import PictureError, UsageError
from mvcodec.frames import PICTURE_SUFFIXES
from mvcodec.parahydra import PAD_MULTIPLE

Picture = NDArray[np.uint8]  # [H, W, 3]
COARSE = 8  # global shifts are found at 1/8


@dataclass(frozen=True)
class Scene:
    """Views of one place and, per view, the shift (rows, columns) of its content against view 0."""

    name: str
    views: tuple[Picture, ...]
    shifts: tuple[tuple[int, int], ...]

    @property
    def smallest_side(self) -> int:
        """No crop may be larger: views of one scene may differ in size."""
        return min(min(view.shape[:2]) for view in self.views)


def find_scenes(folder: Path) -> dict[str, list[Path]]:
    """Every folder below `folder` that holds pictures, as scene name -> sorted files."""
    scenes: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            scenes.setdefault(str(path.parent.relative_to(folder)), []).append(path)
    if not scenes:
        raise UsageError(f"{folder}: holds no pictures; give a folder of scenes, each a folder of views")
    return scenes


def global_shift(reference: Picture, other: Picture) -> tuple[int, int]:
    """Shift (rows, columns) that takes a point of `reference` to `other`, by phase correlation at 1/8 size."""
    height = min(reference.shape[0], other.shape[0]) // COARSE
    width = min(reference.shape[1], other.shape[1]) // COARSE
    window = np.outer(np.hanning(height), np.hanning(width))

    def spectrum(picture: Picture) -> NDArray[np.complex128]:
        grey = picture[: height * COARSE, : width * COARSE].mean(axis=2)
        grey = grey.reshape(height, COARSE, width, COARSE).mean(axis=(1, 3))
        return np.fft.fft2((grey - grey.mean()) * window)

    cross = spectrum(other) * spectrum(reference).conj()
    surface = np.fft.ifft2(cross / (np.abs(cross) + 1e-9)).real
    row, column = divmod(int(surface.argmax()), width)
    row = row - height if row > height // 2 else row
    column = column - width if column > width // 2 else column
    return row * COARSE, column * COARSE


def read_rgb(file: Path) -> Picture:
    """Any picture as [H, W, 3] uint8: in training alpha and depth do not matter."""
    try:
        return np.asarray(Image.open(file).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise PictureError(f"{file}: cannot be read as a picture: {error}") from error


def load_scenes(folder: Path, progress: bool = False) -> list[Scene]:
    """Decode every scene below `folder`; a few GB for a few thousand megapixels."""
    found = find_scenes(folder)
    scenes = []
    for name, files in tqdm(found.items(), desc="loading", disable=not progress, leave=False):
        views = tuple(read_rgb(file) for file in files)
        shifts = ((0, 0), *(global_shift(views[0], view) for view in views[1:]))
        scenes.append(Scene(name, views, shifts))
    return scenes


@dataclass(frozen=True)
class CropSampler:
    """Random crops [B, K, 3, size, size] in [0, 1]: `batch` scenes, `views` overlapping views each."""

    scenes: list[Scene]
    size: int
    seed: int

    def batch(self, step: int, batch: int, views: int) -> Tensor:
        rng = np.random.default_rng((self.seed, step))
        usable = [s for s in self.scenes if len(s.views) >= views and s.smallest_side >= self.size]
        if not usable:
            raise UsageError(f"no scene has {views} views of at least {self.size}x{self.size}")
        # A scene counts by its number of views: each photograph is seen about equally often.
        weight = np.array([len(s.views) for s in usable], dtype=np.float64)
        chosen = rng.choice(len(usable), size=batch, p=weight / weight.sum())
        crops = np.stack([self._crop_set(usable[i], views, rng) for i in chosen])
        return torch.from_numpy(crops).permute(0, 1, 4, 2, 3).float().div_(255)

    def _crop_set(self, scene: Scene, views: int, rng: np.random.Generator) -> Picture:
        order = rng.permutation(len(scene.views))[:views]
        base_row, base_column = scene.shifts[order[0]]
        height, width = scene.views[order[0]].shape[:2]
        row = int(rng.integers(0, height - self.size + 1))
        column = int(rng.integers(0, width - self.size + 1))
        crops = []
        for view in order:
            picture, (dr, dc) = scene.views[view], scene.shifts[view]
            top = int(np.clip(row + dr - base_row, 0, picture.shape[0] - self.size))
            left = int(np.clip(column + dc - base_column, 0, picture.shape[1] - self.size))
            crops.append(picture[top : top + self.size, left : left + self.size])
        stack = np.stack(crops)
        flip = rng.integers(0, 4)  # the same for all views, so that geometry stays consistent
        if flip & 1:
            stack = stack[:, :, ::-1]
        if flip & 2:
            stack = stack[:, ::-1]
        return stack


def centre_crops(scenes: list[Scene], size: int) -> Iterator[tuple[str, Tensor]]:
    """Validation: per scene its overlapping centre crops [1, K, 3, size, size], the same every time.

    A scene with smaller views gives the largest crop that is a multiple of 64.
    """
    largest = size
    for scene in scenes:
        size = min(largest, scene.smallest_side // PAD_MULTIPLE * PAD_MULTIPLE)
        if size == 0:
            raise UsageError(f"{scene.name}: views of a validation scene need at least {PAD_MULTIPLE} pixels a side")
        height, width = scene.views[0].shape[:2]
        crops = []
        for picture, (dr, dc) in zip(scene.views, scene.shifts, strict=True):
            top = int(np.clip((height - size) // 2 + dr, 0, picture.shape[0] - size))
            left = int(np.clip((width - size) // 2 + dc, 0, picture.shape[1] - size))
            crops.append(picture[top : top + size, left : left + size])
        yield scene.name, torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255)[None]
