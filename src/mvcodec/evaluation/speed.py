"""Seconds per stage, memory and the work done: what `mvcodec bench` and benchmarks/ print."""

from __future__ import annotations

import ctypes
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mvcodec import codec, images, weights
from mvcodec.images import Image
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.precision import bfloat16_pays
from mvcodec.stages import Stopwatch, watched
from mvcodec.weights import Model

Task = Callable[[Stopwatch], object]
WRITERS = 2  # pictures are compressed in so many threads, as `mvcodec decode` does
WALL, PROCESSOR = time.perf_counter, time.process_time  # the second on a machine that others keep busy


def encoding(model: Model, picture: bytes, quality: float, max_memory: int | None = None) -> Task:
    """What one camera does: the bytes of a picture file -> the bytes of a .phv file."""

    def task(watch: Stopwatch) -> bytes:
        with watch.stage("read"):
            image = images.read(picture)
        return codec.encode_image(model, image, quality, max_memory=max_memory)

    return task


def decoding(
    model: Model,
    files: Sequence[bytes],
    joint: bool = True,
    refine: bool = True,
    max_memory: int | None = None,
    suffix: str = ".png",
) -> Task:
    """What the sink does: .phv files of one instant -> picture files."""

    def task(watch: Stopwatch) -> None:
        decoded = codec.decode_set(model, files, joint=joint, refine=refine, max_memory=max_memory)
        with watch.stage("write"), tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WRITERS) as threads:
            written = threads.map(lambda view: images.to_bytes(view.image, suffix), decoded)
            for k, file in enumerate(written):
                Path(folder, f"{k}{suffix}").write_bytes(file)

    return task


def loading(name: str, device: torch.device) -> Task:
    """Weights from disk, anew."""

    def task(watch: Stopwatch) -> None:
        with watch.stage("load"):
            weights.load_model(name, device)

    return task


def measure(task: Task, model: Model, runs: int, warmup: int, clock: Callable[[], float] = WALL) -> dict[str, Any]:
    """Median and interquartile range of every stage and of the total over `runs`, after a warm-up; peak memory."""
    forget_peak_memory(model.device)
    watches = []
    for run in range(warmup + runs):
        watch = Stopwatch(model.device, clock)
        with watched(model, watch):
            task(watch)
        if run >= warmup:
            watches.append(watch.seconds)
    total = spread([sum(seconds.values()) for seconds in watches])
    return {
        "runs": runs,
        "stages": {stage: spread([s.get(stage, 0.0) for s in watches]) for stage in watches[0]},
        "total_ms": total["median_ms"],
        "total_iqr_ms": total["iqr_ms"],
        "peak_memory_mb": round(peak_memory_bytes(model.device) / 1e6),
        "graphs": model.graphs.state(),
    }


def seconds_of(
    work: Callable[[], object], runs: int, warmup: int, device: torch.device, clock: Callable[[], float] = WALL
) -> list[float]:
    """Warm, synchronised times of one call."""
    taken = []
    for _ in range(warmup + runs):
        synchronise(device)
        began = clock()
        work()
        synchronise(device)
        taken.append(clock() - began)
    return taken[warmup:]


