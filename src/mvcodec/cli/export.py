"""`mvcodec export`: a training checkpoint -> a model file."""

from __future__ import annotations

from pathlib import Path

import click

from mvcodec.cli.report import Report, reporting
from mvcodec.errors import UsageError


@click.command(short_help="Make a model file of a training checkpoint.")
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.safetensors",
    help="Default: the profile's name, beside the checkpoint.",
)
@click.option(
    "--calibrate",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DATA_DIR",
    help="Training pictures. The entropy path then takes half the time, and its tables fit: 1 % fewer bits.",
)
@click.option(
    "--bits-of",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.safetensors",
    help="Keep this model's entropy path, and with it its id and its files; default: that of the model file with which"
    " stages that move no bit began.",
)
@click.option("--card", is_flag=True, help="Also write what is known of the model, as FILE.md.")
@click.option("-f", "--force", is_flag=True, help="Overwrite.")
@reporting
def export(
    report: Report,
    checkpoint: Path,
    output: Path | None,
    calibrate: Path | None,
    bits_of: Path | None,
    card: bool,
    force: bool,
) -> None:
    """Make a model file of CHECKPOINT, with its averaged weights, for `--model` or the folder $MVCODEC_MODELS."""
    from mvcodec.training.checkpoint import read_checkpoint
    from mvcodec.training.export import describe, export_checkpoint

    state = read_checkpoint(checkpoint)
    target = output or checkpoint.with_name(f"{state['model_config']['profile']}.safetensors")
    if target.suffix != ".safetensors":
        raise UsageError(f"{target}: a model file ends in .safetensors")
    written = [target, *([target.with_suffix(".md")] if card else [])]
    if (there := [path for path in written if path.exists()]) and not force:
        raise UsageError(f"{there[0]}: exists; say --force to overwrite it")
    if calibrate and not bits_of and "entropy" in state:
        report.note("--calibrate: nothing to do; the checkpoint keeps the entropy path of the model that it began with")
    identity = export_checkpoint(checkpoint, target, calibrate, bits_of)
    if card:
        describe(checkpoint, target, identity)
    record = {
        "weights": str(target),
        "model_id": identity.hex(),
        "steps": state["step"],
        "bytes": target.stat().st_size,
    }
    report.result(record, f"{target}: model {identity.hex()}, {record['bytes'] / 1e6:.1f} MB, {state['step']} steps")
