"""Everything there is to measure on a GPU, in one run that nothing stops: a part that fails, hangs or finds no time
left says so, and the others go on. Every result is written when it is there: one JSON object a line.

    python benchmarks/gpu.py --out gpu.jsonl                       # ten minutes on one GPU
    python benchmarks/gpu.py --out gpu.jsonl --parts fast cpu      # some parts, each a process of its own
    python benchmarks/gpu.py --device cpu --small --part fast      # without a GPU: seconds, tiny networks

On a bare machine with torch, numpy, pillow, click, safetensors and tqdm, two wheels more are enough (construct,
constriction); nothing need be installed:

    python3 -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site:src python3 benchmarks/gpu.py --seconds 540 --out gpu.jsonl

`paper` has random weights, `fast` those that are shipped: times depend little on them. Goals are those of an H200, two
views of 1024x832, and in the part `cpu` those of two processor cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mvcodec.runtime import prepare

prepare()  # before torch is imported

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvcodec import codec, entropy, images, latents, selftest, weights
from mvcodec.container import unpack
from mvcodec.evaluation import speed
from mvcodec.files import shipped
from mvcodec.graphs import PLAIN
from mvcodec.images import Image
from mvcodec.latents import decode_latents
from mvcodec.stages import Stopwatch, watched
from mvcodec.weights import Model

Record = dict[str, Any]
Case = tuple[int, int, int]  # width, height, views

GOAL_CASE = (1024, 832, 2)
CASES: list[Case] = [GOAL_CASE, (1024, 832, 1), (1024, 832, 3), (1024, 832, 6), (1920, 1080, 2), (3840, 2160, 2)]
LARGE: list[Case] = [(8192, 8192, 1), (1920, 1080, 16), (8192, 8192, 2)]
SMALL: list[Case] = [(100, 70, 2), (100, 70, 1)]
GOALS_MS = {  # (part, task)
    **{("fast", task): 15 for task in ("encode", "decode")},
    **{("paper", task): 40 for task in ("encode", "decode")},
    **{("cpu", task): ms for task, ms in (("encode", 500), ("decode unaligned", 1500), ("decode", 2500))},
}
WAYS = {"decode alone": (False, True), "decode unaligned": (True, False), "decode": (True, True)}  # joint, refine
QUALITY = 50.0
FILES = ("read", "write")  # stages that are not the codec's work
NOTHING = {"median_ms": 0.0}


def machine(options: argparse.Namespace) -> Iterator[Record]:
    """What it is and what it reaches."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    amx = sorted({flag for flag in flags if flag.startswith("amx")})
    yield {**speed.machine(options.device), "cores": os.cpu_count(), "amx": amx}
    yield {"ceilings": speed.ceilings(options.device)}


def exact(options: argparse.Namespace) -> Iterator[Record]:
    """Whether it computes the integers that every other machine does."""
    model = options.load("fast")
    file = codec.encode_image(model, view(*options.cases[0][:2]), QUALITY)
    other = weights.load_model(model.path, "cpu")
    with torch.inference_mode():
        wanted = decode_latents(other, unpack(file)).y_hat
        found = [decode_latents(model, unpack(file)).y_hat.cpu() for _ in range(4)]  # the last two through graphs
    yield {"integers_as_on_cpu": [torch.equal(x, wanted) for x in found], "graphs": model.graphs.state()}
    for name, sentence in selftest.run(model):
        yield {"selftest": name, "about": sentence}


def fast(options: argparse.Namespace) -> Iterator[Record]:
    yield from times(options, "fast", options.cases)
    yield from profiles(options, "fast")


def paper(options: argparse.Namespace) -> Iterator[Record]:
    yield from times(options, "paper", options.cases)
    yield from profiles(options, "paper")


def graphs(options: argparse.Namespace) -> Iterator[Record]:
    """What graphs save, what the first calls of a size take until they are there, and the memory they hold."""
    for name in ("fast", "paper"):
        model = options.load(name)
        began = time.perf_counter()
        codec.encode_image(model, view(*options.cases[0][:2]), QUALITY)
        speed.synchronise(model.device)
        yield {"model": model.name, "first_encode_of_all_ms": round(1000 * (time.perf_counter() - began), 1)}
        with model.graphs.off():
            found = tasks(model, options.cases[0])
        for task_name, task in found.items():
            times = {}
            for way in ("without", "with"):
                speed.forget_peak_memory(model.device)
                with model.graphs.off() if way == "without" else nullcontext():
                    once = partial(task, Stopwatch(model.device))
                    calls = speed.seconds_of(once, 3 + options.runs, 0, model.device)
                times[f"{way}_ms"] = speed.spread(calls[3:])["median_ms"]
                times[f"first_calls_{way}_ms"] = [round(1000 * seconds, 1) for seconds in calls[:3]]
                times[f"peak_memory_{way}_mb"] = round(speed.peak_memory_bytes(model.device) / 1e6)
            yield {"model": model.name, "task": task_name, **times, "graphs": model.graphs.state()}


