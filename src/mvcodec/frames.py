"""Files and folders -> sets of views of one instant. No torch.

Two questions are answered here, and nowhere else:

1. Which camera, which frame? From the name, when it says so (`name_of`):

       C1/00000000.png, left/0012.png      folder named like a camera, number -> camera "C1", frame 0
       cam3_00000000.png, left-0012.png    camera, separator, number          -> camera "cam3", frame 0
       scene/DSC_0423.jpg                  anything else: one view of a still scene, no frame

   `DSC_0423` must not become frame 423 of camera "DSC": the first part has to look like a camera. Other trees
   are described by a pattern such as "{camera}/{frame}" or "take7_{frame}_{camera}".
2. Which views belong together? Those of one instant (`instants`): same frame number, or else same time, or
   else same folder. Never by position in a list: cameras drop frames independently. A folder of many recordings
   is sorted into scenes, each an instant of one place (`find_scenes`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from mvcodec.container import MAX_CAMERA_ID, MAX_COUNT
from mvcodec.errors import UsageError

AUTO = "auto"
PICTURE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".avif", ".mpo"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
STREAM_SUFFIX = ".phv"
MAX_PIXELS = 2**27
"""Default cap on width * height (134 megapixels): a few bytes can claim to be any picture."""

_CAMERA = r"(?:c|cam|camera|view|v|image_)[-_]?\d+|left|right"
_AUTO_PATTERNS = (  # l and r are folders alone: r_0.png is a picture of a NeRF scene
    re.compile(rf"(?:.*/)?(?P<camera>{_CAMERA}|l|r)/(?P<frame>\d+)", re.IGNORECASE),
    re.compile(rf"(?:.*/)?(?P<camera>{_CAMERA})[-_](?P<frame>\d+)", re.IGNORECASE),
)
_FIELDS = {"camera": r"(?P<camera>[^/]+?)", "frame": r"(?P<frame>\d+)", "time_us": r"(?P<time_us>\d+)"}

T = TypeVar("T")


class ViewName(NamedTuple):
    """What a file's name says about the view in it."""

    camera_id: str
    frame: int | None = None
    timestamp_us: int | None = None


class Instant(NamedTuple):
    """When, or for a still scene where, a view was taken: the key by which views come together."""

    frame: int | None = None
    timestamp_us: int | None = None
    place: str = ""

    @property
    def is_timed(self) -> bool:
        return self.frame is not None or self.timestamp_us is not None

    def __str__(self) -> str:
        where = f" in {self.place}" if self.place not in ("", ".") else ""
        if self.frame is not None:
            return f"frame {self.frame}{where}"
        if self.timestamp_us is not None:
            return f"time {self.timestamp_us} us{where}"
        return f"scene {self.place}" if self.place else "the scene"


@dataclass(frozen=True)
class Source:
    """An input file, its path below the inputs' common folder (what the output mirrors), and its scene.

    `place` is the folder in which a file was found; files named outright are one scene, wherever they lie.
    """

    path: Path
    relative: Path
    place: str = ""


def name_of(path: Path, pattern: str = AUTO) -> ViewName:
    """Camera and time from a path; with a `pattern`, UsageError where the path does not fit it.

    Its folder counts where it is not spelled out, too: 0007.png named inside C1 is a picture of C1.
    """
    stem = absolute(path).with_suffix("").as_posix()
    if pattern == AUTO:
        match = next((m for p in _AUTO_PATTERNS if (m := p.fullmatch(stem))), None)
        if match is None or int(match["frame"]) > MAX_COUNT:
            return ViewName(_valid_id(path.stem))
        return ViewName(_valid_id(match["camera"]), int(match["frame"]))
    match = _compiled(pattern).fullmatch(stem)
    if match is None:
        raise UsageError(f"{path}: does not fit the name pattern {pattern!r}")
    found = match.groupdict()
    frame, time_us = found.get("frame"), found.get("time_us")
    return ViewName(
        found.get("camera") or "",
        None if frame is None else int(frame),
        None if time_us is None else int(time_us),
    )


def _valid_id(name: str) -> str:
    """The name, or where a file cannot hold it as a camera id what it can, and a hash that keeps such ids apart."""
    raw = name.encode("utf-8", "surrogatepass")  # names of files may be no UTF-8
    kept = re.sub(r"[\x00-\x1f\x7f-\x9f/\\\ud800-\udfff]", "_", name)
    if kept == name and len(raw) <= MAX_CAMERA_ID and name not in (".", ".."):
        return name
    return shortened(kept.encode(), raw, MAX_CAMERA_ID)


def shortened(kept: bytes, raw: bytes, longest: int) -> str:
    """The beginning of what is kept of a name, and a hash of all of it: at most so many bytes."""
    short = kept[: longest - 9].decode(errors="ignore")  # no half of a character
    return f"{short}-{hashlib.sha256(raw).hexdigest()[:8]}"


def _compiled(pattern: str) -> re.Pattern[str]:
    """From "{camera}/{frame}" to a regular expression for the end of a path without its suffix."""
    parts = re.split(r"\{(\w*)\}", pattern)
    literals, names = parts[::2], parts[1::2]
    unknown = [name for name in names if name not in _FIELDS]
    if unknown or not names or len(set(names)) < len(names):
        raise UsageError(f"name pattern {pattern!r}: use each of {{camera}}, {{frame}}, {{time_us}} at most once")
    body = re.escape(literals[0])
    for name, literal in zip(names, literals[1:], strict=True):
        body += _FIELDS[name] + re.escape(literal)
    return re.compile(rf"(?:.*/)?{body}")


