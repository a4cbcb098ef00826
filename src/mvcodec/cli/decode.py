"""`mvcodec decode`: .phv files of any number of cameras -> pictures, instant by instant."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mvcodec import container
from mvcodec.cli.report import Report, reporting, running, within_memory, within_pixels
from mvcodec.cli.targets import STDIN, Targets, label, parts_in, placing, sources
from mvcodec.errors import MvcodecError, PictureError, UsageError
from mvcodec.frames import STREAM_SUFFIX, Instant, Source, instants, place_of, safe_path

if TYPE_CHECKING:
    from mvcodec.cli.maps import Maps
    from mvcodec.codec import DecodedView

FORMATS = ("png", "tif", "ppm", "bmp", "jpg", "webp")


@dataclass(frozen=True)
class Received:
    """One .phv as it came: `name` for messages, `source` for where its picture goes, `rig` for where its peers are."""

    name: str
    source: Source
    data: bytes
    header: container.Header
    rig: str

    @property
    def instant(self) -> Instant:
        return Instant(self.header.frame, self.header.timestamp_us, self.source.place)


class Finishing(NamedTuple):
    """A decoded view whose file is being made in a thread: compressing a PNG takes no interpreter."""

    view: Received
    picture: DecodedView
    file: Future[bytes]
    seconds: float  # its instant took to decode


@click.command(short_help="Reconstruct pictures from any number of .phv files.")
@click.argument("inputs", nargs=-1, required=True, metavar="FILE|DIR|-...")
@placing
@click.option(
    "--format",
    "kind",
    type=click.Choice(FORMATS),
    help="Kind of picture to write; jpg alone loses something (quality 95). Default: from -o FILE, else png.",
)
@click.option(
    "--only",
    multiple=True,
    metavar="CAM",
    help="Write this camera alone (repeatable); the others still help.",
)
@click.option("--require", type=click.IntRange(min=1), metavar="N", help="Fail an instant with fewer than N views.")
@click.option("--preview", is_flag=True, help="Decode each view alone: faster, without help from the others.")
@click.option(
    "--no-refine",
    is_flag=True,
    help="Leave out the alignment of views at pixel level and all that peers add by it. Left in: Para-JD's fusion of "
    "the views' features, and the part of the refinement that cleans each view by itself.",
)
@click.option(
    "--max-peers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Align each view with its N most consistent peers only: time then grows with N, not with the views.",
)
@click.option(
    "--maps",
    metavar="DIR",
    help="Write there, per view and peer, what the peer contributed: DIR/VIEW.from_PEER.png, red for nothing, yellow "
    "for a quarter, green for half and more.",
)
@click.option("--partial", is_flag=True, help="Of a damaged or truncated file decode what is intact.")
@click.option(
    "--window-us",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Views without frame number belong together if their timestamps differ by at most this.",
)
@within_pixels
@within_memory
@running
@reporting
def decode(
    report: Report,
    inputs: tuple[str, ...],
    output: str | None,
    force: bool,
    skip_existing: bool,
    kind: str | None,
    only: tuple[str, ...],
    require: int | None,
    preview: bool,
    no_refine: bool,
    max_peers: int | None,
    maps: str | None,
    partial: bool,
    window_us: int,
    max_pixels: int,
    max_memory: int | None,
    model: str | None,
    device: str,
) -> None:
    """Reconstruct pictures from any number of .phv files.

    Views of one instant (same frame number, else same time, else one folder) are decoded together and improve
    each other. A camera that is there twice is one of several rigs, told apart by their folders, or is decoded alone.
    What is missing is told and the rest decoded. Concatenated files may come through stdin:

        cat *.phv | mvcodec decode - -o out/
    """
    from mvcodec import images
    from mvcodec.cli.maps import Maps

    if (preview or no_refine) and (maps or max_peers):
        asked, against = "--maps" if maps else "--max-peers", "--preview" if preview else "--no-refine"
        raise UsageError(f"{asked} is about the peers that {against} leaves out")
    targets = Targets(output, inputs, force=force, skip_existing=skip_existing)
    targets.check_stdout(report.as_json)
    views: list[Received] = []
    found = sources(inputs, frozenset({STREAM_SUFFIX}))
    taken = {source.relative.with_suffix(""): 0 for source in found}
    for source in found:
        views += receive(report, source, max_pixels, taken)
    wanted = [view for view in views if not only or view.header.camera_id in only]
    cameras = sorted({view.header.camera_id for view in views})
    if views and (strangers := set(only).difference(cameras)) and not report.failures:  # damaged files may be theirs
        raise UsageError(f"--only {' '.join(sorted(strangers))}: no such camera; there are {', '.join(cameras)}")
    suffix = targets.suffix(f".{kind or 'png'}")
    try:
        written = images.format_of(suffix)
    except PictureError as error:
        raise UsageError(str(error)) from error
    if kind and written != images.format_of(f".{kind}"):
        raise UsageError(f"--format {kind}: but {output} is the name of another kind of picture")
    paths = targets.plan([(view.source, suffix) for view in wanted])
    places = {id(view): path for view, path in zip(wanted, paths, strict=True)}

    drawn = Maps(maps, [view.source for view in wanted], force, skip_existing) if maps else None
    how = {
        "joint": not preview,
        "refine": not no_refine,
        "max_peers": max_peers,
        "maps": drawn is not None,
        "max_memory": max_memory,
        "max_pixels": max_pixels,
    }

    def there(view: Received, members: Sequence[Received]) -> bool:
        """With --skip-existing: is nothing of this view wanted that is not there already?"""
        present = targets.skips(places[id(view)])
        if drawn is None or not present:
            return present
        peers = sorted({(peer.header.camera_id, peer.data) for peer in members if peer.data != view.data})
        return all(path.exists() for path in drawn.paths(view.source, [camera for camera, _ in peers]))

    sets = list(_sets(instants(views, lambda view: view.instant, window_us), views))
    finishing: list[Finishing] = []  # of the instant before, while the next one is decoded

    def deliver() -> None:
        for done in finishing:
            with report.file(done.view.name):
                _deliver(report, targets, done, places[id(done.view)], drawn)
        finishing.clear()

    with ThreadPoolExecutor(max_workers=2) as threads, ExitStack() as at_the_end:
        at_the_end.callback(deliver)
        for instant, members, everyone in report.progress(sets, "decode"):
            todo = []
            for view in members:
                if id(view) in places and there(view, members):
                    report.skipped(view.name, places[id(view)])
                elif id(view) in places:
                    todo.append(view)
            if not todo:
                continue
            name = todo[0].name if len(members) == 1 else str(instant)
            absent = everyone - {view.header.camera_id for view in members}
            if absent and instant.is_timed:
                report.note(f"{instant}: without {', '.join(sorted(absent))}")
            decoded: dict[int, DecodedView] = {}
            with report.file(name, *(view.name for view in todo)):
                started = time.perf_counter()
                decoded = _decode(report, members, require, partial, model, device, how)
                seconds = time.perf_counter() - started
                report.detail(f"{instant}: {len(decoded)} views in {seconds:.2f} s")
            deliver()
            for view in todo:
                if (picture := decoded.get(id(view))) is not None:
                    file = threads.submit(images.to_bytes, picture.image, suffix)
                    finishing.append(Finishing(view, picture, file, seconds))
    report.finish()


def receive(report: Report, source: Source, max_pixels: int, taken: dict[Path, int]) -> list[Received]:
    """The files in one input: one alone keeps its name, concatenated ones are named by camera and time.

    taken: names that are; another part of the same one gets a number, and one of the same bytes is left out.
    """
    parts = []
    for part in parts_in(report, source):
        with report.file(part.name):
            container.refuse_larger(part.header, max_pixels)
            parts.append(part)
    if len(parts) == 1 and parts[0].name == label(source.path) and source.path != STDIN:
        ((name, data, header),) = parts
        return [Received(name, source, data, header, str(place_of(source.relative, header.camera_id)))]
    taken.pop(source.relative.with_suffix(""), None)  # all of its parts have other names
    received: dict[bytes, Received] = {}
    for name, data, header in parts:
        if (first := received.get(data)) is not None:
            report.result({"file": name, "same_as": first.name}, f"{name}: is {first.name} again, left out", err=True)
            continue
        path = _free(source.relative.parent / safe_path(header.camera_id, header.frame, header.timestamp_us), taken)
        # The ending is there to be replaced, as that of a file would be: a camera id may contain a dot.
        relative = path.with_name(f"{path.name}.phv")
        inside = Source(source.path.parent / relative.relative_to(source.relative.parent), relative, source.place)
        received[data] = Received(name, inside, data, header, str(place_of(source.relative, header.camera_id)))
    return list(received.values())


def _free(path: Path, taken: dict[Path, int]) -> Path:
    """`path`, or where it is taken that with the next number; it is taken then."""
    free = path
    while free in taken:
        taken[path] += 1
        free = path.with_name(f"{path.name}.{taken[path]}")
    taken[free] = 0
    return free


def _sets(
    groups: Iterable[tuple[Instant, list[Received]]], views: Iterable[Received]
) -> Iterator[tuple[Instant, list[Received], set[str]]]:
    """Views to decode together, and the cameras that could be among them: those that tell the time.

    A camera twice at one instant belongs to several rigs: their views are kept apart.
    """
    cameras: dict[str, set[str]] = {view.rig: set() for view in views}
    for view in views:
        if view.instant.is_timed:
            cameras[view.rig].add(view.header.camera_id)
    everyone = set().union(*cameras.values())
    for instant, members in groups:
        rigs = sorted({view.rig for view in members})
        if len(rigs) > 1 and _twice(camera for camera, _ in {(view.header.camera_id, view.data) for view in members}):
            for rig in rigs:
                yield instant._replace(place=rig), [view for view in members if view.rig == rig], cameras[rig]
        else:
            yield instant, members, everyone


def _twice(cameras: Iterable[str]) -> set[str]:
    """Cameras named more than once; any number of views may name none."""
    return {camera for camera, count in Counter(cameras).items() if camera and count > 1}


def _decode(
    report: Report,
    members: Sequence[Received],
    require: int | None,
    partial: bool,
    model: str | None,
    device: str,
    how: dict[str, Any],
) -> dict[int, DecodedView]:
    """Decode what is intact of one instant -> id of the received file: its picture."""
    copies: dict[bytes, list[Received]] = {}  # the same file twice is one view
    for view in members:
        copies.setdefault(view.data, []).append(view)
    intact: list[container.Stream] = []
    owners: dict[int, list[Received]] = {}
    for data, views in copies.items():
        names = [view.name for view in views]
        if len(views) > 1:
            report.note(f"{', '.join(names)}: are the same file; it is decoded once")
        with report.file(", ".join(names), *names):
            stream = container.unpack(data, partial=partial)
            intact.append(stream)
            owners[id(stream.header)] = views
    if require and len(intact) < require:
        raise MvcodecError(f"{len(intact)} of the {require} views required")
    if not intact:
        return {}

    from mvcodec import api

    def names_of(*headers: container.Header) -> list[str]:
        return [view.name for header in headers for view in owners[id(header)]]

    def failed(header: container.Header, error: MvcodecError) -> None:
        names = names_of(header)
        with report.file(", ".join(names), *names):
            raise error

    twins = _twice(stream.header.camera_id for stream in intact) if how["joint"] else set()
    for camera in sorted(twins):
        names = names_of(*(stream.header for stream in intact if stream.header.camera_id == camera))
        report.note(f"camera {camera} is there {len(names)} times, {', '.join(names)}: each is decoded alone")
    alone = [[stream] for stream in intact if stream.header.camera_id in twins]
    together = [stream for stream in intact if stream.header.camera_id not in twins]
    decoded: list[DecodedView] = []
    for streams in (*api.by_model(together), *alone):  # each for itself: the weights of one may be missing
        names = names_of(*(stream.header for stream in streams))
        with report.file(", ".join(names), *names):
            decoded += api.decode_set(streams, model=model, device=device, on_failure=failed, **how)
    if require and len(decoded) < require:
        raise MvcodecError(f"{len(decoded)} of the {require} views required")
    return {id(view): picture for picture in decoded for view in owners[id(picture.header)]}


def _deliver(report: Report, targets: Targets, done: Finishing, path: Path, drawn: Maps | None) -> None:
    view, decoded = done.view, done.picture
    if not targets.skips(path):  # else its maps were not there
        targets.write(path, done.file.result())
    header = decoded.header
    maps = []
    if drawn is not None and decoded.maps is not None:
        maps = drawn.write(view.source, decoded.peers, decoded.maps)
    damage = None if decoded.damage is None else decoded.damage.reason
    record = {
        "file": view.name,
        "output": label(path),
        "camera_id": header.camera_id,
        "frame": header.frame,
        "timestamp_us": header.timestamp_us,
        "width": header.width,
        "height": header.height,
        "peers": list(decoded.peers),
        "weights": None if decoded.weights is None else [round(weight, 4) for weight in decoded.weights],
        "maps": [label(path) for path in maps],
        "damage": damage,
        "seconds": round(done.seconds, 3),
    }
    helped = f", with {helpers}" if (helpers := _helpers(decoded)) else ", alone"
    if damage:
        report.note(f"{view.name}: {damage}; decoded what is intact")
    report.result(record, f"{view.name} -> {label(path)}: {header.width} x {header.height}{helped}", err=True)


def _helpers(decoded: DecodedView) -> str:
    """The peers or, where they were aligned, those that gave something and what: "C2 (31%), C3 (8%)"."""
    if decoded.weights is None:
        return ", ".join(decoded.peers) if len(decoded.peers) < 4 else f"{len(decoded.peers)} others"
    both = zip(decoded.weights, decoded.peers, strict=True)
    used = sorted((peer for peer in both if peer[0] >= 0.005), key=lambda peer: -peer[0])
    shown = [f"{name or 'one unnamed'} ({weight:.0%})" for weight, name in used[:3]]
    return ", ".join([*shown, *([f"{len(used) - 3} more"] if len(used) > 3 else [])])
