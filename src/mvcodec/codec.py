"""The codec in two functions: what a camera does, and what the sink does with any number of cameras' files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mvcodec.container import Damage, Header, Stream, pack, unpack
from mvcodec.errors import ModelError, MvcodecError, UsageError
from mvcodec.images import Image
from mvcodec.latents import LATENT_STRIDE, decode_intact, encode_latents
from mvcodec.nn.gain import hat_basis
from mvcodec.parahydra import PAD_MULTIPLE
from mvcodec.weights import Model

OnFailure = Callable[[Header, MvcodecError], None]


@dataclass(frozen=True)
class DecodedView:
    """One reconstructed picture and how it came about."""

    header: Header
    image: Image
    peers: tuple[str, ...] = ()  # camera ids that were read as context
    damage: Damage | None = field(default=None)

    @property
    def pixels(self) -> NDArray[np.uint8] | NDArray[np.uint16]:
        return self.image.pixels


@dataclass(frozen=True)
class EncodedView:
    """A .phv file, and what only its encoder knows without decoding it again."""

    data: bytes
    y_hat: Tensor  # [1, M, h, w]
    estimated_bits: float  # nan if not asked for


def encode_image(
    model: Model,
    image: Image,
    quality: float,
    *,
    camera_id: str = "",
    frame: int | None = None,
    timestamp_us: int | None = None,
) -> bytes:
    """One camera's picture -> the bytes of its .phv file. quality 0..100, larger is better."""
    view = encode_view(model, image, quality, camera_id=camera_id, frame=frame, timestamp_us=timestamp_us)
    return view.data


@torch.inference_mode()
def encode_view(
    model: Model,
    image: Image,
    quality: float,
    *,
    camera_id: str = "",
    frame: int | None = None,
    timestamp_us: int | None = None,
    estimate: bool = False,
) -> EncodedView:
    """`encode_image`, with the decoder's latents and, if asked, the estimate of the file's bits. Eq. (1)-(4)."""
    if not 0 <= quality <= 100:
        raise UsageError(f"quality {quality} is not between 0 and 100")
    quality = round(quality * 100) / 100  # as the header stores it
    net = model.net
    basis = hat_basis(torch.tensor([quality / 100], device=model.device), net.config.quality_knots)
    x = _pad(to_tensor(image).to(model.device))  # [1, 3, H, W], multiples of 64
    with _autocast(model):
        y = net.g_a(x, basis)  # [1, M, H/16, W/16]
    y = y.float() * net.gain.gain(basis)
    z = net.h_a(y)  # [1, N, H/64, W/64]
    latents = encode_latents(model, y, z, quality / 100, estimate)
    header = Header(
        model_id=model.id,
        profile=net.config.profile,
        quality=quality,
        width=image.width,
        height=image.height,
        colour=image.colour,
        depth=image.depth,
        camera_id=camera_id,
        frame=frame,
        timestamp_us=timestamp_us,
        icc=image.icc,
        exif=image.exif,
    )
    data = pack(Stream(header, latents.hyper, latents.slices))
    return EncodedView(data, latents.y_hat, latents.estimated_bits)


@torch.inference_mode()
def decode_set(
    model: Model,
    files: Sequence[bytes | Stream],
    *,
    joint: bool = True,
    refine: bool = True,
    partial: bool = False,
    on_failure: OnFailure | None = None,
) -> list[DecodedView]:
    """Files of one instant, any number, any order -> their pictures, sorted by camera id. Eq. (5), (17).

    joint=False decodes each view alone. refine=False leaves out the pixel-aligned third stage.
    partial=True accepts damaged files as far as they are intact. on_failure is told of each view whose integers
    cannot be had, and the others are decoded without it; where it is None the first such view raises.
    """
    streams = [s if isinstance(s, Stream) else unpack(s, partial=partial) for s in files]
    if not streams:
        raise UsageError("no files to decode")
    for stream in streams:
        check_model(model, stream.header)
    # Order decides nothing: not even rounding. Ties of camera id are broken by content.
    streams.sort(
        key=lambda s: (
            s.header.camera_id,
            s.header.frame or 0,
            s.hyper,
            s.slices[0].anchor if s.slices else b"",
        )
    )
    decoded: list[tuple[Tensor, Stream]] = []
    for stream in streams:
        try:
            decoded.append(decode_intact(model, stream))
        except MvcodecError as error:
            if on_failure is None:
                raise
            on_failure(stream.header, error)
    if not decoded:
        return []
    streams = [stream for _, stream in decoded]
    latents = [y_hat for y_hat, _ in decoded]  # each [1, M, h_k, w_k]
    qualities = torch.tensor([s.header.quality / 100 for s in streams], device=model.device)
    pictures = reconstruct(model, latents, qualities, joint, refine)
    ids = [s.header.camera_id for s in streams]
    return [
        DecodedView(
            stream.header,
            to_image(picture, stream.header),
            tuple(ids[:k] + ids[k + 1 :]) if joint else (),
            stream.damage,
        )
        for k, (stream, picture) in enumerate(zip(streams, pictures, strict=True))
    ]