def find(inputs: Sequence[str | os.PathLike[str]], suffixes: Iterable[str]) -> list[Source]:
    """The files named, and those with one of `suffixes` in the folders named, sorted within each folder.

    A file named outright is taken whatever its ending. UsageError where an input does not exist or a folder
    holds nothing; the same file named twice, in whatever spelling, is taken once, as one of its folder.
    """
    wanted = frozenset(suffixes)
    if "" in inputs:
        raise UsageError("an input is empty; name a file or a folder")
    paths = [Path(given) for given in inputs]
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path}: no such file or folder")
    alone = len(paths) == 1 and paths[0].is_dir()
    root = Path(os.path.commonpath(absolute(p) if alone else absolute(p).parent for p in paths))
    found: dict[Path, Source] = {}
    for path in paths:
        if path.is_dir():
            inside = _files_below(path, wanted)
            if not inside:
                raise UsageError(f"{path}: holds no {'.phv files' if STREAM_SUFFIX in wanted else 'pictures'}")
            for file in inside:
                found[absolute(file)] = Source(file, absolute(file).relative_to(root), str(file.parent))
        else:
            found.setdefault(absolute(path), Source(path, absolute(path).relative_to(root)))
    return list(found.values())


def absolute(path: Path) -> Path:
    """The path from the root on, without `..`: it begins with the folder it lies in, and is the file's one name."""
    return Path(os.path.abspath(path))  # noqa: PTH100  # Path.absolute keeps `..`


def instants(views: Iterable[T], when: Callable[[T], Instant], window_us: int = 0) -> list[tuple[Instant, list[T]]]:
    """Group views by instant, in order of time; inside a group the order of `views` is kept.

    The frame number decides where there is one. Views with a timestamp alone come together when they lie
    within `window_us` of the first of them, because free-running clocks never agree to the microsecond. Views
    with neither are a still scene: those of one place.
    """
    framed: dict[int, list[T]] = {}
    timed: list[tuple[int, T]] = []
    still: dict[str, list[T]] = {}
    for view in views:
        instant = when(view)
        if instant.frame is not None:
            framed.setdefault(instant.frame, []).append(view)
        elif instant.timestamp_us is not None:
            timed.append((instant.timestamp_us, view))
        else:
            still.setdefault(instant.place, []).append(view)
    groups = [(Instant(place=place), still[place]) for place in sorted(still)]
    groups += [(Instant(frame), framed[frame]) for frame in sorted(framed)]
    start: int | None = None
    for time_us, view in sorted(timed, key=lambda pair: pair[0]):
        if start is None or time_us - start > window_us:
            start = time_us
            groups.append((Instant(None, start), []))
        groups[-1][1].append(view)
    return groups


def find_scenes(folder: Path, results: Path | None = None) -> dict[str, list[Path]]:
    """The pictures below `folder` as scene name -> sorted files, one scene for each place and instant.

    results: where output goes. What an earlier run left there, below `folder`, is no input; nor are dead links.
    UsageError where it is `folder` itself, or where there are no pictures.
    """
    if results is not None and results.resolve() == folder.resolve():
        raise UsageError(f"{results}: is the folder of the pictures; name another for the output")
    left_out = results if results is not None and _below(results, folder) else None
    scenes: dict[str, list[Path]] = {}
    for path in _files_below(folder, PICTURE_SUFFIXES):
        if path.exists() and (left_out is None or not _below(path, left_out)):
            scenes.setdefault(scene_of(path, folder), []).append(path)
    if not scenes:
        raise UsageError(f"{folder}: holds no pictures; give a folder of scenes, each a folder of views")
    return scenes


def scene_of(path: Path, folder: Path) -> str:
    """C1/0007.png belongs with C2/0007.png, cam1_0007.png with cam2_0007.png, anything else with its folder.

    Scenes are named from `folder` on; it may be a camera's own.
    """
    camera, frame, _ = name_of(path)
    below = path.relative_to(folder)
    return str(below.parent if frame is None else place_of(below, camera) / str(frame))


def place_of(path: Path, camera: str) -> Path:
    """Where the cameras of a view's rig are: above its folder if that is the camera's own, else in it."""
    return path.parent.parent if path.parent.name == camera else path.parent


def _files_below(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """The files with one of `suffixes` anywhere below, sorted.

    Links to folders are followed at the top, where scenes and cameras are, unless they lead back up: each walk ends.
    What begins with "._" is no picture, but what macOS knows about one. A link that leads nowhere is there, and so is a
    folder that may not be read: for whoever reads it to tell.
    """
    linked = [path for path in folder.glob("*") if path.is_symlink() and path.is_dir() and not _below(folder, path)]
    found: list[Path] = []

    def keep(error: OSError) -> None:
        found.append(Path(error.filename))

    for top in (folder, *linked):
        for place, _, names in os.walk(top, onerror=keep):
            named = (Path(place, name) for name in names if not name.startswith("._"))
            found += [path for path in named if path.suffix.lower() in suffixes and _readable(path)]
    return sorted(found)


def _readable(path: Path) -> bool:
    """Whether it can be read as a file, or it can be told why not."""
    try:
        return path.is_file() or not path.exists()
    except PermissionError:
        return True


def _below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def safe_path(camera_id: str, frame: int | None, timestamp_us: int | None) -> Path:
    """A relative path `camera/frame` for a view that came without a file name.

    The camera id comes from the received file: whatever could leave the output folder is replaced.
    """
    camera = re.sub(r"[^\w.+ -]", "_", camera_id).strip(". ")[:100] or "view"
    if frame is not None:
        return Path(camera, f"{frame:08d}")
    return Path(camera) if timestamp_us is None else Path(camera, str(timestamp_us))
