"""What is measured: one point per view, codec and setting, kept in JSON Lines so that a run can be taken up again."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvcodec.errors import PictureError, UsageError
from mvcodec.evaluation import metrics
from mvcodec.frames import find_scenes, name_of
from mvcodec.images import read_named

MEAN = "mean"  # the "scene" of a mean over scenes


class View(NamedTuple):
    """One picture of a scene, [H, W, 3] uint8, and a checksum that tells whether a kept point is about it."""

    name: str
    pixels: NDArray[np.uint8]
    crc: int


class Scene(NamedTuple):
    """Overlapping pictures of one place."""

    name: str
    views: tuple[View, ...]

    def crc_of(self, view: View) -> int:
        """Of the view and, where others are coded or decoded with it, of theirs: what they show moves its point."""
        if len(self.views) == 1:
            return view.crc
        return zlib.crc32(repr((view.crc, [other.crc for other in self.views])).encode())


@dataclass(frozen=True)
class Point:
    """One view coded at one setting. `version` is what the codec was: settings of a peer, hash of our weights."""

    codec: str
    version: str
    scene: str
    view: str
    views: int  # of the scene, decoded together where decoding is joint
    crc: int  # of the originals' pixels: `Scene.crc_of`
    setting: float
    bytes: int
    bpp: float
    psnr_db: float
    ms_ssim: float | None  # None for pictures too small to have one
    extra: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def key(self) -> tuple[Any, ...]:
        return self.codec, self.version, self.scene, self.view, self.views, self.crc, self.setting


def measure(
    codec: str,
    version: str,
    scene: Scene,
    view: View,
    setting: float,
    size_bytes: int,
    decoded: NDArray[np.uint8],
    **extra: float,
) -> Point:
    """The point of a view that was coded into `size_bytes` and came back as `decoded`."""
    height, width = view.pixels.shape[:2]
    similarity = metrics.ms_ssim(view.pixels, decoded)
    return Point(
        codec=codec,
        version=version,
        scene=scene.name,
        view=view.name,
        views=len(scene.views),
        crc=scene.crc_of(view),
        setting=setting,
        bytes=size_bytes,
        bpp=8 * size_bytes / (height * width),
        psnr_db=metrics.psnr(view.pixels, decoded),
        ms_ssim=None if similarity != similarity else similarity,
        extra=extra,
    )


class Ledger:
    """Points in a file, appended as they come. What is in it is not measured again.

    UsageError for a file that is no text.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.points: dict[tuple[Any, ...], Point] = {}
        try:
            kept = path.read_text("utf-8") if path.exists() else ""
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: is not a file of points, which is text; name another") from error
        if kept and not kept.endswith("\n"):
            with path.open("a") as file:
                file.write("\n")  # close a line that an interruption cut short
        for line in kept.splitlines():
            try:
                point = Point(**json.loads(line))
                self.points[point.key] = point
            except (ValueError, TypeError):  # cut short, or of an older format
                continue

    def get(self, codec: str, version: str, scene: Scene, view: View, setting: float) -> Point | None:
        return self.points.get((codec, version, scene.name, view.name, len(scene.views), scene.crc_of(view), setting))

    def add(self, points: Sequence[Point]) -> None:
        """Keep points, in memory and at once in the file."""
        with self.path.open("a") as file:
            file.writelines(json.dumps(dataclasses.asdict(point)) + "\n" for point in points)
        self.points |= {point.key: point for point in points}


def read_scenes(
    folder: Path, names: Sequence[str] = (), limit_views: int | None = None, results: Path | None = None
) -> Iterator[Scene]:
    """The scenes below `folder` as `find_scenes` has them, read one at a time; `names` picks some.

    UsageError for names that are not there and for folders of no scenes, PictureError for what peers cannot code.
    """
    found = find_scenes(folder, results)
    if unknown := [name for name in names if name not in found]:
        raise UsageError(f"{folder}: has no scene {', '.join(unknown)}")
    if MEAN in (names or found):
        raise UsageError(f"{folder / MEAN}: tables have the mean of all scenes under this name; rename the folder")
    for name in dict.fromkeys(names or found):
        views = []
        for path in found[name][:limit_views]:
            pixels = read_named(path).pixels
            if pixels.dtype != np.uint8 or pixels.ndim != 3:
                raise PictureError(f"{path}: evaluation compares 8-bit RGB pictures, which all peers code")
            camera = name_of(path).camera_id
            views.append(View(camera, pixels.astype(np.uint8), zlib.crc32(pixels.tobytes())))
        yield Scene(name, tuple(views))
