"""From points to curves, and from curves to the figures that are reported."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mvcodec.errors import UsageError
from mvcodec.evaluation.bdrate import Curve, bd_rate
from mvcodec.evaluation.measure import JOINT, SEPARATE
from mvcodec.evaluation.metrics import decibels
from mvcodec.evaluation.points import MEAN, Point

METRICS = ("psnr", "ms_ssim")


@dataclass(frozen=True)
class CurvePoint:
    """A codec at one setting: mean over the views of a scene, or (scene "mean") over the scenes' means."""

    codec: str
    scene: str
    setting: float
    bpp: float
    psnr_db: float
    ms_ssim: float  # nan where a view is too small for it


@dataclass(frozen=True)
class Delta:
    """BD-rate of `test` against `anchor` on one scene; nan, with the reason, where it has none."""

    anchor: str
    test: str
    metric: str
    scene: str
    percent: float
    reason: str = ""


@dataclass(frozen=True)
class EstimateCheck:
    """Real file sizes less their headers, against -log2 p of the densities that training minimised."""

    files: int
    payload_bytes: int
    estimated_bytes: float
    worst_percent: float  # of one file, by magnitude

    @property
    def percent(self) -> float:
        return 100 * (self.payload_bytes / self.estimated_bytes - 1)


def curve_points(points: Iterable[Point]) -> list[CurvePoint]:
    """Per codec, scene and setting, then the mean of the scenes; in order of rising rate within a curve.

    A codec that lacks a scene has no mean: of other scenes, it would lie beside the others' as if it were theirs.
    """
    views: dict[tuple[str, str, float], list[Point]] = defaultdict(list)
    for point in points:
        views[point.codec, point.scene, point.setting].append(point)
    scenes = [
        CurvePoint(
            *key,
            bpp=_mean(p.bpp for p in group),
            psnr_db=_mean(p.psnr_db for p in group),
            ms_ssim=_mean(math.nan if p.ms_ssim is None else p.ms_ssim for p in group),
        )
        for key, group in views.items()
    ]
    settings: dict[tuple[str, float], list[CurvePoint]] = defaultdict(list)
    for scene in scenes:
        settings[scene.codec, scene.setting].append(scene)
    number = len({scene.scene for scene in scenes})
    means = [
        CurvePoint(
            codec,
            MEAN,
            setting,
            bpp=_mean(p.bpp for p in group),
            psnr_db=_mean(p.psnr_db for p in group),
            ms_ssim=_mean(p.ms_ssim for p in group),
        )
        for (codec, setting), group in settings.items()
        if len(group) == number
    ]
    return sorted(scenes + means, key=lambda p: (p.codec, p.scene == MEAN, p.scene, p.bpp))


def curve(points: Sequence[CurvePoint], codec: str, scene: str, metric: str) -> Curve:
    """One codec's curve on one scene; MS-SSIM in decibels."""
    found = sorted((p for p in points if (p.codec, p.scene) == (codec, scene)), key=lambda p: p.bpp)
    fidelity = [p.psnr_db if metric == "psnr" else decibels(p.ms_ssim) for p in found]
    return Curve([p.bpp for p in found], fidelity)


def deltas(points: Sequence[CurvePoint]) -> list[Delta]:
    """Ours against every peer, and joint against separate: per scene, then the mean of the scenes' figures."""
    codecs = sorted({p.codec for p in points})
    scenes = sorted({p.scene for p in points} - {MEAN})
    peers = [name for name in codecs if name not in (SEPARATE, JOINT)]
    pairs = [(anchor, test) for test in (SEPARATE, JOINT) for anchor in peers] + [(SEPARATE, JOINT)]
    result = []
    for anchor, test in pairs:
        for metric in METRICS:
            per_scene = [_delta(points, anchor, test, metric, scene) for scene in scenes]
            known = [delta.percent for delta in per_scene if not delta.reason]
            left_out = len(per_scene) - len(known)
            reason = f"{left_out} of {len(per_scene)} scenes have none" if left_out else ""
            result += [*per_scene, Delta(anchor, test, metric, MEAN, _mean(known), reason)]
    return result


def _delta(points: Sequence[CurvePoint], anchor: str, test: str, metric: str, scene: str) -> Delta:
    curves = [curve(points, codec, scene, metric) for codec in (anchor, test)]
    try:
        return Delta(anchor, test, metric, scene, bd_rate(*curves))
    except UsageError as error:
        return Delta(anchor, test, metric, scene, math.nan, str(error))


def joint_gain_db(points: Sequence[CurvePoint]) -> dict[str, float]:
    """PSNR of joint over separate decoding of the same files: mean over the qualities, per scene and "mean"."""
    psnr = {(p.codec, p.scene, p.setting): p.psnr_db for p in points}
    gains: dict[str, list[float]] = defaultdict(list)
    for (codec, scene, setting), value in psnr.items():
        if codec == JOINT:
            gains[scene].append(value - psnr[SEPARATE, scene, setting])
    return {scene: _mean(values) for scene, values in gains.items()}


def check_estimate(points: Iterable[Point]) -> EstimateCheck:
    """Over all our files; -log2 p is what training minimised, so a difference is rate that training never saw."""
    files = [p for p in points if p.codec == SEPARATE]
    payload = [p.bytes - int(p.extra["overhead_bytes"]) for p in files]
    estimated = [p.extra["estimated_bytes"] for p in files]
    off = [100 * (real / ideal - 1) for real, ideal in zip(payload, estimated, strict=True)]
    return EstimateCheck(len(files), sum(payload), sum(estimated), max(off, key=abs))


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan
