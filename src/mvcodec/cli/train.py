"""`mvcodec train`: new weights from folders of scenes."""

from __future__ import annotations

import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from mvcodec.cli.report import Report, on_device, reporting
from mvcodec.errors import UsageError
from mvcodec.training.config import STAGES, TrainConfig, read_config

FOLDER = click.Path(exists=True, file_okay=False)
MOST = 1024  # threads, processes: more is a slip of the hand
NO_SETTINGS = ("config", "resume", "json", "verbose", "quiet", "help")  # of a call, not of a run


class Finite(click.FloatRange):
    """Without nan, which no range excludes, and inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def from_file(ctx: click.Context, option: click.Parameter, name: str | None) -> None:
    """The file's settings become the options' defaults: what stands on the command line goes before."""
    if name is None:
        return
    parameters = {"data": next(p for p in ctx.command.params if p.name == "data")}  # by setting
    for parameter in ctx.command.params:
        for word in parameter.opts:
            if word.startswith("--") and word[2:] not in NO_SETTINGS:
                parameters[word[2:]] = parameter
    values = read_config(name, parameters)
    for key, value in values.items():
        if not fits(parameters[key], value):
            raise UsageError(f"--config {name}: {key} cannot be {value!r}")
        try:
            parameters[key].type_cast_value(ctx, value)
        except click.BadParameter as error:
            raise UsageError(f"--config {name}: {key}: {error.message}") from error
    ctx.default_map = {str(parameters[key].name): value for key, value in values.items()}


def fits(parameter: click.Parameter, value: object) -> bool:
    """Whether a value of a TOML file is of this parameter's kind; click takes 1.9 for 1, and stumbles over lists."""
    if isinstance(value, str):
        return True  # as on the command line
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return type(value) is bool
    if isinstance(parameter.type, click.types.FloatParamType):
        return type(value) in (int, float)
    return isinstance(parameter.type, click.types.IntParamType) and type(value) is int


@click.command(short_help="Train weights on folders of overlapping pictures.")
@click.argument("data", metavar="DATA_DIR", type=FOLDER)
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=from_file,
    metavar="NAME|FILE",
    help="Settings from a TOML file or a shipped one (fast-single, fast-decoder, fast-refine, fast-cells,"
    " fast-joint, fast-quantise, paper-single, paper-joint). Its keys are the options' names; options given here go"
    " before.",
)
@click.option("--profile", type=click.Choice(["fast", "paper", "tiny"]), default="fast", show_default=True)
@click.option(
    "--stage",
    type=click.Choice(STAGES),
    default="single",
    show_default=True,
    help="single: all, on lone views; decoder: the same without what fixes the bits; refine: the aligned refinement"
    " with peers; cells: what integers tell of the error left; joint: Para-JD's fusions, on sets of views; quantise:"
    " the entropy model, rounded as it will be.",
)
@click.option(
    "--out",
    "--run-dir",
    "run_dir",
    type=click.Path(file_okay=False),
    required=True,
    metavar="DIR",
    help="Checkpoint, logs and weights go there.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, if there is one yet.")
