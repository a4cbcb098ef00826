"""`mvcodec train`: new weights from folders of scenes."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click

from mvcodec.cli.report import Report, on_device, reporting
from mvcodec.errors import UsageError

FOLDER = click.Path(exists=True, file_okay=False)


@click.command(short_help="Train weights on folders of overlapping pictures.")
@click.argument("data", metavar="DATA_DIR", type=FOLDER)
@click.option("--profile", type=click.Choice(["fast", "paper", "tiny"]), default="fast", show_default=True)
@click.option(
    "--stage",
    type=click.Choice(["single", "joint", "refine"]),
    default="single",
    show_default=True,
    help="single: all, on lone views; joint: the joint decoder, on sets of views; refine: its aligned refinement.",
)
@click.option(
    "--out",
    "--run-dir",
    "run_dir",
    required=True,
    metavar="DIR",
    help="Checkpoint, logs and weights go there.",
)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out.")
@click.option(
    "--start-from", type=click.Path(exists=True), help="Begin with the weights of a checkpoint or model file."
)
@click.option("--validation", type=FOLDER, help="Folder of scenes to validate on during the run.")
@click.option("--validate-every", type=click.IntRange(min=1), default=500, show_default=True, help="In steps.")
@click.option("--steps", type=click.IntRange(min=1), default=4000, show_default=True, help="Length of the schedule.")
@click.option("--minutes", type=click.FloatRange(min=0), default=0.0, help="Stop, resumable, after so long.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Views per step.")
@click.option("--crop", type=click.IntRange(min=64), default=256, show_default=True, help="A multiple of 64.")
@click.option("--max-views", type=click.IntRange(min=2), default=3, show_default=True, help="Of stage joint.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), default=5e-4, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads; 0: all.")
@on_device
@reporting
def train(
    report: Report,
    data: str,
    profile: str,
    stage: str,
    run_dir: str,
    resume: bool,
    start_from: str | None,
    validation: str | None,
    validate_every: int,
    steps: int,
    minutes: float,
    batch: int,
    crop: int,
    max_views: int,
    lr: float,
    seed: int,
    threads: int,
    device: str,
) -> None:
    r"""Train weights on DATA_DIR, a folder of scenes, each a folder of overlapping pictures of one place.

    First the single-view stage, then the joint one, then the refinement:

    \b
        mvcodec train scenes/ --out runs/a --steps 20000
        mvcodec train scenes/ --out runs/b --stage joint --start-from runs/a/checkpoint.pt
        mvcodec train scenes/ --out runs/c --stage refine --start-from runs/b/checkpoint.pt

    Interrupting is safe: the checkpoint is written, and --resume goes on as if nothing had happened.
    """
    if crop % 64:
        raise UsageError(f"--crop {crop}: must be a multiple of 64")
    if (Path(run_dir) / "checkpoint.pt").exists() != resume:
        state = "has no checkpoint to resume from" if resume else "has a checkpoint; say --resume or name another"
        raise UsageError(f"--out {run_dir}: {state}")

    from mvcodec import api
    from mvcodec.training.export import export_checkpoint
    from mvcodec.training.loop import TrainConfig
    from mvcodec.training.loop import train as run

    config = TrainConfig(
        data=data,
        run_dir=run_dir,
        profile=profile,
        stage=stage,
        steps=steps,
        batch=batch,
        crop=crop,
        max_views=max_views,
        learning_rate=lr,
        seed=seed,
        device=str(api.resolve_device(device)),
        threads=threads,
        start_from=start_from or "",
        validation=validation or "",
        validate_every=validate_every,
        minutes=minutes,
    )
    with redirect_stdout(sys.stderr):  # stdout is for the result alone
        checkpoint = run(config, progress=not report.quiet and sys.stderr.isatty())
    weights = Path(run_dir) / f"{profile}.safetensors"
    identity = export_checkpoint(checkpoint, weights).hex()
    record = {"checkpoint": str(checkpoint), "weights": str(weights), "model_id": identity}
    report.result(record, f"{weights}: model {identity}, for --model; {checkpoint} to train on")
