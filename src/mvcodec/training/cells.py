"""Stage `cells`: what a file says of each coefficient tells what its decoded picture still lacks there.

    view -> decode, clean, draw back by the curves -> places of its latents                    alone/
    places -> CoefficientEstimate `alone`: what to add, from symbol, sigma and where the picture's y lies
    set of views -> decode, draw back with `alone`, align, fuse -> places of their latents     helped/
    places -> CoefficientEstimate `helped`

Errors are taken in the KLT's coefficients, so that all of it is least squares on kept numbers. All else is frozen, and
no bit moves. Networks as they decode are what counts: this stage comes last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvcodec.errors import UsageError
from mvcodec.latents import small
from mvcodec.nn.coefficient_estimate import CoefficientEstimate, Told
from mvcodec.nn.gain import hat_basis
from mvcodec.nn.transforms import KltAnalysis
from mvcodec.parahydra import PAD_MULTIPLE, ParaHydra
from mvcodec.precision import autocast
from mvcodec.training.checkpoint import each_made_once, load_weights, save_whole, start_of, to_resume
from mvcodec.training.config import TrainConfig, check_settings
from mvcodec.training.curves import append_rows, draw_if_possible
from mvcodec.training.data import Scene, load_scenes
from mvcodec.training.optimizers import fit
from mvcodec.training.preparation import (
    ESTIMATE,
    LEARNING,
    OutOfTime,
    Watch,
    digest,
    draw_qualities,
    fingerprint,
    keep_learned,
    only_of,
    overlapping_windows,
    refuse_foreign,
    refuse_torchrun,
    to_tensor,
)

WINDOW = 384  # side of the part of a scene that is decoded
SETS = {False: 300, True: 240}  # windows, of lone views and of sets: some 3 s of one core for each view
MOST_VIEWS = 6  # of a set
PLACES = 192  # of a view's latents, kept with all their channels
AT_ONCE = 32  # places of a view in a step
HARM_WEIGHT = 1.0
WARM_UP = 0.05  # of the steps
FOLDERS = ("alone", "helped")
FORM = 2  # of a lesson: others are prepared anew
SEEN = ("symbols", "ln_sigma", "apart", "before", "change", "shown")  # as CoefficientEstimate takes them

Lesson = dict[str, Tensor]  # places of one view: SEEN and `error`, [M, P] each, `weight` [M], `quality` []


def draw_lessons(net: ParaHydra, scene: Scene, helped: bool, rng: np.random.Generator) -> list[Lesson]:
    """Of a random window of a scene, at random qualities: a view decoded alone, or each of some that peers changed."""
    windows = overlapping_windows(scene, WINDOW, rng)
    height, width = (side // PAD_MULTIPLE * PAD_MULTIPLE for side in windows[0].shape[:2])
    if not (height and width) or len(windows) < 1 + helped:
        return []
    order = rng.permutation(len(windows))
    count = int(rng.integers(2, MOST_VIEWS + 1)) if helped else 1
    target = to_tensor([windows[n][:height, :width] for n in order[:count]])
    return list(lessons(net, target, draw_qualities(rng, len(target)), helped, rng))


@torch.no_grad()
def lessons(
    net: ParaHydra, target: Tensor, qualities: list[float], helped: bool, rng: np.random.Generator
) -> Iterator[Lesson]:
    """Views [K, 3, H, W] in [0, 1], sides multiples of 64. helped: those that peers change, with the others' help."""
    device = net.gain.log_gain.device
    assert isinstance(net.g_a, KltAnalysis)
    assert net.cells is not None
    assert net.refinement is not None
    target, quality = target.to(device), torch.tensor(qualities, device=device)
    basis = hat_basis(quality, net.config.quality_knots)
    with autocast(device):
        each = zip(target[:, None, None], quality[:, None, None], strict=True)
        found = [net(x, t, joint=False, fuse=False, constrain=True) for x, t in each]
        pictures = torch.cat([out.pictures[0].float().clamp(0, 1) for out in found])
        changed, shown = pictures, dict[int, Tensor]()
        if helped:
            changed = net.refinement(
                torch.cat([out.decoded[0].float() for out in found]),
                quality,
                settle=lambda i, frame: frame.copy_(pictures[i]),
                finish=lambda i, _, peers: shown.update({i: peers}),
            ).pictures
    gain = net.gain.gain(basis)[:, :, 0, 0]  # [K, M]
    for i, out in enumerate(found):
        if helped and i not in shown:
            continue
        before, told, t = out.cells.apart, out.cells.told, quality[i : i + 1]
        steps = gain[i, :, None, None]
        apart = before - net.cells(before, basis[i : i + 1], told, t)
        seen: tuple[Tensor, ...] = (*told, apart, before)
        if helped:
            change, show = (net.g_a.linear(x[None]) * steps for x in (changed[i] - pictures[i], shown[i]))
            seen = (*told, apart + change, before, change, show)
        maps = dict(zip(SEEN, seen, strict=False))
        maps["error"] = net.g_a.linear((target[i] - changed[i])[None]) * steps
        places = torch.from_numpy(rng.permutation(before[0, 0].numel())[:PLACES]).to(device)
        kept = {name: x[0].flatten(1)[:, places].half().cpu() for name, x in maps.items()}
        kept["symbols"] = small(kept["symbols"])
        energy = (target[i] - changed[i]).square().mean() * net.g_a.klt.weight[0].numel()  # of the error at a place
        yield {**kept, "weight": (1 / (gain[i].square() * (energy + 1e-9))).cpu(), "quality": t[0].cpu()}


