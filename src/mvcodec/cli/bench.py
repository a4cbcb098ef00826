"""`mvcodec bench`: seconds per stage on this machine."""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvcodec.cli.report import Report, reporting, running
from mvcodec.cli.targets import sources
from mvcodec.files import shipped
from mvcodec.frames import PICTURE_SUFFIXES

if TYPE_CHECKING:
    import torch

    from mvcodec.stages import Stopwatch
    from mvcodec.weights import Model


@click.command(short_help="Measure the time of every stage.")
@click.argument("inputs", nargs=-1, metavar="[PICTURE|DIR]...")
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=50.0, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True, help="Measured repetitions.")
@click.option("--warmup", type=click.IntRange(min=0), default=1, show_default=True, help="Unmeasured ones before.")
@click.option("--preview", is_flag=True, help="Decode each view alone.")
@running
@reporting
def bench(
    report: Report,
    inputs: tuple[str, ...],
    quality: float,
    runs: int,
    warmup: int,
    preview: bool,
    model: str | None,
    device: str,
) -> None:
    """Measure the time of every stage on the given views of one place, or on the example scene.

    Encoding is that of one camera, the first picture; decoding is that of all views together. Median and
    interquartile range over the runs, after a warm-up, the device synchronised around every stage.
    """
    from mvcodec import api, codec, images

    pictures = [s.path for s in sources(inputs or [str(shipped("examples/nineveh"))], PICTURE_SUFFIXES)]
    weights = api.load_model(model, device)
    views = [images.read(path) for path in pictures]
    files = [codec.encode_image(weights, v, quality, camera_id=str(k)) for k, v in enumerate(views)]

    def encode_one(watch: Stopwatch) -> None:
        with watch.stage("read"):
            image = images.read(pictures[0])
        codec.encode_image(weights, image, quality)

    def decode_all(watch: Stopwatch) -> None:
        decoded = codec.decode_set(weights, files, joint=not preview)
        with watch.stage("write"), tempfile.TemporaryDirectory() as folder:
            for k, view in enumerate(decoded):
                images.write(Path(folder, f"{k}.png"), view.image)

    common = {
        "model": weights.name,
        "quality": quality,
        "device": str(weights.device),
        **_machine(weights.device),
    }
    for name, task, shown in (
        ("encode", encode_one, views[:1]),
        ("decode", decode_all, views),
    ):
        megapixels = sum(view.width * view.height for view in shown) / 1e6
        record = {"task": name, "views": len(shown), "megapixels": round(megapixels, 3), **common}
        record |= _measure(task, weights, runs, warmup)
        record["mp_per_s"] = round(1000 * megapixels / record["total_ms"], 3)
        record["frames_per_s"] = round(1000 * len(shown) / record["total_ms"], 3)
        report.result(record, _table(record))


def _measure(task: Callable[[Stopwatch], None], model: Model, runs: int, warmup: int) -> dict[str, Any]:
    """Run the task under the stopwatch -> median and interquartile range of stages and total, peak memory."""
    import torch

    from mvcodec.stages import Stopwatch, watched

    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    watches = []
    for run in range(warmup + runs):
        watch = Stopwatch(model.device)
        with watched(model, watch):
            task(watch)
        if run >= warmup:
            watches.append(watch.seconds)
    totals = [sum(seconds.values()) for seconds in watches]
    return {
        "runs": runs,
        "stages": {stage: _spread([s[stage] for s in watches]) for stage in watches[0]},
        "total_ms": _spread(totals)["median_ms"],
        "total_iqr_ms": _spread(totals)["iqr_ms"],
        "peak_memory_mb": round(_peak_memory(model.device) / 1e6),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median_ms": round(1000 * middle, 3), "iqr_ms": round(1000 * (high - low), 3)}


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or on the CPU the most this process has held so far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _machine(device: torch.device) -> dict[str, Any]:
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {"device_name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def _table(record: dict[str, Any]) -> str:
    views = "1 view" if record["views"] == 1 else f"{record['views']} views"
    lines = [f"{record['task']}, {views}, {record['megapixels']} MP, {record['device_name']} ({record['device']})"]
    for stage, spread in record["stages"].items():
        lines.append(f"  {stage:<12}{spread['median_ms']:>10.1f} ms  +-{spread['iqr_ms']:>8.1f}")
    lines.append(f"  {'total':<12}{record['total_ms']:>10.1f} ms  +-{record['total_iqr_ms']:>8.1f}")
    lines.append(
        f"  {record['mp_per_s']} MP/s, {record['frames_per_s']} frames/s, "
        f"peak memory {record['peak_memory_mb']} MB, {record['threads']} threads"
    )
    return "\n".join(lines)
