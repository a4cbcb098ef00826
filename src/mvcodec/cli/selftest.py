"""`mvcodec selftest`: does this machine compute the same integers as all others?"""

from __future__ import annotations

import time

import click

from mvcodec.cli.report import Report, reporting, running


@click.command(short_help="Prove that this machine decodes bit-exactly.")
@running
@reporting
def selftest(report: Report, model: str | None, device: str) -> None:
    """Check that this machine computes the integers that every other machine does; takes under a minute.

    Bounds of all sums, extreme inputs on the actual device, the range coder's words, the released golden file, and
    processes with other threads and fewer processor instructions. Exit code 7 means: do not decode here.
    """
    from mvcodec import api
    from mvcodec import selftest as checks

    loaded = api.load_model(model, device)
    started = time.monotonic()
    for name, sentence in checks.run(loaded):
        report.result({"check": name, "ok": True, "about": sentence}, f"ok  {name}: {sentence}")
    report.note(f"{loaded.name} {loaded.id.hex()} on {loaded.device}: exact ({time.monotonic() - started:.0f} s)")