@torch.inference_mode()
def reconstruct(
    model: Model, latents: Sequence[Tensor], qualities: Tensor, joint: bool = True, refine: bool = True
) -> list[Tensor]:
    """y_hat of K views, each [1, M, h_k, w_k] -> pictures [3, 16 h_k, 16 w_k] in [0, 1], by Para-JD."""
    net = model.net
    basis = hat_basis(qualities, net.config.quality_knots)  # [K, knots]
    scaled = [y.float() * net.gain.inverse(b[None]) for y, b in zip(latents, basis, strict=True)]
    sizes = [y.shape[2:] for y in scaled]
    if joint:
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        views = [F.pad(y, (0, width - y.shape[3], 0, height - y.shape[2]), mode="replicate") for y in scaled]
        groups = [(torch.stack(views, dim=1), basis[None], qualities)]  # [1, K, M, h, w]
    else:
        groups = [(y[None], b[None, None], q[None]) for y, b, q in zip(scaled, basis, qualities, strict=True)]
    decoded: list[Tensor] = []
    for y, b, q in groups:
        with _autocast(model):
            pictures = net.para_jd(y, b, joint, model.fuses)[0].float().clamp(0, 1)  # [K, 3, H, W]
            if refine and net.refinement is not None:
                pictures = net.refinement(pictures, q, peers=joint).pictures
        decoded.extend(pictures)
    return [
        picture[:, : LATENT_STRIDE * height, : LATENT_STRIDE * width]
        for picture, (height, width) in zip(decoded, sizes, strict=True)
    ]


def check_model(model: Model, header: Header) -> None:
    """Refuse a file that other weights have written: its integers could not be decoded."""
    if header.model_id != model.id:
        raise ModelError(
            f"file was written with {header.profile} model {header.model_id.hex()}, "
            f"but {model.name} is {model.id.hex()}; pass the model it was written with"
        )


def to_tensor(image: Image) -> Tensor:
    """[H, W, 3] or [H, W] uint8 / uint16 -> [1, 3, H, W] float32 in [0, 1]; grey is repeated."""
    peak = 255.0 if image.depth == 8 else 65535.0
    pixels = torch.from_numpy(image.pixels.astype(np.float32)) / peak
    if pixels.ndim == 2:
        pixels = pixels[..., None].expand(-1, -1, 3)
    return pixels.permute(2, 0, 1)[None].contiguous()


def to_image(picture: Tensor, header: Header) -> Image:
    """[3, H, W] in [0, 1] -> the kind of picture that was encoded, cropped to its size."""
    pixels = picture[:, : header.height, : header.width]
    if header.colour == "grey":
        pixels = pixels.mean(dim=0, keepdim=True)
    peak, dtype = (255, np.uint8) if header.depth == 8 else (65535, np.uint16)
    array = (pixels * peak).round().to(torch.int32).cpu().numpy().astype(dtype)
    array = array[0] if header.colour == "grey" else array.transpose(1, 2, 0)
    return Image(np.ascontiguousarray(array), header.icc, header.exif)


def _pad(x: Tensor) -> Tensor:
    """Replicate right and bottom to multiples of 64."""
    height, width = x.shape[2:]
    return F.pad(x, (0, -width % PAD_MULTIPLE, 0, -height % PAD_MULTIPLE), mode="replicate")


def _autocast(model: Model) -> torch.autocast:
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.bfloat16)