def loss(estimate: CoefficientEstimate, lesson: Lesson, places: Tensor) -> Tensor:
    """By how much the squared error of a view changes in these places, relative to what it is; harm counts more."""
    symbols, ln_sigma, *found, error = (
        lesson[name][None, :, places].float() for name in (*SEEN, "error") if name in lesson
    )
    told = estimate(Told(symbols, ln_sigma), lesson["quality"][None], *found)
    change = (((error - told).square() - error.square()) * lesson["weight"][:, None]).sum() / len(places)
    return change + HARM_WEIGHT * change.clamp_min(0)


def prepare(net: ParaHydra, scenes: list[Scene], folder: Path, helped: bool, seed: int, watch: Watch) -> list[Path]:
    """One file of lessons for each window that has any, by `each_made_once`."""
    order = np.random.default_rng(seed).permutation(len(scenes))

    def make(n: int, rng: np.random.Generator) -> dict[str, Tensor]:
        found = draw_lessons(net, scenes[order[n % len(scenes)]], helped, rng)
        return {f"{i}.{name}": x for i, lesson in enumerate(found) for name, x in lesson.items()}

    return each_made_once(folder, SETS[helped], seed, make, "decoding", watch.progress, watch.made)


def read_lessons(files: list[Path]) -> list[Lesson]:
    """Of all windows, in memory."""
    found: list[Lesson] = []
    for tensors in map(load_file, files):
        views = sorted({int(name.split(".")[0]) for name in tensors})
        found += [{k.split(".")[1]: x for k, x in tensors.items() if k.startswith(f"{i}.")} for i in views]
    return found


def learn(
    estimate: CoefficientEstimate,
    data: list[Lesson],
    config: TrainConfig,
    progress: bool,
    kept: Path | None = None,
    made: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train in place, on the processor, by `optimizers.fit` -> the loss of each step."""

    def draw(rng: np.random.Generator) -> Iterator[Tensor]:
        for n in rng.integers(len(data), size=config.batch):
            places = torch.from_numpy(rng.permutation(data[n]["error"].shape[1])[:AT_ONCE])
            yield loss(estimate, data[n], places) / config.batch

    return fit(
        estimate, draw, config.steps, config.learning_rate, WARM_UP, config.seed, "estimating", progress, kept, made
    )


def check(config: TrainConfig) -> None:
    """UsageError for settings that this stage does not know, before anything is loaded."""
    refuse_torchrun(config.stage)
    if config.distortion != "mse":
        raise UsageError(f"stage cells lowers squared error; it knows no distortion {config.distortion}")
    check_settings(config)
    refuse_foreign(Path(config.run_dir), FOLDERS)


def learn_cells(config: TrainConfig, progress: bool = True, quiet: bool = False) -> Path:
    """Run stage `cells` of `config` -> the checkpoint's path.

    There is none where `minutes` ended before all was learned; what was prepared, and a network that has learned, stay,
    and a resumed run goes on from there.
    """
    watch = Watch.of(config, progress, quiet)
    check(config)
    run, data = Path(config.run_dir), Path(config.data)
    checkpoint = run / "checkpoint.pt"
    if to_resume(config) is not None:  # all is learned
        return checkpoint
    if config.threads:
        torch.set_num_threads(config.threads)
    model_config, weights, bits, distortion = start_of(config)
    if distortion != "mse":  # they would lose by it, and no longer say what they are for
        raise UsageError(f"{config.start_from}: was trained for {distortion}, and stage cells lowers squared error")
    net = ParaHydra(model_config)
    load_weights(net, {**net.state_dict(), **weights}, Path(config.start_from))
    if net.cells is None or net.cell_synthesis is None:
        raise UsageError(f"{config.start_from}: profile {config.profile} draws no picture back into its cells")
    net.to(config.device).requires_grad_(False)
    net.cells.alone = net.cells.helped = None

    watch.say(f"stage cells: reading {data}")
    scenes = load_scenes(data, progress)
    try:
        for helped, name in enumerate(FOLDERS):
            # What peers do is nothing to lone views: those are kept where stage `refine` has been gone through again.
            codec = digest(net.state_dict()) if helped else ""
            folder = only_of(run / name, f"{FORM} {fingerprint(net, data, config.seed)} {codec}")
            torch.manual_seed(config.seed)  # whatever was drawn before, or not, in a resumed run
            estimate = net.cells.estimate(bool(helped))
            if (folder / ESTIMATE).exists():
                estimate.load_state_dict(load_file(folder / ESTIMATE))
                continue
            learner = deepcopy(estimate).cpu()
            estimate.requires_grad_(False)
            watch.say(f"stage cells: decoding {'sets of views' if helped else 'views'}, {SETS[bool(helped)]} windows")
            taught = read_lessons(prepare(net, scenes, folder, bool(helped), config.seed, watch))
            if not taught and not helped:
                raise UsageError(
                    f"{data}: no picture is {PAD_MULTIPLE}x{PAD_MULTIPLE} or larger: nothing to learn from"
                )
            if not taught:
                watch.say(
                    "stage cells: no two views of a scene help each other; what peers change is left to the plain curve"
                )
                net.cells.helped = None
                continue
            watch.say(f"stage cells: {config.steps} steps on {len(taught)} views")
            losses = learn(learner, taught, config, progress, folder / LEARNING, watch.made)
            first = 1 + helped * config.steps
            append_rows(run / "log.csv", [{"step": first + n, "loss": x} for n, x in enumerate(losses)])
            keep_learned(learner, folder / ESTIMATE)
            estimate.load_state_dict(learner.state_dict())
            watch.made()
    except OutOfTime:
        return checkpoint
    draw_if_possible(run)
    save_whole(
        {
            "ema": net.state_dict(),
            "step": 2 * config.steps,
            "model_config": model_config.to_dict(),
            "train_config": asdict(config),
            **bits,
        },
        checkpoint,
    )
    return checkpoint
