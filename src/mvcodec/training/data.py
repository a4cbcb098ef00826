"""Scenes of overlapping photographs in memory.

A scene is a folder of pictures (`DATA/scene/view.webp`, also one level deeper for shards) or an instant of a rig
(`DATA/C1/0007.png`, `DATA/cam1_0007.png`). All are decoded once and kept as uint8. How the views of a scene lie to each
other is found once and kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from filecmp import cmp
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from mvcodec.errors import UsageError
from mvcodec.files import atomic
from mvcodec.frames import find_scenes
from mvcodec.images import read_named
from mvcodec.parahydra import PAD_MULTIPLE

Picture = NDArray[np.uint8]  # [H, W, 3]
COARSE = 8  # global shifts are found at 1/8
READING = 3  # counts changes of what `read_rgb` makes of a file: shifts found before are found anew


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


def global_shift(reference: Picture, other: Picture) -> tuple[int, int]:
    """Shift (rows, columns) that takes a point of `reference` to `other`, by phase correlation at 1/8 size."""
    height = min(reference.shape[0], other.shape[0]) // COARSE
    width = min(reference.shape[1], other.shape[1]) // COARSE
    if min(height, width) < 2:  # too small to tell
        return 0, 0
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
    """A picture as the codec will see it, upright, as [H, W, 3] uint8; in training alpha and depth do not matter.

    Raises PictureError for what `mvcodec encode` refuses, too.
    """
    pixels = read_named(file, alpha="drop").pixels
    seen = (pixels if pixels.dtype == np.uint8 else pixels >> 8).astype(np.uint8, copy=False)
    return seen if seen.ndim == 3 else np.repeat(seen[..., None], 3, axis=2)


def calibration_pictures(folder: Path, count: int = 12, side: int = 256) -> list[Tensor]:
    """Centre crops [1, 3, side, side] of the first views of scenes spread over a training folder.

    UsageError if no picture of the folder has 64 pixels a side.
    """
    scenes = list(find_scenes(folder).values())
    spread = [views[0] for views in scenes][:: max(1, len(scenes) // count)][:count]
    crops = list(centres(spread, side)) or list(islice(centres(chain(*scenes), side), count))
    if not crops:
        raise UsageError(f"{folder}: holds no picture of at least {PAD_MULTIPLE} pixels a side to calibrate on")
    return crops


def centres(files: Iterable[Path], side: int) -> Iterator[Tensor]:
    """[1, 3, H, W] in [0, 1] from the middle of each picture, H and W at most `side`; none of those under 64 pixels."""
    for file in files:
        picture = read_rgb(file)
        height, width = (min(side, n // PAD_MULTIPLE * PAD_MULTIPLE) for n in picture.shape[:2])
        if height and width:
            top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
            crop = picture[top : top + height, left : left + width].copy()
            yield torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255


def load_scenes(folder: Path, progress: bool = False) -> list[Scene]:
    """Decode every scene below `folder`; a few GB for a few thousand megapixels."""
    cache = ShiftCache(folder)
    scenes = []
    for name, files in tqdm(find_scenes(folder).items(), desc="loading", disable=not progress, leave=False):
        views = tuple(read_rgb(file) for file in files)
        scenes.append(Scene(name, views, cache.shifts(name, files, views)))
    cache.save()
    return scenes


class ShiftCache:
    """The shifts of one data folder's scenes, in the user's cache folder, valid while its files stay as they are."""

    def __init__(self, folder: Path) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(f"{READING} {folder.resolve()}".encode()).hexdigest()[:16]
        self.file = home / "mvcodec" / "shifts" / f"{name}.json"
        self.known: dict[str, dict[str, list]] = {}
        with suppress(OSError, ValueError, TypeError):  # absent or spoilt: found anew
            self.known = dict(json.loads(self.file.read_text()))
        self.changed = False

    def shifts(self, name: str, files: list[Path], views: tuple[Picture, ...]) -> tuple[tuple[int, int], ...]:
        """Shift (rows, columns) of each view against the first."""
        key = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        with suppress(KeyError, ValueError, TypeError):  # unknown, or spoilt
            entry = self.known[name]
            if entry["files"] == key and len(entry["shifts"]) == len(files):
                return tuple((int(row), int(column)) for row, column in entry["shifts"])
        found = ((0, 0), *(global_shift(views[0], view) for view in views[1:]))
        self.known[name] = {"files": key, "shifts": list(found)}
        self.changed = True
        return found

    def save(self) -> None:
        """Keep what was found; a cache that cannot be written costs time, nothing else."""
        if self.changed:
            with suppress(OSError), atomic(self.file) as file:
                file.write(json.dumps(self.known).encode())


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each picture below `folder`: what tells whether they are still the same."""
    found = ((file, file.stat()) for files in find_scenes(folder).values() for file in files)
    return [(str(file.relative_to(folder)), stat.st_size, stat.st_mtime_ns) for file, stat in found]


def refuse_overlap(data: Path, validation: Path) -> None:
    """UsageError if a picture of `validation`, by path or by content, is also one of `data`."""
    by_size: dict[int, list[Path]] = {}
    for file in (file for files in find_scenes(data).values() for file in files):
        by_size.setdefault(file.stat().st_size, []).append(file)
    for file in (file for files in find_scenes(validation).values() for file in files):
        for other in by_size.get(file.stat().st_size, []):
            if file.samefile(other) or cmp(file, other, shallow=False):
                raise UsageError(f"{file}: is also a training picture ({other}); validate on scenes of their own")


def check_validation(scenes: list[Scene]) -> None:
    """UsageError where a scene is too small for `centre_crops`."""
    for scene in scenes:
        if scene.smallest_side < PAD_MULTIPLE:
            raise UsageError(f"{scene.name}: views of a validation scene need at least {PAD_MULTIPLE} pixels a side")


def centre_crops(scenes: list[Scene], size: int) -> Iterator[tuple[str, Tensor]]:
    """Validation: per scene its overlapping centre crops [1, K, 3, size, size], the same every time.

    A scene with smaller views gives the largest crop that is a multiple of 64.
    """
    largest = size
    for scene in scenes:
        size = min(largest, scene.smallest_side // PAD_MULTIPLE * PAD_MULTIPLE)
        height, width = scene.views[0].shape[:2]
        crops = []
        for picture, (dr, dc) in zip(scene.views, scene.shifts, strict=True):
            top = int(np.clip((height - size) // 2 + dr, 0, picture.shape[0] - size))
            left = int(np.clip((width - size) // 2 + dc, 0, picture.shape[1] - size))
            crops.append(picture[top : top + size, left : left + size])
        yield scene.name, torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float().div_(255)[None]
