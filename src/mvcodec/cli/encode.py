"""`mvcodec encode`: pictures -> .phv files, each on its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from mvcodec import container
from mvcodec.cli.ahead import ahead
from mvcodec.cli.report import Report, reporting, running, size_in_bytes, within_memory
from mvcodec.cli.targets import STDIN, Targets, label, placing, read, sources
from mvcodec.errors import UsageError
from mvcodec.frames import AUTO, MAX_PIXELS, PICTURE_SUFFIXES, STREAM_SUFFIX, Instant, Source, ViewName, name_of

if TYPE_CHECKING:
    from mvcodec.images import Alpha


@click.command(short_help="Compress pictures, each alone, into .phv files.")
@click.argument("inputs", nargs=-1, required=True, metavar="PICTURE|DIR|-...")
@click.option(
    "-q",
    "--quality",
    type=click.FloatRange(0, 100),
    default=50.0,
    show_default=True,
    help="0 to 100; larger is better and takes more bytes.",
)
@click.option(
    "--target-bpp",
    type=click.FloatRange(0, min_open=True),
    help="Instead of -q: a quality at or within 1 % under so many bits per pixel, found in about eight encodings.",
)
@click.option(
    "--target-size",
    metavar="BYTES",
    callback=size_in_bytes,
    help="Instead of -q: a quality at or within 1 % under so many bytes (50000, 50k, 1.5M).",
)
@placing
@click.option("--camera-id", help="Camera named in the file. Default: from the picture's name or folder.")
@click.option("--frame", type=click.IntRange(min=0), help="Frame number. Default: from the name.")
@click.option("--timestamp-us", type=click.IntRange(min=0), help="Time in microseconds. Default: from the name.")
@click.option(
    "--names",
    default=AUTO,
    show_default=True,
    metavar="PATTERN",
    help='How names are read: auto knows "C1/0007.png" and "cam3_0007.png"; else such as "{camera}/{frame}".',
)
@click.option(
    "--alpha",
    type=click.Choice(["refuse", "drop", "white", "black"]),
    default="refuse",
    show_default=True,
    help="An alpha channel is not coded: drop it, or put the picture on white or black.",
)
@click.option("--strip", is_flag=True, help="Leave out EXIF data and colour profile.")
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=MAX_PIXELS,
    show_default=True,
    help="Refuse larger pictures before anything is allocated.",
)
@click.option(
    "--effort",
    type=click.IntRange(0, 5),
    default=0,
    show_default=True,
    help="Look longer for a better trade: of about as many bytes a better picture. Decoding does not change.",
)
@within_memory
@running
@reporting
def encode(
    report: Report,
    inputs: tuple[str, ...],
    quality: float,
    target_bpp: float | None,
    target_size: int | None,
    output: str | None,
    force: bool,
    skip_existing: bool,
    camera_id: str | None,
    frame: int | None,
    timestamp_us: int | None,
    names: str,
    alpha: Alpha,
    strip: bool,
    max_pixels: int,
    effort: int,
    max_memory: int | None,
    model: str | None,
    device: str,
) -> None:
    """Compress pictures, each alone, into .phv files.

    A folder stands for all pictures in it. Several pictures are one batch: a bad one is reported, the rest is
    done, and the exit code is 6.
    """
    if target_bpp is not None and target_size is not None:
        raise UsageError("--target-bpp and --target-size exclude each other")
    if target_bpp is not None and not math.isfinite(target_bpp):
        raise UsageError(f"--target-bpp {target_bpp}: is not a rate")
    given_quality = click.get_current_context().get_parameter_source("quality") is not ParameterSource.DEFAULT
    if given_quality and (target_bpp is not None or target_size is not None):
        raise UsageError("--quality and a target exclude each other")
    given = sources(inputs, PICTURE_SUFFIXES)
    if len(given) > 1 and (frame is not None or timestamp_us is not None):
        raise UsageError("--frame and --timestamp-us are for one picture; let --names read them from the names")
    views = [_view(source, names, camera_id, frame, timestamp_us) for source in given]
    if camera_id is not None:
        _refuse_twins(given, views)
    targets = Targets(output, inputs, force=force, skip_existing=skip_existing)
    targets.check_stdout(report.as_json)
    paths = targets.plan([(source, STREAM_SUFFIX) for source in given])
    if targets.suffix(STREAM_SUFFIX).lower() in PICTURE_SUFFIXES:
        raise UsageError(f"-o {output}: is the name of a picture; a coded file ends in {STREAM_SUFFIX}")

    from mvcodec import api, codec, images
    from mvcodec.rate_control import encode_within

    weights = api.load_model(model, device)
    report.detail(f"model {weights.name} {weights.id.hex()} on {weights.device}")

    def load(source: Source) -> images.Image:
        image = images.read(read(source), alpha=alpha, max_pixels=max_pixels)
        return image.without_metadata() if strip else image

    def encode_one(wait: Callable[[], images.Image], source: Source, view: ViewName, path: Path) -> None:
        started = time.perf_counter()
        image = wait()
        pixels = image.width * image.height

        def at(quality: float) -> bytes:
            return codec.encode_image(weights, image, quality, **view._asdict(), effort=effort, max_memory=max_memory)

        budget = target_size if target_bpp is None else int(target_bpp * pixels / 8)
        data, used = (at(quality), quality) if budget is None else encode_within(at, budget)
        targets.write(path, data)
        if budget is not None and used == 100:
            report.note(f"{label(source.path)}: at quality 100 it takes no more than {len(data)} bytes")
        seconds = time.perf_counter() - started
        record = {
            "file": label(source.path),
            "output": label(path),
            "bytes": len(data),
            "bpp": round(8 * len(data) / pixels, 6),
            "width": image.width,
            "height": image.height,
            "quality": container.unpack_header(data).quality,  # rounded, as the encoder used it
            **view._asdict(),
            "model_id": weights.id.hex(),
            "seconds": round(seconds, 3),
        }
        text = f"{label(path)}: {len(data)} bytes, {record['bpp']:.3f} bpp, quality {used:g}, {seconds:.2f} s"
        report.result(record, f"{label(source.path)} -> {text}", err=True)

    todo = []
    for source, view, path in zip(given, views, paths, strict=True):
        if targets.skips(path):
            report.skipped(label(source.path), path)
        else:
            todo.append((source, view, path))
    pictures = ahead(load, [source for source, _, _ in todo])
    for wait, (source, view, path) in zip(pictures, report.progress(todo, "encode"), strict=True):
        with report.file(label(source.path)):
            encode_one(wait, source, view, path)
    report.finish()


def _view(source: Source, names: str, camera_id: str | None, frame: int | None, timestamp_us: int | None) -> ViewName:
    """Which camera and when: what the options say, else what the name says."""
    name = ViewName("") if source.path == STDIN else name_of(source.path, names)
    return ViewName(
        name.camera_id if camera_id is None else camera_id,
        name.frame if frame is None else frame,
        name.timestamp_us if timestamp_us is None else timestamp_us,
    )


def _refuse_twins(given: Sequence[Source], views: Sequence[ViewName]) -> None:
    """UsageError where pictures that one --camera-id is given for cannot be told apart."""
    taken: dict[Instant, Source] = {}
    for source, view in zip(given, views, strict=True):
        instant = Instant(view.frame, view.timestamp_us if view.frame is None else None)
        if (other := taken.setdefault(instant, source)) is not source:
            raise UsageError(
                f"--camera-id {view.camera_id}: {other.path} and {source.path} would both be its view of {instant}; "
                "let --names read frames from the names"
            )
