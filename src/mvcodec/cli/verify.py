"""`mvcodec verify`: is a .phv intact? Checksums need no torch; `--deep` decodes the integers."""

from __future__ import annotations

import click

from mvcodec import container
from mvcodec.cli.report import Report, reporting, running, within_pixels
from mvcodec.cli.targets import label, sources, streams_in
from mvcodec.frames import STREAM_SUFFIX


@click.command(short_help="Check that .phv files are intact.")
@click.argument("inputs", nargs=-1, required=True, metavar="FILE|DIR|-...")
@click.option("--deep", is_flag=True, help="Also decode the integers and compare them with their checks.")
@within_pixels
@running
@reporting
def verify(
    report: Report, inputs: tuple[str, ...], deep: bool, max_pixels: int, model: str | None, device: str
) -> None:
    """Check every checksum of .phv files; exit code 4 if one is corrupt or cut short.

    With --deep the integers are decoded too and compared with the check of each slice. Exit code 7 means that
    this machine computes other integers than the encoder did, 5 that the weights are not here.
    """
    for source in sources(inputs, frozenset({STREAM_SUFFIX})):
        parts: list[bytes] = []
        failures = len(report.failures)
        with report.file(label(source.path)):  # what stands before the damage can be checked
            parts.extend(streams_in(source))
        alone = len(parts) == 1 and len(report.failures) == failures
        for number, part in enumerate(parts):
            name = label(source.path) if alone else f"{label(source.path)}[{number}]"
            with report.file(name):
                stream = container.unpack(part)
                if deep:
                    from mvcodec import api

                    api.check_integers(stream, max_pixels=max_pixels, model=model, device=device)
                record = {
                    "file": name,
                    "ok": True,
                    "deep": deep,
                    "bytes": len(part),
                    "camera_id": stream.header.camera_id,
                    "frame": stream.header.frame,
                }
                lines = [] if report.quiet else [f"{name}: intact, {len(part)} bytes"]
                report.result(record, *lines)
    report.finish()
