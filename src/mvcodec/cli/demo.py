"""`mvcodec demo`: a real scene from pictures to pictures, one camera at a time in, all together out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from mvcodec.cli.report import Report, reporting, running
from mvcodec.errors import UsageError
from mvcodec.files import atomic, shipped
from mvcodec.frames import STREAM_SUFFIX, find_scenes, name_of

if TYPE_CHECKING:
    from mvcodec.images import Image

COMPARISON = "comparison.png"
MARK = ".mvcodec-demo"  # of a folder in which a demo has begun to write: a later one may write anew
COLUMNS = f"{'camera':<26}{'bytes':>9}{'bpp':>8}{'PSNR':>17}{'MS-SSIM':>19}{'seconds':>16}"
UNITS = f"{'':<26}{'':>9}{'':>8}{'alone  joint':>17}{'alone   joint':>19}{'encode  decode':>16}"


class View(NamedTuple):
    """One camera's picture of one instant, and its file."""

    path: Path
    camera: str
    frame: int | None
    original: Image
    file: bytes
    encode_seconds: float


@click.command(short_help="Encode and decode a real scene of three cameras.")
@click.argument("scene", required=False, metavar="[DIR]", type=click.Path(exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    default="demo",
    show_default=True,
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Everything lands here.",
)
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=50.0, show_default=True)
@running
@reporting
def demo(report: Report, scene: str | None, output: str, quality: float, model: str | None, device: str) -> None:
    """Encode the example scene (or DIR) one camera at a time, decode all views of an instant together, and compare.

    Writes the .phv files, the decoded pictures and comparison.png: per view the original, JPEG of as many
    bytes, the picture decoded alone, and decoded jointly.
    """
    import numpy as np

    from mvcodec import api, images
    from mvcodec.cli.comparison import compare
    from mvcodec.evaluation.metrics import ms_ssim, psnr

    place, folder = Path(scene) if scene else shipped("examples/nineveh"), Path(output)
    scenes = find_scenes(place, results=folder)
    targets = _targets(scenes, place, folder)
    weights = api.load_model(model, device)
    with atomic(folder / MARK):
        pass
    report.note(f"model {weights.name} {weights.id.hex()} on {weights.device}, quality {quality:g}")

    def encode(path: Path) -> View:
        """One camera alone: no other view is opened."""
        camera, frame, _ = name_of(path)
        original = images.read_named(path)
        started = time.perf_counter()
        data = api.encode(original, quality=quality, camera_id=camera, frame=frame, model=weights)
        seconds = time.perf_counter() - started
        with atomic(targets[path].with_suffix(STREAM_SUFFIX)) as file:
            file.write(data)
        return View(path, camera, frame, original, data, seconds)

    report.show(COLUMNS, UNITS)
    measured: list[dict[str, float]] = []
    rows = []
    for paths in scenes.values():
        views = [encode(path) for path in paths]
        started = time.perf_counter()
        decoded = api.decode_set([view.file for view in views], model=weights)
        decode_seconds = (time.perf_counter() - started) / len(views)
        pictures = {picture.header.camera_id: picture.image for picture in decoded}
        for view in views:
            original, joint = view.original, pictures[view.camera]
            alone = api.decode(view.file, model=weights).image
            target = targets[view.path]
            images.write(target, joint)
            figures = {
                "bytes": len(view.file),
                "bpp": 8 * len(view.file) / (original.width * original.height),
                "psnr_alone_db": psnr(original.pixels, alone.pixels),
                "psnr_joint_db": psnr(original.pixels, joint.pixels),
                "ms_ssim_alone": ms_ssim(original.pixels, alone.pixels),
                "ms_ssim_joint": ms_ssim(original.pixels, joint.pixels),
                "encode_seconds": view.encode_seconds,
                "decode_seconds": decode_seconds,
            }
            measured.append(figures)
            name = target.relative_to(folder).with_suffix("").as_posix()
            record = {"camera_id": view.camera, "frame": view.frame, "output": str(target), **figures}
            report.result(record, _row(name, figures))
            rows.append(compare(name, original, view.file, alone, joint))
    report.show(_row("mean", {key: sum(f[key] for f in measured) / len(measured) for key in measured[0]}))
    images.write(folder / COMPARISON, images.Image(np.vstack(rows)))
    report.note(f"pictures, .phv files and {COMPARISON} are in {folder}")


def _targets(scenes: Mapping[str, Sequence[Path]], place: Path, folder: Path) -> dict[Path, Path]:
    """Where the decoded picture of each file goes; UsageError where something else is, or goes, there."""
    originals = {path.resolve() for paths in scenes.values() for path in paths}
    taken = {folder / COMPARISON: "the comparison"}
    targets: dict[Path, Path] = {}
    for paths in scenes.values():
        cameras = [name_of(path).camera_id for path in paths]
        for path, camera in zip(paths, cameras, strict=True):
            target = targets[path] = (folder / path.relative_to(place)).with_suffix(".png")
            if cameras.count(camera) > 1:
                raise UsageError(
                    f"{path}: is one of {cameras.count(camera)} pictures of camera {camera} at one instant; keep one"
                )
            if target in taken:
                raise UsageError(
                    f"{target}: both {taken[target]} and {path} would be written there; rename the picture"
                )
            taken[target] = str(path)
    if lost := [target for target in taken if target.resolve() in originals]:
        raise UsageError(f"{lost[0]}: is one of the pictures; name another folder with -o")
    files = [*taken, *(target.with_suffix(STREAM_SUFFIX) for target in targets.values())]
    if not (folder / MARK).exists() and (foreign := [file for file in files if file.exists()]):
        raise UsageError(f"{foreign[0]}: is of no earlier demo; name another folder with -o")
    return targets


def _row(name: str, figures: Mapping[str, float]) -> str:
    return (
        f"{name:<26}{figures['bytes']:>9.0f}{figures['bpp']:>8.3f}"
        f"{figures['psnr_alone_db']:>10.2f}{figures['psnr_joint_db']:>7.2f}"
        f"{figures['ms_ssim_alone']:>11.4f}{figures['ms_ssim_joint']:>8.4f}"
        f"{figures['encode_seconds']:>8.2f}{figures['decode_seconds']:>8.2f}"
    )
