"""A run's curves: CSV files that grow while it trains, and their plot."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from mvcodec.files import atomic


def append_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV, writing its header first if it is new."""
    if not rows:
        return
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def columns(path: Path) -> dict[str, list[float]]:
    """A CSV of numbers as name -> column; empty if there is no such file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else [])}


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
    for rate in rates:
        for step in sorted(set(validation["step"])):
            of_step = [i for i, s in enumerate(validation["step"]) if s == step]
            bpp, psnr = ([validation[name][i] for i in of_step] for name in ("bpp", "psnr_joint"))
            rate.plot(bpp, psnr, marker=".", label=f"step {step:.0f}")
        rate.set(xlabel="estimated bpp", ylabel="PSNR of joint decoding (dB)", title="validation")
        rate.legend(fontsize="x-small", ncols=2)
    with atomic(run / "curves.png") as file:
        figure.savefig(file, format="png", dpi=100)