class Launches(TorchDispatchMode):
    """Counts operations that are not mere views: on a GPU each is a kernel or more."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        first = args[0] if args else None
        shared = isinstance(first, torch.Tensor) and isinstance(result, torch.Tensor) and result is not first
        self.count += not (shared and first.untyped_storage().data_ptr() == result.untyped_storage().data_ptr())
        return result


def launches(options: argparse.Namespace) -> Iterator[Record]:
    """How many operations each stage issues; without a GPU, on one that is pretended."""
    counted = Launches()
    with counted, pretended(options):
        for model in map(options.load, ("fast", "paper")):
            with model.graphs.off():
                for task_name, task in tasks(model, options.cases[0]).items():
                    watch = Stopwatch(model.device, clock=lambda: counted.count)
                    with watched(model, watch):
                        task(watch)
                    stages = {stage: int(count) for stage, count in watch.seconds.items() if stage not in FILES}
                    yield {"model": model.name, "task": task_name, "operations": stages}


@contextmanager
def pretended(options: argparse.Namespace) -> Iterator[None]:
    """Inside, there is a GPU as far as its operations go (tests/elsewhere.py)."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.elsewhere import elsewhere, missing

    device = options.device
    if device.type == "cuda" or missing():
        yield
        return
    options.device = torch.device("cuda", 0)
    try:
        with elsewhere():
            yield
    finally:
        options.device = device


def coder(options: argparse.Namespace) -> Iterator[Record]:
    """One view's sections: what the network waits for, what is verified beside it, and what threads gain for two."""
    model = options.load("fast")
    file = codec.encode_image(model, view(*options.cases[0][:2]), QUALITY)
    sections: list[tuple[Any, ...]] = []
    decode = entropy.decode_ahead
    with patch.object(entropy, "decode_ahead", lambda *given: sections.append(given) or decode(*given)):
        codec.decode_set(model, [file])
    verifying = [decode(*given)[1] for given in sections]

    def once(_: int = 0) -> None:
        for given in sections:
            decode(*given)

    def several(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(once, range(2)))

    host = torch.device("cpu")
    for what, work in (
        ("symbols", once),
        ("verifying", lambda: [verify() for verify in verifying]),
        ("two views in one thread", lambda: several(1)),
        ("two views in two threads", lambda: several(2)),
    ):
        wall, processor = (
            speed.seconds_of(work, options.runs, 1, host, clock) for clock in (speed.WALL, speed.PROCESSOR)
        )
        yield {"coder": what, "wall": speed.spread(wall), "processor": speed.spread(processor), "bytes": len(file)}


class Inline:
    """An executor that does everything at once, in the caller's thread."""

    def __init__(self, max_workers: int) -> None:
        self.map = map

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*given))
        except Exception as error:
            done.set_exception(error)
        return done


def serial(options: argparse.Namespace) -> Iterator[Record]:
    """The coder in the network's own thread, view after view: what overlapping saves."""
    model = options.load("fast")
    with patch.object(latents, "ThreadPoolExecutor", Inline):
        yield from measured(options, model, options.cases[0])


def compiled(options: argparse.Namespace) -> Iterator[Record]:
    """The float stages by torch.compile. Not the entropy path: what an optimiser does to it is not for finding out."""
    model = options.load("fast")
    for stage in (model.net.g_a, model.net.para_jd.coarse, model.net.para_jd.fine):
        stage.compile(dynamic=False)
    began = time.perf_counter()
    yield from measured(options, model, options.cases[0])
    yield {"first_call_included_s": round(time.perf_counter() - began, 1)}


def walks(options: argparse.Namespace) -> Iterator[Record]:
    """Views through the entropy path one by one, as views of different sizes go: what walking together saves."""
    model = options.load("fast")
    with patch.object(codec, "pixels_in_walks", lambda *_: 0):
        yield from measured(options, model, options.cases[0])


def large(options: argparse.Namespace) -> Iterator[Record]:
    """8K x 8K is to fit in 24 GiB, alone and with a peer, 16 views of 1080p in 12 GiB. No graphs, as with a budget."""
    options.runs = 1
    with patch.object(weights, "graphs_on", lambda _: PLAIN):
        yield from times(options, "fast", SMALL if options.small else LARGE)


def cpu(options: argparse.Namespace) -> Iterator[Record]:
    """The goals of two cores, on this machine's processor."""
    options.device = torch.device("cpu")
    torch.set_num_threads(2)
    options.runs = min(options.runs, 5)
    yield from times(options, "fast", options.cases[:2])


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Record]]] = {
    part.__name__: part
    for part in (machine, fast, paper, exact, graphs, serial, walks, launches, coder, cpu, large, compiled)
}


def view(width: int, height: int, k: int = 0) -> Image:
    paths = sorted(shipped("examples/nineveh").glob("*.webp"))
    return speed.of_size(images.read(paths[k % len(paths)]), width, height)


def times(options: argparse.Namespace, name: str, cases: Sequence[Case]) -> Iterator[Record]:
    model = options.load(name)
    width, height, _ = cases[0]
    file = codec.encode_image(model, view(width, height), QUALITY)
    work = speed.count_work(model, speed.decoding(model, [file, file], suffix=".ppm"))
    reached = speed.ceilings(model.device)
    yield {"floor_ms_of_decoding_two_views": speed.floors_ms(work, model, reached), "ceilings": reached}
    for case in cases:
        yield from measured(options, model, case)