@click.option(
    "--start-from",
    type=click.Path(exists=True, dir_okay=False),
    help="Begin with the weights of a checkpoint or model file.",
)
@click.option("--validation", type=FOLDER, help="Folder of scenes to validate on during the run.")
@click.option("--validate-every", type=click.IntRange(min=1), default=500, show_default=True, help="In steps.")
@click.option("--steps", type=click.IntRange(min=1), default=4000, show_default=True, help="Length of the schedule.")
@click.option("--minutes", type=Finite(min=0), default=0.0, help="Stop, resumable, after so long.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Views per step, over all processes."
)
@click.option("--crop", type=click.IntRange(min=64), default=256, show_default=True, help="A multiple of 64.")
@click.option("--crop-width", type=click.IntRange(min=0), default=0, help="Of wide crops; 0: as --crop.")
@click.option("--max-views", type=click.IntRange(min=2), default=6, show_default=True, help="Of stage joint.")
@click.option(
    "--jitter",
    type=Finite(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the views that get colours and exposure of another camera.",
)
@click.option(
    "--synthetic",
    type=Finite(0, 1),
    default=0.0,
    show_default=True,
    help="Of stage joint: share of the sets whose views are made from one picture, with parallax and occlusion.",
)
@click.option(
    "--parallax",
    type=Finite(min=0),
    default=0.0,
    show_default=True,
    help="Of stage joint: how much it counts at first where attention looks; from half of the steps on, nothing.",
)
@click.option("--synthesis", is_flag=True, help="Of stage joint: train the synthesis, too; lone views then change.")
@click.option(
    "--distortion",
    type=click.Choice(["mse", "ms-ssim"]),
    default="mse",
    show_default=True,
    help="What the loss weighs against bits, in stage refine peers against none.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "muon"]),
    default="adamw",
    show_default=True,
    help="muon: on hidden convolutions, AdamW on the rest; stages refine and cells know adamw alone.",
)
@click.option("--lr", "learning_rate", type=Finite(0, min_open=True), default=5e-4, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(0, MOST), default=0, help="CPU threads; 0: all.")
@click.option("--workers", type=click.IntRange(0, MOST), default=0, help="Processes that cut crops ahead; 0: none.")
@click.option("--compile", is_flag=True, help="Run through torch.compile (CUDA only).")
@on_device
@reporting
def train(report: Report, resume: bool, device: str, **settings: Any) -> None:
    """Train weights on DATA_DIR, a folder of scenes, each a folder of overlapping pictures of one place.

    First what a lone view uses, then its decoder by itself, then the refinement with peers, then what integers tell:

    \b
        mvcodec train scenes/ --config fast-single --out runs/a
        mvcodec train scenes/ --config fast-decoder --out runs/b --start-from runs/a/checkpoint.pt
        mvcodec train scenes/ --config fast-refine --out runs/c --start-from runs/b/checkpoint.pt
        mvcodec train scenes/ --config fast-cells --out runs/d --start-from runs/c/checkpoint.pt

    Interrupting is safe: the checkpoint is written, and --resume goes on as if nothing had happened. Several
    processes train as one under torchrun: torchrun --nproc-per-node 4 -m mvcodec train ...
    """  # noqa: D301 (click reads the backspace)
    run = Path(settings["run_dir"])
    for name in ("crop", "crop_width"):
        if settings[name] % 64:
            raise UsageError(f"--{name.replace('_', '-')} {settings[name]}: must be a multiple of 64")
    begun = (run / "checkpoint.pt").exists()
    if begun and not resume:
        raise UsageError(f"--out {run}: has a checkpoint; say --resume or name another")
    if resume and not begun:
        report.note(f"{run}: no checkpoint yet; begins")

    from mvcodec import api
    from mvcodec.training.checkpoint import read_checkpoint
    from mvcodec.training.export import export_checkpoint
    from mvcodec.training.loop import train as train_

    given = {name: value for name, value in settings.items() if value is not None}
    config = TrainConfig(**given, device=str(api.resolve_device(device)))
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes: the one that speaks
    with redirect_stdout(sys.stderr):  # stdout is for the result alone
        checkpoint = train_(config, first and not report.quiet and sys.stderr.isatty(), report.quiet)
    if not first:
        return
    if not checkpoint.exists():  # --minutes ended while stage refine or cells prepared
        nothing = dict.fromkeys(("checkpoint", "weights", "model_id"))
        report.result(nothing, f"{run}: nothing trained yet, prepared in part; --resume goes on")
        return
    weights = run / f"{read_checkpoint(checkpoint)['model_config']['profile']}.safetensors"
    identity = export_checkpoint(checkpoint, weights, Path(config.data)).hex()
    record = {"checkpoint": str(checkpoint), "weights": str(weights), "model_id": identity}
    report.result(record, f"{weights}: model {identity}, for --model; {checkpoint} to train on")
