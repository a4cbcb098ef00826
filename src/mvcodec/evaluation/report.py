"""A whole evaluation: folder of scenes in, folder of tables, figures and one plot out. It can be taken up again.

mvcodec.jsonl, peers.jsonl   one point per view, codec and setting; what is in them is not measured again
curves.csv                   per scene and mean: bpp, PSNR, MS-SSIM of every codec at every setting; no mean of a codec
                             that failed on a scene
bd_rate.csv                  per scene and mean of the scenes' figures: ours against each peer, joint against separate
rate_distortion.png          the mean curves
summary.json                 the means, the joint gain, the check of the estimate, how all was measured, what failed
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvcodec.codec import check_effort
from mvcodec.errors import MvcodecError, UsageError
from mvcodec.evaluation import bdrate
from mvcodec.evaluation.measure import JOINT, SEPARATE, Tell, fingerprint, measure_ours, measure_peer, usable_peers
from mvcodec.evaluation.peers import PEERS
from mvcodec.evaluation.points import MEAN, Ledger, Point, read_scenes
from mvcodec.evaluation.summary import (
    METRICS,
    CurvePoint,
    Delta,
    EstimateCheck,
    check_estimate,
    curve,
    curve_points,
    deltas,
    joint_gain_db,
)
from mvcodec.files import atomic
from mvcodec.weights import Model

QUALITIES = (5.0, 20.0, 40.0, 60.0, 80.0, 95.0)


@dataclass(frozen=True)
class Evaluation:
    """What was found; `write` puts it into a folder."""

    model: str
    weights: str  # fingerprint
    effort: int  # of the encoder
    curves: list[CurvePoint]
    deltas: list[Delta]
    joint_gain_db: dict[str, float]
    estimate: EstimateCheck
    left_out: dict[str, list[str]]  # peer -> scenes on which it failed

    def mean_deltas(self) -> list[Delta]:
        return [delta for delta in self.deltas if delta.scene == MEAN]

    def summary(self) -> dict[str, Any]:
        """JSON-ready; what has no value is null."""
        return {
            "model": self.model,
            "weights": self.weights,
            "effort": self.effort,
            "scenes": sorted({p.scene for p in self.curves} - {MEAN}),
            "peers": {name: PEERS[name].about for name in PEERS if name in {p.codec for p in self.curves}},
            "left_out": self.left_out,
            "bd_rate_method": f"{bdrate.METHOD}, per scene, mean of the scenes' figures, MS-SSIM in dB",
            "mean_curves": [_told(p) for p in self.curves if p.scene == MEAN],
            "mean_bd_rates": [_told(delta) for delta in self.mean_deltas()],
            "joint_gain_db": self.joint_gain_db,
            "estimate": {**dataclasses.asdict(self.estimate), "percent": self.estimate.percent},
        }

    def write(self, folder: Path) -> None:
        _write_csv(folder / "curves.csv", self.curves)
        _write_csv(folder / "bd_rate.csv", self.deltas)
        with atomic(folder / "summary.json") as file:
            file.write(json.dumps(self.summary(), indent=1, allow_nan=False).encode())
        plot(self.curves, folder / "rate_distortion.png")


def evaluate(
    data: Path,
    model: Model,
    out: Path,
    *,
    qualities: Sequence[float] = QUALITIES,
    effort: int = 0,
    peers: Sequence[str] = tuple(PEERS),
    scenes: Sequence[str] = (),
    limit_views: int | None = None,
    peer_results: Path | None = None,
    tell: Tell = lambda sentence: None,
) -> Evaluation:
    """Measure the model and the peers on scenes, and write the report into `out`, which may lie below `data`.

    qualities: at least `bdrate.MIN_POINTS`. effort: of our encoder.
    scenes: names of some, all if empty. limit_views: the first of each scene.
    peer_results: ledger of the peers' points, which outlive a model; in `out` if not given.
    """
    if len(set(qualities)) < bdrate.MIN_POINTS:
        raise UsageError(f"{len(set(qualities))} qualities; a curve needs at least {bdrate.MIN_POINTS}")
    check_effort(model, effort)
    usable = usable_peers(peers, tell)
    ours, others = Ledger(out / "mvcodec.jsonl"), Ledger(peer_results or out / "peers.jsonl")
    points: list[Point] = []
    left_out: dict[str, list[str]] = {}
    for scene in read_scenes(data, scenes, limit_views, results=out):
        for peer in usable:
            try:
                points += measure_peer(scene, peer, others)
            except MvcodecError as error:
                left_out.setdefault(peer.name, []).append(scene.name)
                tell(f"{peer.name}: left out on {scene.name}: {' '.join(str(error).split())}")
        points += measure_ours(scene, model, sorted(set(qualities)), ours, tell, effort)
    curves = curve_points(points)
    result = Evaluation(
        model.name,
        fingerprint(model),
        effort,
        curves,
        deltas(curves),
        joint_gain_db(curves),
        check_estimate(points),
        left_out,
    )
    if (before := _weights_of(out / "summary.json")) not in (None, result.weights):
        tell(f"{out}: its tables, of the weights {before}, are replaced; their points stay in mvcodec.jsonl")
    result.write(out)
    return result


def _weights_of(summary: Path) -> str | None:
    """Those that a report is about, if there is one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(summary.read_text(encoding="utf-8"))["weights"])
    return None


