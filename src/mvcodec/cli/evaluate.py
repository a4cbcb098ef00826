"""`mvcodec evaluate`: rate and distortion on scenes, against other codecs."""

from __future__ import annotations

from pathlib import Path

import click

from mvcodec.cli.report import Report, reporting, running
from mvcodec.errors import UsageError


def _numbers(ctx: click.Context, option: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = (-1.0,)
    if not all(0 <= number <= 100 for number in numbers):
        raise UsageError(f"--qualities {value}: use numbers from 0 to 100, such as 10,30,50,70,90")
    return numbers


def _names(ctx: click.Context, option: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())


@click.command(short_help="Measure rate and distortion on scenes, against other codecs.")
@click.argument("data", metavar="DATA_DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--out", required=True, metavar="DIR", help="Tables, plot and all points go there.")
@click.option(
    "--qualities",
    default="5,20,40,60,80,95",
    show_default=True,
    metavar="Q,Q,...",
    callback=_numbers,
    help="At least four, 0 to 100.",
)
@click.option("--effort", type=click.IntRange(0, 5), default=0, show_default=True, help="As of `mvcodec encode`.")
@click.option(
    "--peers",
    default="jpeg,webp,avif,jxl,x265,vvc,vvc-video",
    show_default=True,
    metavar="NAME,...",
    callback=_names,
    help="Codecs to compare with; one that is not here is left out. Say none for none.",
)
@click.option("--peer-results", metavar="FILE", help="Keep the peers' points here, for the next model. [in --out]")
@click.option("--scenes", default="", metavar="NAME,...", callback=_names, help="Some of the scenes. [all]")
@click.option("--limit-views", type=click.IntRange(min=1), help="The first N views of each scene. [all]")
@running
@reporting
def evaluate(
    report: Report,
    data: str,
    out: str,
    qualities: tuple[float, ...],
    effort: int,
    peers: tuple[str, ...],
    peer_results: str | None,
    scenes: tuple[str, ...],
    limit_views: int | None,
    model: str | None,
    device: str,
) -> None:
    """Code the scenes of DATA_DIR and compare codecs.

    A scene is a folder of overlapping pictures of one place, or one frame of a rig (C1/0007.png, cam1_0007.png).
    Rates are those of real .phv files. Each view is decoded alone and together with the others of its scene. An
    interrupted run goes on where it was: what lies in --out is not measured again.
    """
    from mvcodec import api
    from mvcodec.evaluation import report as reports
    from mvcodec.evaluation.peers import PEERS

    wanted = () if peers == ("none",) else peers
    if unknown := [name for name in wanted if name not in PEERS]:
        raise UsageError(f"--peers {unknown[0]}: use some of {', '.join(PEERS)}, or none")
    result = reports.evaluate(
        Path(data),
        api.load_model(model, device),
        Path(out),
        qualities=qualities,
        effort=effort,
        peers=wanted,
        scenes=scenes,
        limit_views=limit_views,
        peer_results=None if peer_results is None else Path(peer_results),
        tell=report.note,
    )
    report.result(result.summary(), *reports.table(result).split("\n"))
    report.note(f"curves.csv, bd_rate.csv, summary.json and rate_distortion.png are in {out}")
