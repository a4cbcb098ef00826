"""`mvcodec bench`: seconds per stage on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mvcodec.cli.report import Report, reporting, running, within_memory
from mvcodec.cli.targets import sources
from mvcodec.errors import UsageError
from mvcodec.files import shipped
from mvcodec.frames import MAX_PIXELS, PICTURE_SUFFIXES, Instant, Source, instants, name_of

_IMPORT = "import time; began = time.{0}(); import mvcodec.api; print(time.{0}() - began)"


def _size(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)
    width, height = map(int, found.groups()) if found else (0, 0)
    if not 0 < width * height <= MAX_PIXELS:
        raise UsageError(f"--size {value}: use pixels such as 1920x1080, at most {MAX_PIXELS} in all")
    return width, height


@click.command(short_help="Measure the time of every stage.")
@click.argument("inputs", nargs=-1, metavar="[PICTURE|DIR]...")
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=50.0, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Measured repetitions.")
@click.option(
    "--warmup", type=click.IntRange(min=0), help="Unmeasured ones before. Default: 1; 2 on a GPU, which records graphs."
)
@click.option("--views", type=click.IntRange(min=1), metavar="K", help="Decode so many views. Default: all pictures.")
@click.option("--size", metavar="WxH", callback=_size, help="Repeat and cut the pictures to this size.")
@click.option("--preview", is_flag=True, help="Decode each view alone.")
@click.option(
    "--untrained",
    type=click.Choice(["fast", "paper"]),
    help="Random weights of this profile: times hardly depend on them.",
)
@click.option("--cpu-time", is_flag=True, help="Seconds of the processor: the machine is busy with other things.")
@within_memory
@running
@reporting
def bench(
    report: Report,
    inputs: tuple[str, ...],
    quality: float,
    runs: int,
    warmup: int | None,
    views: int | None,
    size: tuple[int, int] | None,
    preview: bool,
    untrained: str | None,
    cpu_time: bool,
    max_memory: int | None,
    model: str | None,
    device: str,
) -> None:
    """Measure the time of every stage on the given views of one place, or on the example scene.

    Start is what a first call pays; encoding is that of one camera, the first picture; decoding is that of all
    views together. Median and interquartile range over the runs, after a warm-up, the device synchronised around
    every stage. The floor is what the convolutions would take at the machine's measured best.
    """
    from mvcodec import api, codec, images
    from mvcodec.evaluation import speed

    if "-" in inputs:
        raise UsageError("-: bench takes no stdin; name pictures or folders")
    found = sources(inputs or [str(shipped("examples/nineveh"))], PICTURE_SUFFIXES)
    (instant, together), *others = instants(found, _when)
    if others:
        report.note(f"measures {instant}; {len(found) - len(together)} pictures of other times or places are left out")
    paths = [view.path for view in together]
    if untrained is not None and model is not None:
        raise UsageError("--untrained and --model exclude each other")
    if untrained is None:
        loaded = api.load_model(model, device)
    else:
        folder = click.get_current_context().with_resource(tempfile.TemporaryDirectory())
        loaded = speed.untrained(untrained, Path(folder), api.resolve_device(device))
    warmup = (1 if loaded.device.type == "cpu" else 2) if warmup is None else warmup
    given = [images.read_named(path) for path in paths]
    if size is not None:
        given = [speed.of_size(view, *size) for view in given]
    given = [given[k % len(given)] for k in range(views or len(given))]
    picture = paths[0].read_bytes() if size is None else images.to_bytes(given[0])
    files = [  # within the budget: one that cannot do is told before anything is measured
        codec.encode_image(loaded, view, quality, camera_id=str(k), max_memory=max_memory)
        for k, view in enumerate(given)
    ]

    clock = speed.PROCESSOR if cpu_time else speed.WALL
    common = {"model": loaded.name, "quality": quality, "cpu_time": cpu_time, **speed.machine(loaded.device)}
    reached = speed.ceilings(loaded.device, clock)

    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = _IMPORT.format(clock.__name__)
    imported = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=path)
    start = speed.measure(speed.loading(str(loaded.path), loaded.device), loaded, runs, warmup, clock)
    start["stages"] = {"import": speed.spread([float(imported.stdout)]), "load": start["stages"]["load"]}
    start["total_ms"] = round(sum(stage["median_ms"] for stage in start["stages"].values()), 3)
    start |= {"task": "start", "ceilings": reached, **common}
    report.result(start, *_table(start))

    tasks = {
        "encode": (speed.encoding(loaded, picture, quality, max_memory), given[:1]),
        "decode": (speed.decoding(loaded, files, joint=not preview, max_memory=max_memory), given),
    }
    for name, (task, shown) in tasks.items():
        megapixels = sum(view.width * view.height for view in shown) / 1e6
        record = {"task": name, "views": len(shown), "megapixels": round(megapixels, 3), **common}
        record |= speed.measure(task, loaded, runs, warmup, clock)
        record["floor_ms"] = speed.floors_ms(speed.count_work(loaded, task), loaded, reached)
        record["mp_per_s"] = round(1000 * megapixels / record["total_ms"], 3)
        record["frames_per_s"] = round(1000 * len(shown) / record["total_ms"], 3)
        report.result(record, *_table(record))


def _when(view: Source) -> Instant:
    """What is named outright is meant, all of it."""
    return Instant(name_of(view.path).frame, place=view.place) if view.place else Instant()


def _table(record: dict[str, Any]) -> list[str]:
    views = {0: "", 1: ", 1 view"}.get(record.get("views", 0), f", {record.get('views')} views")
    pixels = f", {record['megapixels']} MP" if "megapixels" in record else ""
    lines = [f"{record['task']}{views}{pixels}, {record['device_name']} ({record['device']})"]
    for stage, spread in record["stages"].items():
        floor = record.get("floor_ms", {}).get(stage)
        beside = "" if floor is None else f"   floor {floor:>8.1f}"
        lines.append(f"  {stage:<12}{spread['median_ms']:>10.1f} ms  +-{spread['iqr_ms']:>8.1f}{beside}")
    lines.append(f"  {'total':<12}{record['total_ms']:>10.1f} ms  +-{record['total_iqr_ms']:>8.1f}")
    for name, reason in ((record.get("graphs") or {}).get("refused") or {}).items():
        lines.append(f"  {name} runs without a graph: {reason}")
    rates = f"{record['mp_per_s']} MP/s, {record['frames_per_s']} frames/s, " if "mp_per_s" in record else ""
    used = f"peak memory {record['peak_memory_mb']} MB, {record['threads']} threads, {record['precision']}"
    return [*lines, f"  {rates}{used}"]
