"""Everything there is to measure on a GPU, in one run: every stage, both profiles, sizes, numbers of views.

    python benchmarks/gpu.py --out gpu.json            # a few minutes on one GPU
    python benchmarks/gpu.py --device cpu --small      # the same program where there is none: seconds, tiny networks

Prints one table and writes one JSON object a case. `paper` has random weights, `fast` those that are shipped: times
depend little on them. Goals are those of an H200, two views of 1024x832. --compile lets torch.compile have the float
stages, whose first call then takes minutes. The integers found on the device are compared with the CPU's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvcodec import codec, images, weights
from mvcodec.container import unpack
from mvcodec.evaluation import speed
from mvcodec.files import shipped
from mvcodec.images import Image
from mvcodec.latents import decode_latents
from mvcodec.weights import Model

CASES = [(1024, 832, 1), (1024, 832, 2), (1024, 832, 3), (1024, 832, 6), (1920, 1080, 2), (3840, 2160, 2)]
SMALL = [(100, 70, 1), (100, 70, 2)]
GOALS_MS = {("fast", "encode"): 15, ("fast", "decode"): 15, ("paper", "encode"): 40, ("paper", "decode"): 40}
GOAL_CASE = (1024, 832, 2)
WAYS = {"decode alone": (False, True), "decode unaligned": (True, False), "decode": (True, True)}  # joint, refine
QUALITY = 50.0
FILES = ("read", "write")  # stages that are not the codec's work
NOTHING = {"median_ms": 0.0}


def models(names: Sequence[str], device: torch.device, folder: Path) -> Iterator[Model]:
    for name in names:
        known = name in [path.stem for path in weights.available_models()]
        yield weights.load_model(name, device) if known else speed.untrained(name, folder, device)


def compile_stages(model: Model) -> None:
    """The float stages only: what an optimiser does to the entropy path's integers must not be found out here."""
    stages = [model.net.g_a, model.net.para_jd.coarse, model.net.para_jd.fine, model.net.refinement]
    for stage in stages:
        if stage is not None:
            stage.compile(dynamic=False)


def integers_agree(model: Model, data: bytes) -> bool:
    """Whether the device decodes the integers that the CPU does."""
    if model.device.type == "cpu":
        return True
    alone = weights.load_model(str(weights.find_model(model.name)), "cpu")
    with torch.inference_mode():
        here, there = (decode_latents(m, unpack(data)).cpu() for m in (model, alone))
    return torch.equal(here, there)


def measure(model: Model, pictures: Sequence[Image], case: tuple[int, int, int], runs: int) -> Iterator[dict[str, Any]]:
    width, height, views = case
    given = [speed.of_size(pictures[k % len(pictures)], width, height) for k in range(views)]
    files = [codec.encode_image(model, view, QUALITY, camera_id=str(k)) for k, view in enumerate(given)]
    tasks = {"encode": speed.encoding(model, images.to_bytes(given[0], ".ppm"), QUALITY)} if views <= 2 else {}
    for name, (joint, refine) in WAYS.items():
        if views > 1 or name == "decode":
            tasks[name] = speed.decoding(model, files, joint, refine, suffix=".ppm")
    for name, task in tasks.items():
        record = {"model": model.name, "task": name, "width": width, "height": height, "views": views}
        record |= speed.measure(task, model, runs, warmup=2)
        record["codec_ms"] = round(
            record["total_ms"] - sum(record["stages"].get(s, NOTHING)["median_ms"] for s in FILES), 3
        )
        if case == GOAL_CASE:
            record["goal_ms"] = GOALS_MS.get((model.name, name))
        yield record


def table(records: Sequence[dict[str, Any]]) -> str:
    stages = list(dict.fromkeys(stage for record in records for stage in record["stages"]))
    lines = [f"{'model':<7}{'task':<17}{'size':<11}{'K':>2}{'codec ms':>10}{'goal':>6}{'MB':>7}"]
    lines[0] += "".join(f"{stage:>11}" for stage in stages)
    for r in records:
        size, goal = f"{r['width']}x{r['height']}", r.get("goal_ms") or ""
        line = f"{r['model']:<7}{r['task']:<17}{size:<11}{r['views']:>2}{r['codec_ms']:>10.1f}"
        line += f"{goal:>6}{r['peak_memory_mb']:>7}"
        lines.append(line + "".join(f"{r['stages'].get(s, NOTHING)['median_ms']:>11.2f}" for s in stages))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and pictures: is the program sound?")
    parser.add_argument("--models", nargs="+", default=["fast", "paper"])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile for the float stages")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; say --device cpu --small to try the program")
    names, cases = (["tiny"], SMALL) if options.small else (options.models, CASES)
    pictures = [images.read(path) for path in sorted(shipped("examples/nineveh").glob("*.webp"))]

    about = {**speed.machine(device), "ceilings": speed.ceilings(device), "compiled": options.compile}
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models(names, device, Path(folder)):
            if options.compile:
                compile_stages(model)
            small = speed.of_size(pictures[0], *cases[0][:2])
            file = codec.encode_image(model, small, QUALITY)
            work = speed.count_work(model, speed.decoding(model, [file, file], suffix=".ppm"))
            about[f"{model.name}_floor_ms_of_two_views"] = speed.floors_ms(work, model, about["ceilings"])
            about[f"{model.name}_integers_as_on_cpu"] = integers_agree(model, file)
            for case in cases:
                for record in measure(model, pictures, case, 1 if options.small else options.runs):
                    records.append(record)
                    print(table([record]).splitlines()[1], file=sys.stderr)
    print(json.dumps(about, indent=2))
    print(table(records))
    if options.out:
        options.out.write_text("\n".join(json.dumps(r) for r in [about, *records]) + "\n")


if __name__ == "__main__":
    main()
