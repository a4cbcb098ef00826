"""`mvcodec info`: what a .phv says about itself, from its header alone. No torch."""

from __future__ import annotations

from typing import Any

import click

from mvcodec import container
from mvcodec.cli.report import Report, reporting
from mvcodec.cli.targets import parts_in, sources
from mvcodec.frames import STREAM_SUFFIX


@click.command(short_help="Show what .phv files say about themselves.")
@click.argument("inputs", nargs=-1, required=True, metavar="FILE|DIR|-...")
@reporting
def info(report: Report, inputs: tuple[str, ...]) -> None:
    """Show the header of .phv files: camera, time, size, quality, model, and the size of each section.

    Concatenated files are listed one by one. Nothing is decoded and no checksum but the header's is computed:
    that is `mvcodec verify`.
    """
    for source in sources(inputs, frozenset({STREAM_SUFFIX})):
        for part in parts_in(report, source):
            fields = container.describe(part.data)
            report.result({"file": part.name, **fields}, *_table(part.name, fields, report.verbose))
    report.finish()


def _table(name: str, fields: dict[str, Any], verbose: bool) -> list[str]:
    sections = fields.pop("sections") if not verbose else fields["sections"]
    lines = [name]
    for key, value in fields.items():
        if key == "sections":
            lines += [f"    {s['name']:<22}{s['bytes']:>9} bytes at {s['offset']}" for s in sections]
        elif value not in (None, ""):
            lines.append(f"  {key.replace('_', ' '):<16} {value}")
    return lines
