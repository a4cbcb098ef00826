"""A checkpoint's averaged weights -> a model file that `mvcodec --model` takes, and a card of what is known of it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from mvcodec.files import atomic
from mvcodec.parahydra import ModelConfig, ParaHydra
from mvcodec.training.checkpoint import load_weights, read_checkpoint
from mvcodec.training.curves import columns
from mvcodec.training.data import calibration_pictures
from mvcodec.training.rounding import settle
from mvcodec.training.table_fit import fit_tables
from mvcodec.weights import export_model, load_model, read_entropy_path

ABOUT = ("stage", "distortion", "batch", "crop", "seed")  # what of the run's settings the model file tells


def export_checkpoint(
    checkpoint: Path, target: Path, calibration: Path | None = None, bits_of: Path | None = None
) -> bytes:
    """Write the model file, whole or not at all; returns the model id.

    calibration: folder of training pictures, for an entropy path that is quick and tables that fit; bits_of: a
    model file whose entropy path is taken instead, and with it its id; by default what a checkpoint of a stage that
    moves no bit keeps of the model it began with.
    """
    state = read_checkpoint(checkpoint)
    net = ParaHydra(ModelConfig.from_dict(state["model_config"]))
    if "calibration" in state:
        settle(net, state["calibration"], state["ema"])
    else:
        load_weights(net, state["ema"], checkpoint)
    about = {"steps": str(state["step"]), **{name: str(state["train_config"][name]) for name in ABOUT}}
    kept = state.get("entropy") if bits_of is None else read_entropy_path(bits_of, net.config)
    if calibration is None or kept is not None:
        return export_model(net, target, about, entropy=kept)
    pictures = calibration_pictures(calibration)
    with TemporaryDirectory() as folder:
        draft = Path(folder) / target.name
        export_model(net, draft, pictures=pictures)
        return export_model(net, target, about, pictures, gaussian=fit_tables(load_model(draft), pictures))


def describe(checkpoint: Path, target: Path, identity: bytes) -> Path:
    """The model's card beside it: configuration, settings and last validation of the run. Returns its path."""
    state = read_checkpoint(checkpoint)
    size = f"{target.stat().st_size / 1e6:.1f} MB"
    parameters = sum(value.numel() for value in state["ema"].values()) / 1e6
    lines = [
        f"# {target.stem}",
        "",
        f"Profile `{state['model_config']['profile']}`, {parameters:.1f} M parameters, {size}, model id"
        f" `{identity.hex()}`, {state['step']} steps of stage `{state['train_config']['stage']}`.",
    ]
    validation = columns(checkpoint.parent / "validation.csv")
    if validation:
        lines += ["", "## Last validation", "", "Estimated rates on centre crops, averaged weights.", ""]
        psnrs = [name for name in validation if name.startswith("psnr_")]
        lines += [" | ".join(["| quality | bpp", *(f"PSNR {name[5:]}" for name in psnrs)]) + " |"]
        lines += ["|---" * (2 + len(psnrs)) + "|"]
        for i in (i for i, step in enumerate(validation["step"]) if step == validation["step"][-1]):
            found = "".join(f" {validation[name][i]:.2f} |" for name in psnrs)
            lines.append(f"| {100 * validation['quality'][i]:.0f} | {validation['bpp'][i]:.4f} |{found}")
    for title, settings in (("Training", state["train_config"]), ("Configuration", state["model_config"])):
        lines += ["", f"## {title}", "", "| setting | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in settings.items()]
    card = target.with_suffix(".md")
    with atomic(card) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return card
