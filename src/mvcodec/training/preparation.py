"""What stage `refine` learns from, decoded and aligned once and kept in the run's folder.

two views -> the network that steadies their flow learns                                    pairs/, steadying.py
set of views -> decode each alone, clean, draw back into its cells -> align -> warp -> crops     examples/
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from mvcodec.errors import UsageError
from mvcodec.files import atomic
from mvcodec.nn.aligned_refinement import see
from mvcodec.nn.alignment import sights
from mvcodec.nn.steady_flow import SteadyFlow
from mvcodec.parahydra import PAD_MULTIPLE, ParaHydra
from mvcodec.precision import autocast
from mvcodec.training import steadying
from mvcodec.training.checkpoint import each_made_once, save_tensors
from mvcodec.training.config import TrainConfig
from mvcodec.training.data import Picture, Scene, listing, load_scenes

WINDOW = 512  # side of the part of a scene that is decoded and aligned
PAIR_WINDOW = 320  # the same, of the views whose flow the steadying network learns from
CROP = 192  # of the examples kept
SIDES = 5  # peers of an example at most
SETS = 240  # windows of a scene, decoded and aligned: about 3 s of one core each
SPOTS = 4  # examples per view
BEYOND = 0.1  # of the scale of qualities: drawn from so much more at both ends, and clipped
PAIRS, EXAMPLES = "pairs", "examples"  # folders of a run, for what is prepared
STEADY = "steady.safetensors"  # in PAIRS: the network that has learned from them
ESTIMATE = "estimate.safetensors"  # the same of stage `cells`
LEARNED = (STEADY, ESTIMATE)
LEARNING = "learning.pt"  # of one that was interrupted
MARK = "of.txt"  # in each of them: the fingerprint of what it was prepared of
FORM = 2  # of an example: others are prepared anew

# views and one quality in [0, 1] for each -> as decoded alone, before and after cleaning, [K, 3, H, W] in [0, 1]
Decoder = Callable[[Tensor, list[float]], tuple[Tensor, Tensor]]
Example = dict[str, Tensor]
PARTS = ("pair", "pair_out", "head")  # what this stage trains


def decode_alone(net: ParaHydra) -> Decoder:
    """The codec itself, without peers: what is cleaned is drawn back into its cells. Nothing is written."""
    device = net.gain.log_gain.device

    @torch.no_grad()
    def decoder(pictures: Tensor, qualities: list[float]) -> tuple[Tensor, Tensor]:
        height, width = pictures.shape[-2:]
        padded = F.pad(pictures.to(device), (0, -width % PAD_MULTIPLE, 0, -height % PAD_MULTIPLE), mode="replicate")
        decoded: list[Tensor] = []
        cleaned: list[Tensor] = []
        with autocast(device):
            for x, quality in zip(padded, qualities, strict=True):
                t = torch.tensor([[quality]], device=device)
                out = net(x[None, None], t, joint=False, fuse=False, constrain=True)
                for found, picture in ((decoded, out.decoded), (cleaned, out.pictures)):
                    found.append(picture[0, :, :, :height, :width].clamp(0, 1))
        return torch.cat(decoded).float().cpu(), torch.cat(cleaned).float().cpu()

    return decoder


def to_tensor(views: list[Picture]) -> Tensor:
    """uint8 [H, W, 3] each -> [K, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255


def overlapping_windows(scene: Scene, size: int, rng: np.random.Generator) -> list[Picture]:
    """A random window of every view that has the first one's size, moved by the global shift between the views."""
    height, width, _ = scene.views[0].shape
    rows, columns = min(size, height), min(size, width)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    windows = []
    for view, (down, right) in zip(scene.views, scene.shifts, strict=True):
        if view.shape == scene.views[0].shape:
            y, x = int(np.clip(top + down, 0, height - rows)), int(np.clip(left + right, 0, width - columns))
            windows.append(view[y : y + rows, x : x + columns])
    return windows


def draw_qualities(rng: np.random.Generator, count: int) -> list[float]:
    """Of the views of a set, in [0, 1]: one for all, or very unequal ones."""
    # The ends of the scale, where peers help least, are drawn often: they have neighbours on one side only.
    qualities: list[float] = rng.uniform(-BEYOND, 1 + BEYOND, count).clip(0, 1).tolist()
    return qualities[:1] * count if rng.random() < 0.5 else qualities


def examples(
    views: list[Picture],
    decoder: Decoder,
    rng: np.random.Generator,
    crops: int = SPOTS,
    steady: SteadyFlow | None = None,
) -> Example:
    """Crops of every view of a scene with its peers, S places for them; all uint8 but the qualities.

    Peers in places that stay empty have consistency 0.
    """
    qualities = draw_qualities(rng, len(views))
    target = to_tensor(views)
    decoded, cleaned = decoder(target, qualities)
    quality = torch.tensor(qualities)
    found = []
    for i, sight in enumerate(sights(cleaned, SIDES, steady, quality)):
        places, consistency = len(sight.peers), sight.consistency
        main = cleaned[i : i + 1]
        seen = see(cleaned[sight.peers], main.expand(places, -1, -1, -1), sight.flow, consistency)
        for top, left in _spots(consistency.amax(0)[0], crops, rng):
            window = (..., slice(top, top + CROP), slice(left, left + CROP))
            found.append({
                "target": target[i][window],
                "decoded": decoded[i][window],
                "main": main[0][window],
                "peers": seen[window],
                "consistency": consistency[window],
                "quality": quality[i],
                "peer_quality": quality[sight.peers],
            })  # fmt: skip
    stacked = {name: torch.stack([example[name] for example in found]) for name in found[0]}
    return {k: x if "quality" in k else (255 * x).round().byte() for k, x in stacked.items()}


def _spots(consistency: Tensor, count: int, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Corners of crops: of three random ones the one peers cover best, so there is something to learn."""
    height, width = consistency.shape
    for _ in range(count):
        corners = [(int(rng.integers(height - CROP + 1)), int(rng.integers(width - CROP + 1))) for _ in range(3)]
        yield max(corners, key=lambda c: float(consistency[c[0] : c[0] + CROP, c[1] : c[1] + CROP].mean()))


class OutOfTime(Exception):
    """The run's minutes are over before all is prepared."""


class Watch(NamedTuple):
    """Who looks on while a run prepares."""

    progress: bool  # with bars
    quiet: bool
    until: float  # of the monotonic clock

    @staticmethod
    def of(config: TrainConfig, progress: bool, quiet: bool) -> Watch:
        """From now on."""
        return Watch(progress, quiet, time.monotonic() + 60 * config.minutes if config.minutes else math.inf)

    def say(self, sentence: str) -> None:
        """Of each phase, which may take minutes."""
        if not self.quiet:
            tqdm.write(sentence, file=sys.stderr)

    def over(self) -> bool:
        """Whether the run's minutes are."""
        return time.monotonic() > self.until

    def made(self) -> None:
        """Called after each piece of work, which is kept: OutOfTime if the run's minutes are over."""
        if self.over():
            raise OutOfTime


def steadied(
    steady: SteadyFlow, scenes: list[Scene], folder: Path, decoder: Decoder, seed: int, watch: Watch
) -> SteadyFlow:
    """`steady`, trained on flow between what the codec decodes; both are kept in the folder."""
    kept = folder / STEADY
    if kept.exists():
        steady.load_state_dict(load_file(kept))
        return steady.requires_grad_(False)

    def draw(rng: np.random.Generator) -> Tensor | None:
        windows = overlapping_windows(scenes[int(rng.integers(len(scenes)))], PAIR_WINDOW, rng)
        if len(windows) < 2 or min(windows[0].shape[:2]) < PAD_MULTIPLE:  # nothing to align
            return None
        return to_tensor([windows[n] for n in rng.permutation(len(windows))[:2]])

    def coder(views: Tensor, qualities: list[float]) -> Tensor:
        return decoder(views, qualities)[1]

    watch.say(f"stage refine: decoding and aligning pairs of views, {steadying.TRIES} tries")
    files = steadying.prepare(draw, folder, coder, seed, watch.progress, watch.made)
    watch.say(f"stage refine: steadying the flow, {steadying.STEPS} steps")
    steadying.learn(steady.requires_grad_(True), files, seed, watch.progress, folder / LEARNING, watch.made)
    keep_learned(steady, kept)
    watch.made()
    return steady.requires_grad_(False)


def keep_learned(network: nn.Module, file: Path) -> None:
    """One of LEARNED, in place of what an interrupt may have left of it."""
    save_tensors(network.state_dict(), file)
    file.with_name(LEARNING).unlink(missing_ok=True)


def cache(
    scenes: list[Scene],
    folder: Path,
    decoder: Decoder,
    steady: SteadyFlow | None,
    seed: int,
    watch: Watch,
) -> list[Path]:
    """One file of examples per set of views, by `each_made_once`. Scenes too small for a crop are left out."""
    order = np.random.default_rng(seed).permutation(len(scenes))

    def make(n: int, rng: np.random.Generator) -> Example | None:
        windows = overlapping_windows(scenes[order[n % len(scenes)]], WINDOW, rng)[: SIDES + 1]
        small = len(windows) < 2 or min(windows[0].shape[:2]) < CROP
        return None if small else examples(windows, decoder, rng, steady=steady)

    files = each_made_once(folder, SETS, seed, make, "decoding and aligning", watch.progress, watch.made)
    if not files:
        raise UsageError(f"no scene has two views of one size, at least {CROP}x{CROP}: nothing to refine")
    return files


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Names and values, in short."""
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def fingerprint(net: ParaHydra, data: Path, seed: int) -> str:
    """Of what is decoded, aligned and drawn: the codec but for what this stage trains, the pictures, the seed."""
    trained = tuple(f"refinement.{part}." for part in (*PARTS, "steady"))
    codec = {name: value for name, value in net.state_dict().items() if not name.startswith(trained)}
    return digest(codec) + hashlib.sha256(repr((FORM, listing(data), seed)).encode()).hexdigest()


def only_of(folder: Path, fingerprint: str) -> Path:
    """The folder, without what was prepared in it of anything else; what else lies there is not ours to delete."""
    mark = folder / MARK
    if not mark.exists() or mark.read_text() != fingerprint:
        for old in folder.glob("*.safetensors"):
            if old.stem.isdecimal() or old.name in LEARNED:
                old.unlink()
        (folder / LEARNING).unlink(missing_ok=True)
        with atomic(mark) as file:
            file.write(fingerprint.encode())
    return folder


def refuse_torchrun(stage: str) -> None:
    """UsageError under torchrun, for a stage that knows nothing of other processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"stage {stage} runs in one process; start it without torchrun")


def refuse_foreign(run: Path, names: tuple[str, ...]) -> None:
    """UsageError where a folder that a stage would fill holds something and was not marked by `only_of`."""
    for name in names:
        folder = run / name
        if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(
                f"--out {run}: holds `{name}`, which is none of a run of this version; move it away or name another"
            )


class Prepared(NamedTuple):
    """What training needs: the network that steadies the flow, and the files of examples aligned with it."""

    steady: SteadyFlow | None
    files: list[Path]


def prepare(net: ParaHydra, config: TrainConfig, resumed: bool, watch: Watch) -> Prepared:
    """What is there already is kept."""
    assert net.refinement is not None
    run, data = Path(config.run_dir), Path(config.data)
    watch.say(f"stage refine: reading {data}")
    scenes, decoder = load_scenes(data, watch.progress), decode_alone(net)
    steady = None if net.refinement.steady is None else deepcopy(net.refinement.steady).cpu()
    of = fingerprint(net, data, config.seed)
    if not resumed:  # what resumes has learned it, or began before there was such a thing
        fresh = SteadyFlow() if steady is None else steady
        folder = only_of(run / PAIRS, of + digest(fresh.state_dict()))
        steady = steadied(fresh, scenes, folder, decoder, config.seed, watch)
    if steady is not None:
        of += digest(steady.state_dict())
    watch.say(f"stage refine: decoding and aligning sets of views, {SETS} at most")
    return Prepared(steady, cache(scenes, only_of(run / EXAMPLES, of), decoder, steady, config.seed, watch))