def plot(points: Sequence[CurvePoint], path: Path) -> None:
    """The mean curves in one panel: PSNR over bits per pixel, ours on top of the peers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    ours = {JOINT: {"color": "black"}, SEPARATE: {"color": "0.5", "linestyle": "--"}}  # drawn last, on top
    whole = {p.codec for p in points if p.scene == MEAN}
    lines = {name: curve(points, name, MEAN, "psnr") for name in sorted(whole - {*ours})}
    lines |= {name: curve(points, name, MEAN, "psnr") for name in ours}
    for name, line in lines.items():
        style = {"linewidth": 2.2, "zorder": 3, **ours[name]} if name in ours else {"linewidth": 1.2}
        axes.plot(line.bpp, line.fidelity_db, marker="o", markersize=3, label=name, **style)
    scenes = len({p.scene for p in points} - {MEAN})
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.set_title(f"mean of {scenes} scene{'s' * (scenes != 1)}, real file sizes")
    reach = 1.1 * max(lines[SEPARATE].bpp)
    shown = [db for line in lines.values() for bpp, db in zip(*line, strict=True) if bpp < reach]
    axes.set_xlim(0, reach)
    axes.set_ylim(min(shown) - 1, max(shown) + 2)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic(path) as file:
        FigureCanvasAgg(figure).print_png(file)


def table(result: Evaluation) -> str:
    """The mean BD-rates and the two other headline figures as text."""
    columns = [(test, metric) for test in (SEPARATE, JOINT) for metric in METRICS]
    titles = ["separate PSNR", "separate MS-SSIM", "joint PSNR", "joint MS-SSIM"]
    lines = [f"{'BD-rate (%) against':<20}" + "".join(f"{title:>18}" for title in titles)]
    found = {(d.anchor, d.test, d.metric): _percent(d) for d in result.mean_deltas()}
    for anchor in dict.fromkeys(d.anchor for d in result.mean_deltas()):
        lines.append(f"{anchor:<20}" + "".join(f"{found.get((anchor, *column), '-'):>18}" for column in columns))
    if any(told.endswith("*") for told in found.values()):
        lines.append("* not of all scenes; bd_rate.csv says which have none, and why")
    check = result.estimate
    lines.append(f"joint over separate: {result.joint_gain_db[MEAN]:+.3f} dB PSNR for the same bytes")
    lines.append(
        f"payload against -log2 p: {check.percent:+.2f} % over {check.files} files, "
        f"{check.worst_percent:+.2f} % at worst"
    )
    lines.append(f"BD-rate by the bjontegaard package, {bdrate.METHOD}; mean of the scenes' figures")
    return "\n".join(lines)


def _percent(delta: Delta) -> str:
    """The figure, with a star where scenes are missing from it."""
    return "-" if math.isnan(delta.percent) else f"{delta.percent:+.1f}{'*' if delta.reason else ''}"


def _write_csv(path: Path, records: Iterable[CurvePoint | Delta]) -> None:
    rows = [dataclasses.asdict(record) for record in records]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def _told(record: CurvePoint | Delta) -> dict[str, Any]:
    return {k: None if v != v else v for k, v in dataclasses.asdict(record).items()}
