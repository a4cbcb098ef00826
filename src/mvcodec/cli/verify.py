"""`mvcodec verify`: is a .phv intact? Checksums need no torch; `--deep` decodes the integers."""

from __future__ import annotations

import click

from mvcodec import container
from mvcodec.cli.report import Report, reporting, running, within_pixels
from mvcodec.cli.targets import parts_in, sources
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
    """Check every checksum of .phv files; exit code 4 if the file is corrupt or cut short.

    With --deep the integers are decoded too and compared with the check of each slice. Exit code 7 means that
    this machine computes other integers than the encoder did, 5 that the weights are not here. Of several files some
    of which fail it is 6.
    """
    for source in sources(inputs, frozenset({STREAM_SUFFIX})):
        for name, data, _ in parts_in(report, source):
            with report.file(name):
                stream = container.unpack(data)
                if deep:
                    from mvcodec import api

                    api.check_integers(stream, max_pixels=max_pixels, model=model, device=device)
                record = {
                    "file": name,
                    "ok": True,
                    "deep": deep,
                    "bytes": len(data),
                    "camera_id": stream.header.camera_id,
                    "frame": stream.header.frame,
                }
                lines = [] if report.quiet else [f"{name}: intact, {len(data)} bytes"]
                report.result(record, *lines)
    report.finish()
