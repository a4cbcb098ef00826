"""What exact arithmetic costs: bytes and time of the entropy path, float32 against 16-bit and calibrated integers.

    python benchmarks/exactness.py CHECKPOINT ../shared/data/val --calibrate ../shared/data/train --views 1

One row per quality: bytes of all latent sections of the same pictures, coded with the parameters that each arithmetic
gives. Then the time of h_s and Para-EM on one picture, as ratios within this run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvcodec import entropy
from mvcodec.entropy.tables import MAX_SYMBOL, gaussian_tables, sigma_thresholds
from mvcodec.exact.quantise import fix
from mvcodec.latents import snap
from mvcodec.nn.gain import exact_log_gain, hat_basis
from mvcodec.parahydra import PAD_MULTIPLE, ParaHydra
from mvcodec.training.checkpoint import starting_weights
from mvcodec.training.data import calibration_pictures, find_scenes, read_rgb
from mvcodec.weights import calibrate, exact_parts

QUALITIES = (0, 25, 50, 75, 100)
TABLES = gaussian_tables()
THRESHOLDS = torch.from_numpy(sigma_thresholds() / 65536)


class EntropyPath:
    """h_s and Para-EM in one arithmetic."""

    def __init__(self, net: ParaHydra, replay_on: list[Tensor] | None, exact: bool) -> None:
        self.net, self.number = copy.deepcopy(net), torch.float64 if exact else torch.float32
        if exact:
            calibrate(self.net, replay_on or [])
            fix(exact_parts(self.net))

    def run(self, y: Tensor, z: Tensor, quality: float) -> tuple[int, float]:
        """Bytes of the sections of y, and seconds spent outside the coder."""
        parts = self.net.config.coding_order(y)
        size, coder = 0, 0.0

        def code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
            nonlocal size, coder
            started = time.perf_counter()
            mu, index = snap(mu.double(), ln_sigma.double(), THRESHOLDS)
            symbols = (parts[step] - mu).round().clamp(-MAX_SYMBOL, MAX_SYMBOL)
            symbols = torch.where(index == 0, 0.0, symbols)
            size += len(entropy.encode(_row(symbols), _row(index), TABLES))
            coder += time.perf_counter() - started
            return (symbols + mu).to(self.number)

        started = time.perf_counter()
        gain = torch.full((1,), exact_log_gain(quality / 100), dtype=self.number)
        self.net.para_em(self.net.h_s(z.to(self.number)), gain, code)
        return size, time.perf_counter() - started - coder


def _row(x: Tensor) -> np.ndarray:
    return x.to(torch.int32).flatten().numpy()


def analysed(net: ParaHydra, file: Path, quality: float) -> tuple[Tensor, Tensor]:
    """y and rounded z of a picture, cut to a multiple of 64."""
    picture = read_rgb(file)
    height, width = (n // PAD_MULTIPLE * PAD_MULTIPLE for n in picture.shape[:2])
    x = torch.from_numpy(picture[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255
    basis = hat_basis(torch.tensor([quality / 100]), net.config.quality_knots)
    with torch.autocast("cpu", torch.bfloat16):
        y = net.g_a(x, basis)
    y = y.float() * net.gain.gain(basis)
    return y.double(), net.h_a(y).round().clamp(-MAX_SYMBOL, MAX_SYMBOL)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True, metavar="DATA_DIR")
    parser.add_argument("--views", type=int, default=1, help="of each scene")
    parser.add_argument("--runs", type=int, default=5, help="for the times")
    given = parser.parse_args()
    config, weights, *_ = starting_weights(given.checkpoint)
    net = ParaHydra(config)
    net.load_state_dict(weights)
    net.requires_grad_(False).eval()
    paths = {
        "float32": EntropyPath(net, None, exact=False),
        "16-bit": EntropyPath(net, None, exact=True),
        "calibrated": EntropyPath(net, calibration_pictures(given.calibrate), exact=True),
    }
    files = [file for views in find_scenes(given.data).values() for file in views[: given.views]]
    print(f"{len(files)} pictures\n\n| quality | float32 bytes | 16-bit | calibrated |\n|---|---|---|---|")
    for quality in QUALITIES:
        sizes = dict.fromkeys(paths, 0)
        for file in files:
            y, z = analysed(net, file, quality)
            for name, path in paths.items():
                sizes[name] += path.run(y, z, quality)[0]
        changes = " | ".join(f"{100 * (sizes[name] / sizes['float32'] - 1):+.3f} %" for name in list(paths)[1:])
        print(f"| {quality} | {sizes['float32']} | {changes} |", flush=True)
    y, z = analysed(net, files[0], 50)
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(given.runs):
        for name, path in paths.items():
            times[name].append(path.run(y, z, 50)[1])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    size = f"{16 * y.shape[3]}x{16 * y.shape[2]}"
    print(f"\ntime of h_s and Para-EM, {size}, {torch.get_num_threads()} threads, ratio to float32:")
    print(", ".join(f"{name} {seconds / medians['float32']:.2f}" for name, seconds in medians.items()))


if __name__ == "__main__":
    main()
