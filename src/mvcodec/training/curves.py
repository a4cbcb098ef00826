"""A run's curves: CSV files that grow while it trains, and their plot."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mvcodec.files import atomic


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV, whole or not at all, in the place of those of their and later steps: a run that goes on from
    a checkpoint makes them anew. A column that some rows do not have is nan there.
    """
    if not rows:
        return
    first = rows[0]["step"]
    rows = [row for row in _rows(path) if float(row["step"]) < first] + rows
    names = dict.fromkeys(name for row in rows for name in row)
    with atomic(path) as file:
        text = io.TextIOWrapper(file, newline="", write_through=True)
        writer = csv.DictWriter(text, list(names), restval="nan")
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def _rows(path: Path) -> list[dict[str, str]]:
    """What there is in a CSV of numbers, without rows that a crash has cut."""
    if not path.exists():
        return []
    with path.open(newline="", errors="replace") as file:
        return [row for row in csv.DictReader(file) if "step" in row and _numbers(row)]


def _numbers(row: dict[str, str]) -> bool:
    try:
        return bool([float(value) for value in row.values()])
    except (TypeError, ValueError):
        return False


def columns(path: Path) -> dict[str, list[float]]:
    """A CSV of numbers as name -> column; empty if there is no such file."""
    rows = _rows(path)
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else [])}


def draw_if_possible(run: Path) -> None:
    """`draw`, which must not end a run."""
    try:
        draw(run)
    except Exception as error:
        tqdm.write(f"{run / 'curves.png'}: not drawn ({type(error).__name__}: {error})", file=sys.stderr)


def draw(run: Path) -> None:
    """curves.png from log.csv and validation.csv of the run: loss over steps, rate against PSNR."""
    from matplotlib.figure import Figure

    log, validation = columns(run / "log.csv"), columns(run / "validation.csv")
    if not log:
        return

    figure = Figure(figsize=(11 if validation else 6, 4), layout="constrained")
    loss, *rates = figure.subplots(1, 2 if validation else 1, squeeze=False)[0]
    steps, values = np.array(log["step"]), np.array(log["loss"])
    span = max(1, len(values) // 50)
    whole = len(values) // span * span
    loss.plot(steps, values, color="0.8", linewidth=0.5)
    loss.plot(*(x[:whole].reshape(-1, span).mean(axis=1) for x in (steps, values)), label=f"mean of {span}")
    loss.set(xlabel="step", ylabel="training loss", yscale="log")
    loss.legend()
    best = "psnr_joint" if "psnr_joint" in validation else "psnr_separate"
    for rate in rates:
        for step in sorted(set(validation["step"])):
            of_step = [i for i, s in enumerate(validation["step"]) if s == step]
            bpp, psnr = ([validation[name][i] for i in of_step] for name in ("bpp", best))
            rate.plot(bpp, psnr, marker=".", label=f"step {step:.0f}")
        rate.set(xlabel="estimated bpp", ylabel=f"PSNR of {best[5:]} decoding (dB)", title="validation")
        rate.legend(fontsize="x-small", ncols=2)
    with atomic(run / "curves.png") as file:
        figure.savefig(file, format="png", dpi=100)
