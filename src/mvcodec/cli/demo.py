"""`mvcodec demo`: a real scene from pictures to pictures, one camera at a time in, all together out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvcodec.cli.report import Report, reporting, running
from mvcodec.cli.targets import sources
from mvcodec.files import shipped
from mvcodec.frames import PICTURE_SUFFIXES, STREAM_SUFFIX, name_of

if TYPE_CHECKING:
    from mvcodec.images import Image

COLUMNS = f"{'camera':<26}{'bytes':>9}{'bpp':>8}{'PSNR':>17}{'MS-SSIM':>19}{'seconds':>16}"
UNITS = f"{'':<26}{'':>9}{'':>8}{'alone  joint':>17}{'alone   joint':>19}{'encode  decode':>16}"


@click.command(short_help="Encode and decode a real scene of three cameras.")
@click.argument("scene", required=False, metavar="[DIR]", type=click.Path(exists=True, file_okay=False))
@click.option("-o", "--output", default="demo", show_default=True, metavar="DIR", help="Everything lands here.")
@click.option("-q", "--quality", type=click.FloatRange(0, 100), default=50.0, show_default=True)
@running
@reporting
def demo(report: Report, scene: str | None, output: str, quality: float, model: str | None, device: str) -> None:
    """Encode the example scene (or DIR) one camera at a time, decode all views together, and compare.

    Writes the .phv files, the decoded pictures and comparison.png: per view the original, JPEG of as many
    bytes, the picture decoded alone, and decoded jointly.
    """
    from mvcodec import api, images
    from mvcodec.cli.comparison import compare
    from mvcodec.evaluation.metrics import ms_ssim, psnr

    pictures = [source.path for source in sources([scene or str(shipped("examples/nineveh"))], PICTURE_SUFFIXES)]
    folder = Path(output)
    weights = api.load_model(model, device)
    report.note(f"model {weights.name} {weights.id.hex()} on {weights.device}, quality {quality:g}")

    originals: dict[str, Image] = {}
    files: dict[str, bytes] = {}
    encode_seconds: dict[str, float] = {}
    for path in pictures:  # each camera alone: no other view is opened
        camera = name_of(path).camera_id
        originals[camera] = images.read(path)
        started = time.perf_counter()
        files[camera] = api.encode(originals[camera], quality=quality, camera_id=camera, model=weights)
        encode_seconds[camera] = time.perf_counter() - started
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{camera}{STREAM_SUFFIX}").write_bytes(files[camera])

    started = time.perf_counter()
    joint = {v.header.camera_id: v.image for v in api.decode_set(list(files.values()), model=weights)}
    decode_seconds = (time.perf_counter() - started) / len(files)
    alone = {c: api.decode(data, model=weights).image for c, data in files.items()}

    report.show(f"{COLUMNS}\n{UNITS}")
    records: list[dict[str, Any]] = []
    for camera, original in originals.items():
        images.write(folder / f"{camera}.png", joint[camera])
        record = {
            "camera_id": camera,
            "bytes": len(files[camera]),
            "bpp": 8 * len(files[camera]) / (original.width * original.height),
            "psnr_alone_db": psnr(original.pixels, alone[camera].pixels),
            "psnr_joint_db": psnr(original.pixels, joint[camera].pixels),
            "ms_ssim_alone": ms_ssim(original.pixels, alone[camera].pixels),
            "ms_ssim_joint": ms_ssim(original.pixels, joint[camera].pixels),
            "encode_seconds": encode_seconds[camera],
            "decode_seconds": decode_seconds,
        }
        records.append(record)
        report.result(record, _row(record))
    mean = {key: sum(r[key] for r in records) / len(records) for key in records[0] if key != "camera_id"}
    report.show(_row({"camera_id": "mean", **mean}))
    comparison = folder / "comparison.png"
    images.write(comparison, compare(originals, files, alone, joint))
    report.note(f"pictures, .phv files and {comparison.name} are in {folder}")


def _row(record: dict[str, Any]) -> str:
    return (
        f"{record['camera_id']:<26}{record['bytes']:>9.0f}{record['bpp']:>8.3f}"
        f"{record['psnr_alone_db']:>10.2f}{record['psnr_joint_db']:>7.2f}"
        f"{record['ms_ssim_alone']:>11.4f}{record['ms_ssim_joint']:>8.4f}"
        f"{record['encode_seconds']:>8.2f}{record['decode_seconds']:>8.2f}"
    )
