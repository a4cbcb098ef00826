"""What views gain from each other: against their number, in every scene, and when their qualities differ.

    OMP_NUM_THREADS=2 python benchmarks/joint_gain.py --out docs/joint_gain     # .csv and .png; about 20 minutes
    python benchmarks/joint_gain.py --scenes riverview --qualities 40 --limit-views 3 --out /tmp/gain

Files are written and read as any user's; every gain is PSNR of joint over separate decoding of the same files. Both
run the same networks: the refinement cleans a lone view too, so what is counted is what the peers add.

    all       every scene, all its views
    number    scenes of five views and more: the first K of them, K = 1 ..
    unequal   the first view at quality 80, the others at 15: gain of these others
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mvcodec
from mvcodec import images
from mvcodec.evaluation.metrics import psnr
from mvcodec.files import atomic
from mvcodec.images import Image

MANY = 5  # views from which on gain against their number is worth a curve
FINE, COARSE = 80.0, 15.0


@dataclass(frozen=True)
class Gain:
    """One view in one experiment."""

    experiment: str  # all | number | unequal
    scene: str
    views: int
    quality: float
    view: str
    bpp: float
    separate_db: float
    joint_db: float
    gain_db: float


class Views:
    """The pictures of one scene, and their files at any quality, each encoded and decoded alone but once."""

    def __init__(self, folder: Path, limit: int | None, model: str | None) -> None:
        paths = [path for path in sorted(folder.iterdir()) if path.suffix in (".png", ".webp", ".jpg")][:limit]
        self.scene, self.model = folder.name, model
        self.names = [path.stem for path in paths]
        self.pictures = [images.read(path) for path in paths]
        self._files: dict[tuple[int, float], bytes] = {}
        self._alone: dict[tuple[int, float], Image] = {}

    def __len__(self) -> int:
        return len(self.names)

    def file(self, view: int, quality: float) -> bytes:
        key = (view, quality)
        if key not in self._files:
            picture, name = self.pictures[view], self.names[view]
            self._files[key] = mvcodec.encode(picture, quality=quality, camera_id=name, model=self.model)
        return self._files[key]

    def alone(self, view: int, quality: float) -> Image:
        key = (view, quality)
        if key not in self._alone:
            (decoded,) = mvcodec.decode_set([self.file(view, quality)], joint=False, model=self.model)
            self._alone[key] = decoded.image
        return self._alone[key]

    def gains(self, experiment: str, qualities: Sequence[float]) -> list[Gain]:
        """Decode the first views together, one for each quality."""
        files = [self.file(view, quality) for view, quality in enumerate(qualities)]
        decoded = {d.header.camera_id: d for d in mvcodec.decode_set(files, model=self.model)}
        found = []
        for view, quality in enumerate(qualities):
            original = self.pictures[view].pixels
            separate = psnr(original, self.alone(view, quality).pixels)
            joint = psnr(original, decoded[self.names[view]].pixels)
            bpp = 8 * len(files[view]) / (original.shape[0] * original.shape[1])
            gain = Gain(
                experiment, self.scene, len(files), quality, self.names[view], bpp, separate, joint, joint - separate
            )
            found.append(gain)
        return found


def measure(views: Views, qualities: Sequence[float]) -> list[Gain]:
    """All experiments that a scene is good for."""
    found = []
    for quality in qualities:
        numbers = range(1, len(views) + 1) if len(views) >= MANY else [len(views)]
        for number in numbers:
            gains = views.gains("number", [quality] * number)
            if len(views) >= MANY:
                found += gains
            if number == len(views):
                found += [Gain(**{**asdict(gain), "experiment": "all"}) for gain in gains]
    found += views.gains("unequal", [FINE] + [COARSE] * (len(views) - 1))
    if COARSE not in qualities:  # what the fine view adds to what the coarse ones gain among themselves
        found += views.gains("all", [COARSE] * len(views))
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(gains: Sequence[Gain]) -> str:
    """One line per experiment, scene, number of views and quality."""
    lines = [f"{'experiment':<10} {'scene':<18} views quality   bpp  separate   gain  worst   best"]
    groups: dict[tuple[str, str, int, float], list[Gain]] = {}
    for gain in gains:
        groups.setdefault((gain.experiment, gain.scene, gain.views, gain.quality), []).append(gain)
    for (experiment, scene, number, quality), group in groups.items():
        db = [gain.gain_db for gain in group]
        bpp, separate = mean([gain.bpp for gain in group]), mean([gain.separate_db for gain in group])
        lines.append(
            f"{experiment:<10} {scene:<18} {number:5d} {quality:7.0f} {bpp:5.3f} {separate:9.2f} "
            f"{mean(db):+6.3f} {min(db):+6.3f} {max(db):+6.3f}"
        )
    return "\n".join(lines)


def plot(gains: Sequence[Gain]) -> bytes:
    """Mean gain of the views over their number, one line per scene and quality."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    curves = sorted({(gain.scene, gain.quality) for gain in gains if gain.experiment == "number"})
    for scene, quality in curves:
        points: dict[int, list[float]] = {}
        for gain in gains:
            if (gain.experiment, gain.scene, gain.quality) == ("number", scene, quality):
                points.setdefault(gain.views, []).append(gain.gain_db)
        axes.plot(
            list(points), [mean(db) for db in points.values()], marker="o", label=f"{scene}, quality {quality:.0f}"
        )
    axes.set_xlabel("views decoded together")
    axes.set_ylabel("gain over separate decoding (dB)")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def as_csv(gains: Sequence[Gain]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(Gain.__dataclass_fields__))
    writer.writeheader()
    for gain in gains:
        values = asdict(gain).items()
        writer.writerow({name: round(value, 4) if isinstance(value, float) else value for name, value in values})
    return text.getvalue().encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/val"), help="folder of scenes")
    parser.add_argument("--scenes", nargs="*", help="names; default: all")
    parser.add_argument("--qualities", nargs="*", type=float, default=[30.0, 50.0])
    parser.add_argument("--limit-views", type=int)
    parser.add_argument("--model", help="name or path; default: the one that is shipped")
    parser.add_argument("--out", type=Path, required=True, help="stem of the .csv and the .png")
    options = parser.parse_args()
    folders = {path.name: path for path in options.data.iterdir() if path.is_dir()}
    chosen = sorted(folders if options.scenes is None else options.scenes)
    if unknown := [name for name in chosen if name not in folders]:
        parser.error(f"no scene {', '.join(unknown)} in {options.data}")
    gains: list[Gain] = []
    for name in chosen:
        gains += measure(Views(folders[name], options.limit_views, options.model), options.qualities)
        print(f"{name} done", file=sys.stderr, flush=True)
        for ending, data in ((".csv", as_csv(gains)), (".png", plot(gains))):  # as far as it is
            with atomic(options.out.with_suffix(ending)) as file:
                file.write(data)
    print(table(gains))


if __name__ == "__main__":
    main()
