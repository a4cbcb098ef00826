"""`mvcodec models`: the weights at hand."""

from __future__ import annotations

import click

from mvcodec.cli.report import Report, reporting


@click.command(short_help="List the weights at hand.")
@reporting
def models(report: Report) -> None:
    """List the weights that came with the package and those in the folder $MVCODEC_MODELS.

    A .phv names its weights by the model id; files decode as long as the id is listed here.
    """
    from mvcodec import weights

    for path in weights.available_models():
        with report.file(path.name):
            tensors, config, about = weights.read_model_file(path)
            identity = weights.entropy_id(tensors, config).hex()
            parameters = sum(t.numel() for name, t in tensors.items() if not name.startswith("tables."))
            size_bytes = path.stat().st_size
            record = {
                "name": path.stem,
                "default": path.stem == weights.DEFAULT_MODEL,
                "model_id": identity,
                "profile": config.profile,
                "parameters": parameters,
                "bytes": size_bytes,
                "path": str(path),
                **about,
            }
            mark = "*" if record["default"] else " "
            size = f"{parameters / 1e6:.1f} M parameters, {size_bytes / 1e6:.1f} MB"
            report.result(record, f"{mark} {path.stem:<12} {identity}  {config.profile:<6} {size}  {path}")
    if not report.successes:
        report.note("no weights found; train some with `mvcodec train`, or point $MVCODEC_MODELS to a folder")
    report.finish()
