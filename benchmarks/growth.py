"""How time and memory grow with pixels and with the number of views, with fitted exponents and a plot.

    python benchmarks/growth.py --plot docs/growth.png          # minutes
    python benchmarks/growth.py --sides 64 128 --views 1 2      # seconds

Exponents are slopes in the log-log plane over the larger half of the sizes, where fixed costs have faded: 1 is linear.
Memory is the process's peak above what it held with the weights loaded; its slope over all sizes, in bytes a pixel, is
what `mvcodec.tiling.HELD` and WORKING are set from: the larger of the two shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvcodec.runtime import prepare

prepare()  # before torch is imported

from mvcodec import codec, images
from mvcodec.evaluation import speed
from mvcodec.files import shipped
from mvcodec.weights import DEFAULT_MODEL, Model, load_model

QUALITY = 50.0
Measure = Callable[[int], dict[str, Any]]


def fit(pixels: Sequence[float], values: Sequence[float]) -> float:
    """The exponent e of values ~ pixels^e over the larger half."""
    half = slice(len(pixels) // 2 if len(pixels) > 3 else 0, None)
    x, y = (np.log(np.maximum(v, 1e-9))[half] for v in (pixels, values))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def grow(name: str, along: str, amounts: Sequence[int], pixels: Callable[[int], int], run: Measure) -> dict[str, Any]:
    """Measure at every amount -> points, exponents, bytes a pixel."""
    points = []
    for amount in amounts:
        found = run(amount)
        points.append({along: amount, "pixels": pixels(amount), **found})
        print(f"  {name}, {along} {amount}: {found['seconds']:.2f} s, {found['bytes'] / 1e6:.0f} MB", flush=True)
    of = {key: [point[key] for point in points] for key in ("pixels", "seconds", "bytes")}
    return {
        "task": name,
        "along": along,
        "points": points,
        "time_exponent": fit(of["pixels"], of["seconds"]),
        "memory_exponent": fit(of["pixels"], of["bytes"]),
        "bytes_per_pixel": round(float(np.polyfit(of["pixels"], of["bytes"], 1)[0]), 1),
    }


def measured(model: Model, task: speed.Task, runs: int, clock: Callable[[], float]) -> dict[str, Any]:
    speed.forget_peak_memory(model.device)
    before = speed.peak_memory_bytes(model.device)
    watch = speed.Stopwatch(model.device)
    seconds = speed.seconds_of(lambda: task(watch), runs, 0, model.device, clock)
    grown = speed.peak_memory_bytes(model.device) - before
    return {"seconds": statistics.median(seconds), "bytes": max(grown, 1)}


def plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for result in results:
        column = 0 if result["along"] == "side" else 1
        pixels = [point["pixels"] / 1e6 for point in result["points"]]
        for row, key, exponent in ((0, "seconds", "time_exponent"), (1, "bytes", "memory_exponent")):
            values = [point[key] / (1 if row == 0 else 1e6) for point in result["points"]]
            axes[row, column].loglog(pixels, values, "o-", label=f"{result['task']}: exponent {result[exponent]}")
    for row, unit in enumerate(("seconds", "MB above the weights")):
        for column, along in enumerate(("one view, growing", "growing number of views")):
            axes[row, column].set(xlabel=f"megapixels ({along})", ylabel=unit)
            axes[row, column].grid(alpha=0.3, which="both")
            axes[row, column].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 384, 512, 768, 1024, 1536, 2048])
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--view-side", type=int, default=384, help="side of each view where their number grows")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the processor: the machine is busy")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    model = load_model(options.model, options.device)
    clock = speed.PROCESSOR if options.cpu_time else speed.WALL
    pictures = [images.read(path) for path in sorted(shipped("examples/nineveh").glob("*.webp"))]

    def views(count: int, side: int) -> list[images.Image]:
        return [speed.of_size(pictures[k % len(pictures)], side, side) for k in range(count)]

    def encoding(side: int) -> dict[str, Any]:
        file = images.to_bytes(views(1, side)[0])
        return measured(model, speed.encoding(model, file, QUALITY), options.runs, clock)

    def decoding(count: int, side: int, joint: bool) -> dict[str, Any]:
        files = [codec.encode_image(model, v, QUALITY, camera_id=str(k)) for k, v in enumerate(views(count, side))]
        return measured(model, speed.decoding(model, files, joint), options.runs, clock)

    codec.decode_set(model, [codec.encode_image(model, views(1, 64)[0], QUALITY)])  # warm-up
    side = options.view_side
    results = [
        grow("encode", "side", options.sides, lambda s: s * s, encoding),
        grow("decode", "side", options.sides, lambda s: s * s, lambda s: decoding(1, s, True)),
        grow("decode, alone", "views", options.views, lambda k: k * side**2, lambda k: decoding(k, side, False)),
        grow("decode, joint", "views", options.views, lambda k: k * side**2, lambda k: decoding(k, side, True)),
    ]
    about = {
        "model": model.name,
        "view_side": side,
        "clock": "processor" if options.cpu_time else "wall",
        **speed.machine(model.device),
    }
    for result in results:
        print(
            f"{result['task']:<15} along {result['along']:<6} time ~ pixels^{result['time_exponent']}, "
            f"memory ~ pixels^{result['memory_exponent']}, {result['bytes_per_pixel']} bytes a pixel"
        )
    if options.plot:
        plot(results, options.plot)
    if options.out:
        options.out.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