def tasks(model: Model, case: Case) -> dict[str, speed.Task]:
    width, height, views = case
    given = [view(width, height, k) for k in range(views)]
    files = [codec.encode_image(model, picture, QUALITY, camera_id=str(k)) for k, picture in enumerate(given)]
    found = {"encode": speed.encoding(model, images.to_bytes(given[0], ".ppm"), QUALITY)} if views <= 2 else {}
    for name, (joint, refine) in WAYS.items():
        if views > 1 or name == "decode":
            found[name] = speed.decoding(model, files, joint, refine, suffix=".ppm")
    return found


def measured(options: argparse.Namespace, model: Model, case: Case) -> Iterator[Record]:
    width, height, views = case
    for name, task in tasks(model, case).items():
        record = {"model": model.name, "task": name, "width": width, "height": height, "views": views}
        record |= {"device": str(model.device), "threads": torch.get_num_threads()}
        record |= speed.measure(task, model, options.runs, warmup=1 if options.runs == 1 else 2)
        files = sum(record["stages"].get(s, NOTHING)["median_ms"] for s in FILES)
        record["codec_ms"] = round(record["total_ms"] - files, 3)
        # The stages are synchronised to be told apart; without that, files included, what runs side by side may do so.
        free = speed.seconds_of(partial(task, Stopwatch(model.device)), options.runs, 0, model.device)
        record["unwatched_ms"] = speed.spread(free)["median_ms"]
        if case == GOAL_CASE:
            record["goal_ms"] = GOALS_MS.get((options.part, name))
        yield record


def profiles(options: argparse.Namespace, name: str) -> Iterator[Record]:
    """Where the time of a GPU goes: its kernels, how many, and how long it is at work at all."""
    if options.device.type != "cuda":
        return
    model = options.load(name)
    for task_name, task in tasks(model, options.cases[0]).items():
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        for _ in range(2):  # the third call replays what the second has recorded
            task(Stopwatch(model.device))
        with torch.profiler.profile(activities=activities) as profile:
            task(Stopwatch(model.device))
        kernels = [e for e in profile.key_averages() if str(e.device_type).endswith("CUDA")]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        yield {
            "profile": f"{name} {task_name}",
            "kernels": sum(e.count for e in kernels),
            "busy_ms": round(sum(e.self_device_time_total for e in kernels) / 1000, 2),
            "most": [[e.key[:90], e.count, round(e.self_device_time_total / 1000, 3)] for e in kernels[:20]],
        }


def line(r: Record) -> str:
    """A record for people."""
    if "codec_ms" not in r:
        return json.dumps(r)
    stages = "  ".join(f"{name} {spread['median_ms']:.1f}" for name, spread in r["stages"].items())
    goal = f" (goal {r['goal_ms']})" if r.get("goal_ms") else ""
    size = f"{r['width']}x{r['height']} K={r['views']}"
    taken = f"{r['codec_ms']:>9.1f} ms{goal}, {r['unwatched_ms']:.1f} unwatched, {r['peak_memory_mb']} MB"
    return f"{r['part']:<9}{r['task']:<17}{size:<15}{taken}: {stages}"


def run_here(options: argparse.Namespace) -> None:
    """One part in this process."""
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU here; say --device cpu --small to try the program")
    options.cases = SMALL if options.small else CASES
    with tempfile.TemporaryDirectory() as folder:

        def load(name: str) -> Model:
            name = "tiny" if options.small else name
            known = name in [path.stem for path in weights.available_models()]
            shelf = Path(folder)
            return weights.load_model(name, options.device) if known else speed.untrained(name, shelf, options.device)

        options.load = load
        for record in PARTS[options.part](options):
            write(options.out, {"part": options.part, **record})


def run_all(options: argparse.Namespace) -> None:
    """Each part in a process of its own: what breaks a GPU's context, or hangs, takes no other with it."""
    ends = time.monotonic() + options.seconds
    for part in options.parts:
        left = ends - time.monotonic()
        if left < 5:
            write(options.out, {"part": part, "error": "no time was left"})
            continue
        given = ["--device", options.device, "--runs", str(options.runs), *(["--small"] if options.small else [])]
        given += ["--out", str(options.out)] if options.out else []
        command = [sys.executable, str(Path(__file__).resolve()), "--part", part, *given]
        try:
            done = subprocess.run(command, timeout=left, stderr=subprocess.PIPE, text=True, check=False)
            error = None if done.returncode == 0 else done.stderr[-2000:]
        except subprocess.TimeoutExpired:
            error = f"stopped after {left:.0f} s"
        if error is not None:
            write(options.out, {"part": part, "error": error})


def write(path: Path | None, record: Record) -> None:
    print(line(record), flush=True)
    if path:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and pictures: is the program sound?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order")
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together")
    parser.add_argument("--out", type=Path, help="file of JSON lines; appended to")
    options = parser.parse_args(arguments)
    run_here(options) if options.part else run_all(options)


if __name__ == "__main__":
    main()