def spread(seconds: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median_ms": round(1000 * middle, 3), "iqr_ms": round(1000 * (high - low), 3)}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak_memory(device: torch.device) -> None:
    """From here on the peak is counted anew; on a CPU where the system can (Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is kept of earlier work is not this work's
        torch.cuda.reset_peak_memory_stats(device)
    elif (counters := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps of earlier work is not this work's
        counters.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Of what torch holds of the GPU, graphs and what is kept for later included, or on the CPU of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if (status := Path("/proc/self/status")).exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1])
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else platform.processor() or platform.machine()
    return {
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "precision": "bfloat16" if bfloat16_pays(device) else "float32",  # of the float networks
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def ceilings(device: torch.device, clock: Callable[[], float] = WALL, seconds: float = 0.2) -> dict[str, float]:
    """What this machine reaches at best: multiply-accumulates of a large matrix product, bytes of a large copy."""
    size, length = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 27)

    def best(work: Callable[[], object]) -> float:
        times, began = seconds_of(work, 2, 1, device, clock), time.perf_counter()
        while time.perf_counter() - began < seconds:
            times += seconds_of(work, 1, 0, device, clock)
        return min(times)

    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    short_a, short_b = a.bfloat16(), b.bfloat16()
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "float32_gmac_per_s": round(size**3 / best(lambda: a @ b) / 1e9, 1),
        "bfloat16_gmac_per_s": round(size**3 / best(lambda: short_a @ short_b) / 1e9, 1),
        "gbyte_per_s": round(2 * length / best(lambda: target.copy_(source)) / 1e9, 1),
    }


# Stages that convolve: where they are, and whether they may run in bfloat16.
CONVOLVING = {
    "g_a": ("g_a", True),
    "h_a": ("h_a", False),
    "h_s": ("h_s", False),
    "Para-EM": ("para_em", False),
    "Para-JD": ("para_jd", True),
    "refine": ("refinement", True),
}


class Work(NamedTuple):
    """What the convolutions of a stage have to do in one run of a task."""

    macs: int
    values: int  # in and out and of the weights, each once


def count_work(model: Model, task: Task) -> dict[str, Work]:
    """Counted from the shapes that pass through the modules while the task runs once.

    What has no weights (attention, alignment, warping) is not counted: a floor built on this is one indeed.
    """
    work: dict[str, Work] = {}

    def counter(stage: str) -> Callable[[Any, Any, Any], None]:
        def see(layer: Any, inputs: Any, output: torch.Tensor) -> None:
            (x,) = inputs
            meeting = x if layer.transposed else output  # every weight meets each of these positions once
            macs = layer.weight.numel() * len(meeting) * meeting[0, 0].numel()
            values = x.numel() + output.numel() + layer.weight.numel()
            sofar = work.get(stage, Work(0, 0))
            work[stage] = Work(sofar.macs + macs, sofar.values + values)

        return see

    with ExitStack() as stack:
        for stage, (attribute, _) in CONVOLVING.items():
            part = getattr(model.net, attribute)
            for layer in part.modules() if part is not None else ():
                if hasattr(layer, "transposed"):  # torch's convolutions and the exact ones
                    stack.callback(layer.register_forward_hook(counter(stage)).remove)
        with model.graphs.off():  # replays call no module
            task(Stopwatch(model.device))
    return work


def floors_ms(work: dict[str, Work], model: Model, reached: dict[str, float]) -> dict[str, float]:
    """The least time each stage's convolutions could take here: to compute or to move, whichever is longer."""
    floors = {}
    for stage, (macs, values) in work.items():
        short = CONVOLVING[stage][1] and model.bfloat16
        rate = reached["bfloat16_gmac_per_s" if short else "float32_gmac_per_s"]
        floors[stage] = round(1e-6 * max(macs / rate, values * (2 if short else 4) / reached["gbyte_per_s"]), 3)
    return floors


def untrained(profile: str, folder: Path, device: torch.device, **changes: Any) -> Model:
    """Random weights of a profile, as a loaded model file: for times alone.

    Its entropy path is calibrated, on noise: what is not has 16-bit inputs throughout and takes twice as long. Its
    joint decoder runs its fusions, whose gains would be zero.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        net = ParaHydra(config_for(profile, **changes))
        for fusion in net.para_jd.fusions:
            fusion.get_submodule("fusion").get_parameter("gain").fill_(1.0)
        noise = torch.rand(1, 3, 128, 128)
    path = folder / f"{profile}.safetensors"
    weights.export_model(net, path, pictures=[noise])
    return weights.load_model(str(path), device)


def of_size(view: Image, width: int, height: int) -> Image:
    """The picture at exactly this size, by repeating it and cutting: its texture stays what it was."""
    pixels = view.pixels
    repeats = (-(-height // view.height), -(-width // view.width)) + (1,) * (pixels.ndim - 2)
    return Image(np.ascontiguousarray(np.tile(pixels, repeats)[:height, :width]))
