"""Every kind of picture is right or refused with a sentence; output appears whole or not at all."""

from __future__ import annotations

import io
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pil
from PIL import ImageCms, ImageOps, features

from mvcodec import images
from mvcodec.errors import PictureError
from mvcodec.images import Image
from mvcodec.png16 import encode_png16

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)
GREY = RGB[..., 0]
RGB16 = RNG.integers(0, 2**16, (5, 7, 3), np.uint16)
GREY16 = RGB16[..., 0]
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(picture: pil.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def deep_jpeg_2000() -> bytes:
    """Colour whose header says that it is of 16 bits a sample."""
    data = bytearray(saved(pil.fromarray(RGB), "JPEG2000"))
    data[data.index(b"\xff\x4f\xff\x51") + 42] = 15
    return bytes(data)


@pytest.mark.parametrize("pixels", [RGB, GREY, RGB16, GREY16], ids=["rgb", "grey", "rgb16", "grey16"])
def test_what_is_written_is_read_back_exactly(tmp_path: Path, pixels: np.ndarray) -> None:
    exif = pil.Exif()
    exif[271] = "a camera maker"
    image = Image(pixels, icc=SRGB, exif=exif.tobytes()[6:])
    images.write(tmp_path / "new" / "a.png", image)
    again = images.read(tmp_path / "new" / "a.png")
    assert again.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(again.pixels, pixels)
    assert (again.icc, again.colour, again.depth) == (image.icc, image.colour, image.depth)
    with pil.open(tmp_path / "new" / "a.png") as file:
        assert file.getexif()[271] == "a camera maker"
    assert again.exif == image.exif


def test_a_damaged_png_is_no_picture() -> None:
    """Of one bit that is wrong among its pixels Pillow would otherwise make a picture of rubbish."""
    data = saved(pil.fromarray(RNG.integers(0, 256, (40, 50, 3), np.uint8)))
    pixels = data.index(b"IDAT") + 8
    for at in range(pixels, data.index(b"IEND") - 8, 97):
        with pytest.raises(PictureError, match="cannot be read as a picture"):
            images.read(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm", ".bmp", ".webp", ".jpg"])
def test_what_is_written_for_others_keeps_the_picture(suffix: str) -> None:
    """JPEG cannot, but comes near: colours are not halved."""
    smooth = np.stack(np.broadcast_arrays(np.arange(64)[:, None] * 3, np.arange(48) * 5, 128), -1).astype(np.uint8)
    smooth[:, ::2, 0] = 255
    again = images.read(images.to_bytes(Image(smooth), suffix)).pixels.astype(int)
    assert abs(again - smooth).max() <= (12 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("suffix", [".gif", ".pdf", ".avif", ".jpx"])
def test_kinds_that_would_lose_the_picture_are_not_written(suffix: str) -> None:
    with pytest.raises(PictureError, match="no picture is written with the ending"):
        images.to_bytes(Image(RGB), suffix)


def test_grey_kinds_stay_grey() -> None:
    one_bit = pil.fromarray(GREY).convert("1")
    for data, expected in [
        (saved(pil.fromarray(GREY)), GREY),
        (saved(one_bit), np.asarray(one_bit.convert("L"))),
        (saved(pil.fromarray(GREY16)), GREY16),
        (saved(pil.fromarray(GREY16), "TIFF"), GREY16),
        (b"P5 7 5 65535\n" + GREY16.astype(">u2").tobytes(), GREY16),
    ]:
        image = images.read(data)
        assert image.colour == "grey"
        np.testing.assert_array_equal(image.pixels, expected)


def test_palette_becomes_rgb() -> None:
    palette = pil.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(images.read(saved(palette)).pixels, np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(images.read(saved(palette, "GIF")).pixels, np.asarray(palette.convert("RGB")))


def tiff(pixels: np.ndarray, byte_order: str = "<", **tags: int) -> bytes:
    """One uncompressed strip of 16-bit samples, which Pillow cannot write in colour; further tags by name."""
    height, width = pixels.shape[:2]
    samples = pixels.astype(np.dtype(np.uint16).newbyteorder(byte_order)).tobytes()
    named = {"bits": 258, "photometric": 262, "orientation": 274, "planar": 284}
    values = {
        256: width,
        257: height,
        258: 16,
        259: 1,
        262: 1 + pixels.ndim // 3,
        273: 8,
        277: pixels.ndim // 3 * 2 + 1,
    }
    values |= {278: height, 279: len(samples)} | {named[name]: value for name, value in tags.items()}
    entries = b"".join(struct.pack(f"{byte_order}HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    directory = struct.pack(f"{byte_order}H", len(values)) + entries + bytes(4)
    mark = b"II" if byte_order == "<" else b"MM"
    return mark + struct.pack(f"{byte_order}HI", 42, 8 + len(samples)) + samples + directory


def test_all_sixteen_bits_of_colour_are_read(tmp_path: Path) -> None:
    np.testing.assert_array_equal(images.read(encode_png16(RGB16)).pixels, RGB16)
    for byte_order in "<>":
        np.testing.assert_array_equal(images.read(tiff(RGB16, byte_order)).pixels, RGB16)


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("pixels", [RGB16, GREY16], ids=["rgb16", "grey16"])
def test_deep_tiffs_are_turned_once_all_bits_of_them(pixels: np.ndarray, byte_order: str) -> None:
    turned = [pixels, pixels[:, ::-1], pixels[::-1, ::-1], pixels[::-1]]
    turned += [view.swapaxes(0, 1) for view in (pixels, pixels[::-1], pixels[::-1, ::-1], pixels[:, ::-1])]
    for orientation, expected in enumerate(turned, 1):
        image = images.read(tiff(pixels, byte_order, orientation=orientation))
        np.testing.assert_array_equal(image.pixels, expected)


def test_grey_kinds_of_tiff_mean_what_they_say() -> None:
    np.testing.assert_array_equal(images.read(tiff(GREY16, photometric=0)).pixels, 65535 - GREY16)  # white is zero
    twelve = np.array([[0x000, 0xFFF, 0x800, 0x123]])
    packed = np.array([[0x00, 0x0F, 0xFF, 0x80, 0x01, 0x23]], np.uint8)
    data = bytearray(tiff(np.zeros(twelve.shape, np.uint16), bits=12))
    data[8 : 8 + packed.size] = packed.tobytes()
    assert images.read(bytes(data)).pixels.tolist() == [[0, 65535, 0x8008, 0x1231]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_refused_unless_the_caller_says_how(mode: str) -> None:
    alpha = RNG.integers(0, 256, (5, 7), np.uint8)
    picture = pil.fromarray(GREY).convert({"RGBA": "RGB", "LA": "L", "PA": "P"}[mode])
    picture.putalpha(pil.fromarray(alpha))
    assert picture.mode == mode
    data = saved(picture, "TIFF" if mode == "PA" else "PNG")
    with pytest.raises(PictureError, match="--alpha drop, white or black"):
        images.read(data)
    dropped, white, black = (images.read(data, alpha=how) for how in ("drop", "white", "black"))
    grey = dropped.pixels if mode == "LA" else dropped.pixels[..., 1]
    np.testing.assert_array_equal(grey, GREY)
    assert dropped.colour == ("grey" if mode == "LA" else "rgb")
    on_white = white.pixels.reshape(5, 7, -1)[..., 0]
    on_black = black.pixels.reshape(5, 7, -1)[..., 0]
    share = alpha / 255
    np.testing.assert_allclose(on_black, GREY * share, atol=1)
    np.testing.assert_allclose(on_white, GREY * share + 255 * (1 - share), atol=1)


def test_a_transparent_colour_counts_as_alpha() -> None:
    data = saved(pil.fromarray(RGB), transparency=(1, 2, 3))
    with pytest.raises(PictureError, match="alpha"):
        images.read(data)
    np.testing.assert_array_equal(images.read(data, alpha="drop").pixels, RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("colour", [RGB, GREY, RGB16], ids=["rgb", "grey", "rgb16"])
def test_orientation_is_baked_in_and_reset(orientation: int, colour: np.ndarray) -> None:
    exif = pil.Exif()
    exif[0x0112] = orientation
    exif[272] = "model"
    data = images.to_bytes(Image(colour, exif=exif.tobytes()[6:]))
    image = images.read(data)
    turned = ImageOps.exif_transpose(pil.open(io.BytesIO(data)))
    eight_bits = (image.pixels >> 8).astype(np.uint8) if image.depth == 16 else image.pixels
    np.testing.assert_array_equal(eight_bits, np.asarray(turned))
    kept = pil.Exif()
    kept.load(image.exif)
    assert 0x0112 not in kept
    assert kept[272] == "model"


def test_exif_that_is_none_does_not_keep_a_picture_from_being_read() -> None:
    again = images.read(images.to_bytes(Image(RGB, exif=b"a camera's own idea")))
    assert np.array_equal(again.pixels, RGB)
    assert again.exif == b""


@pytest.mark.parametrize(("exif", "suffix"), [(bytes(70000), ".jpg"), (b"nonsense", ".tif")])
def test_metadata_that_a_format_cannot_hold_is_refused(exif: bytes, suffix: str) -> None:
    with pytest.raises(PictureError, match=f"cannot be written as {suffix}"):
        images.to_bytes(Image(RGB, exif=exif), suffix)


def test_a_tag_that_cannot_be_written_again_leaves_the_picture_upright() -> None:
    def entry(tag: int, kind: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, kind, 1, value)

    broken = b"II*\0\x08\0\0\0\x02\0" + entry(0x0112, 3, 6) + entry(296, 4, 70000) + bytes(4)
    data = saved(pil.fromarray(RGB), "JPEG", exif=b"Exif\0\0" + broken)
    image = images.read(data)
    assert (image.height, image.width, image.exif) == (RGB.shape[1], RGB.shape[0], b"")


def test_metadata_that_says_nothing_costs_nothing() -> None:
    exif = pil.Exif()
    exif[0x0112] = 6
    assert images.read(saved(pil.fromarray(RGB), "JPEG", exif=exif)).exif == b""
    bare = Image(RGB, icc=b"x", exif=b"y").without_metadata()
    assert (bare.pixels is RGB, bare.icc, bare.exif) == (True, b"", b"")
    assert bare != Image(RGB)  # by identity, as views and models
    assert len({bare, Image(RGB)}) == 2


def test_tiff_structure_is_not_taken_for_metadata() -> None:
    exif = pil.Exif()
    exif[271] = "a camera maker"
    image = images.read(saved(pil.fromarray(RGB), "TIFF", exif=exif))
    kept = pil.Exif()
    kept.load(image.exif)
    assert dict(kept) == {271: "a camera maker"}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (saved(pil.fromarray(RGB).convert("CMYK"), "JPEG"), "CMYK"),
        (saved(pil.fromarray(RGB[..., 0].astype(np.float32)), "TIFF"), "samples of kind 'F'"),
        (saved(pil.fromarray(RGB[..., 0].astype(np.int32)), "TIFF"), "samples of kind 'I'"),
        (tiff(RGB16, planar=2), "more than 8 bits a sample, in a form that would lose some"),
        (deep_jpeg_2000(), "more than 8 bits a sample, in a form that would lose some"),
        (b"P6 7 5 65535\n" + RGB16.astype(">u2").tobytes(), "lose its low bits"),
        (saved(pil.fromarray(RGB), "GIF", save_all=True, append_images=[pil.fromarray(RGB // 2)]), "holds 2"),
        (saved(pil.fromarray(RGB))[:-30], "cannot be read"),
        (b"", "not a picture"),
        (b"hello", "not a picture"),
    ],
    ids=["cmyk", "float", "int32", "planes", "jp2", "ppm16", "animation", "truncated", "empty", "text"],
)
def test_refused_with_a_sentence(data: bytes, sentence: str) -> None:
    with pytest.raises(PictureError, match=sentence):
        images.read(data)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_deep_avif_is_refused() -> None:
    """16 x 16 black pixels of ten bits, by ffmpeg's libaom."""
    with pytest.raises(PictureError, match="more than 8 bits a sample"):
        images.read(Path(__file__).parent / "ten_bits.avif")


def test_size_cap_is_checked_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="7 x 5 pixels, over the cap of 34"):
        images.read(saved(pil.fromarray(RGB)), max_pixels=34)


def test_what_the_cap_allows_is_read_whatever_pillow_thinks_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 8)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(images.read(saved(pil.fromarray(RGB), kind)).pixels, RGB)
        with pytest.raises(PictureError, match="has more pixels than the cap of 16"):
            images.read(saved(pil.fromarray(RGB), kind), max_pixels=16)
    assert pil.MAX_IMAGE_PIXELS == 8


def test_pixels_of_sixteen_bits_have_samples_of_fewer() -> None:
    pixels = struct.pack("<2H", 0xF800, 0x07E0)
    header = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    header += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    start = 14 + len(header)
    data = b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels
    assert images.read(data).pixels.tolist() == [[[255, 0, 0], [0, 255, 0]]]


def test_smallest_picture() -> None:
    assert images.read(saved(pil.new("L", (1, 1), 9))).pixels.tolist() == [[9]]
    assert images.read(encode_png16(np.full((1, 1, 3), 777, np.uint16))).pixels.tolist() == [[[777] * 3]]


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 2), np.uint8), np.zeros(3, np.uint8)],
)
def test_arrays_that_are_no_picture_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(PictureError, match="give"):
        Image(pixels)


@pytest.mark.parametrize(("name", "pixels"), [("a.jpg", GREY16), ("a.tif", RGB16), ("a.nothing", RGB), ("a", RGB)])
def test_formats_that_cannot_hold_it_are_refused_and_leave_no_file(
    tmp_path: Path, name: str, pixels: np.ndarray
) -> None:
    with pytest.raises(PictureError, match=r"use \.png"):
        images.write(tmp_path / name, Image(pixels))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        images.write(target, Image(RGB))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.png", b"old")]


@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"P6 ", b"II*\0", b"GIF89a"]),
)
def test_no_bytes_crash_the_reader(data: bytes, start: bytes) -> None:
    with suppress(PictureError):
        assert images.read(start + data, max_pixels=10_000).pixels.size > 0


@given(at=st.integers(0, 300), value=st.integers(0, 255))
def test_damaged_pictures_are_refused_or_read(at: int, value: int) -> None:
    data = bytearray(saved(pil.fromarray(RGB)))
    data[at % len(data)] = value
    with suppress(PictureError):
        images.read(bytes(data), max_pixels=10_000)
