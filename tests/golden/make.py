"""What tests/golden holds, made from numbers alone: `python -m tests.golden.make` prints it, `--write NAME` writes it.

The models are the tiny profile, and the same with anchors on a lattice, which writes version 3 of the format; its file
of version 2, lattice_v2.phv, is read for ever, and nothing makes it any more. Every weight is drawn by PCG64 as an
integer and scaled, so no file of weights is needed and no generator of torch is trusted. y and z are drawn the same
way, far from any rounding tie.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from mvcodec.codec import encode_image, samples, to_unit
from mvcodec.container import Header, Stream, pack
from mvcodec.images import Image
from mvcodec.latents import HYPER_STRIDE, LATENT_STRIDE, MU_GRID, EncodedLatents, encode_latents
from mvcodec.nn.gain import hat_basis
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.selftest import integers_sha256
from mvcodec.weights import Model, export_model, load_model

GOLDEN = Path(__file__).parent / "tiny.phv"
PICTURE = GOLDEN.with_name("picture.phv")
MODELS: dict[str, dict[str, bool]] = {"tiny": {}, "lattice": {"anchor_lattice": True}}  # by name of their golden file
WIDTH, HEIGHT, QUALITY = 100, 50, 42.0
# Parts that the networks have lost since the golden file was made. They are drawn all the same, for what follows them.
RETIRED = {
    f"refinement.polish.{layer}.{part}": torch.empty(shape)
    for layer, width, channels in [("first", 32, 11), *((f"body.{n}", 32, 32) for n in range(5)), ("last", 2, 32)]
    for part, shape in (("bias", (width,)), ("weight", (width, channels, 3, 3)))
}
YOUNGER = "cells."  # than the golden file; they stay as they begin, and nothing is drawn for them


def drawn_model(name: str = "tiny") -> Model:
    """One of MODELS: weights are integers in +-1000, over 1000 sqrt(fan-in); units are powers of two."""
    net = ParaHydra(config_for("tiny", **MODELS[name]))
    rng = np.random.Generator(np.random.PCG64(2026))
    state = {name: value for name, value in net.state_dict().items() if name.startswith(YOUNGER)}
    for name, value in sorted({**net.state_dict(), **RETIRED}.items()):
        if name in state:
            continue
        fan_in = value[0].numel() if value.ndim > 1 else 1
        drawn = rng.integers(-1000, 1001, tuple(value.shape)) / (1000 * np.sqrt(fan_in))
        if name.endswith((".unit", ".scale")):
            drawn = 2.0 ** np.rint(2 + 2 * drawn)
        state[name] = torch.from_numpy(drawn).float()
    net.load_state_dict({name: value for name, value in state.items() if name not in RETIRED})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tiny.safetensors")
        export_model(net, path)
        return load_model(path)


def drawn_latents(model: Model) -> EncodedLatents:
    """y: odd multiples of 1/128, while mu lies on multiples of 1/64, so y - mu is never a tie; one in 40 is large
    enough to be an escape. z: integers, and 0.3 more. All plainly rounded: the files are older than dead zones."""
    config = model.net.config
    rng = np.random.Generator(np.random.PCG64(7))
    h, w = -(-HEIGHT // HYPER_STRIDE), -(-WIDTH // HYPER_STRIDE)
    scale = HYPER_STRIDE // LATENT_STRIDE
    z = rng.integers(-2, 3, (1, config.hyper_channels, h, w)) + 0.3
    shape = (1, config.latent_channels, scale * h, scale * w)
    steps = rng.integers(-MU_GRID, MU_GRID, shape) * np.where(rng.integers(0, 40, shape) == 0, 300, 1)
    y = (steps + 0.5) / MU_GRID
    plain = torch.full((len(model.gaussian),), 0.5, dtype=torch.float64)
    with torch.inference_mode(), patch("mvcodec.latents.dead_zones", return_value=plain):
        return encode_latents(model, torch.from_numpy(y), torch.from_numpy(z), QUALITY / 100)


def golden_file(model: Model) -> bytes:
    latents = drawn_latents(model)
    header = Header(
        model.id, "tiny", QUALITY, WIDTH, HEIGHT, camera_id="golden", frame=3, timestamp_us=1_700_000_000_000_000
    )
    return pack(Stream(header, latents.hyper, latents.slices))


def drawn_picture() -> Image:
    """64 x 64 RGB: cells of 8 x 8 of one colour each."""
    cells = np.random.Generator(np.random.PCG64(11)).integers(0, 256, (8, 8, 3))
    return Image(cells.repeat(8, axis=0).repeat(8, axis=1).astype(np.uint8))


def golden_picture_file(model: Model) -> bytes:
    """The whole encoder, transforms in float32. They are not exact, but y and z may move by 1e-4, a hundred times what
    the order of a sum can change, and give the same file (`picture_is_stable`)."""
    model.__dict__["bfloat16"] = False  # whatever this processor offers
    return encode_image(model, drawn_picture(), QUALITY, camera_id="golden")


def picture_is_stable(model: Model) -> bool:
    """Whether the picture's latents, all a little more or all a little less, are rounded to the same integers."""
    with torch.inference_mode():
        basis = hat_basis(torch.tensor([QUALITY / 100]), model.net.config.quality_knots)
        y = model.net.g_a(to_unit(samples(drawn_picture())), basis) * model.net.gain.gain(basis)
        z = model.net.h_a(y)
        below, above = (encode_latents(model, y + d, z + d, QUALITY / 100).y_hat for d in (-1e-4, 1e-4))
    return torch.equal(below, above)


def facts_of(model: Model) -> dict[str, int | str]:
    data = golden_file(model)
    return {
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "model_id": model.id.hex(),
        "integers_sha256": integers_sha256(drawn_latents(model).y_hat),
    }


if __name__ == "__main__":
    models = {name: drawn_model(name) for name in MODELS}
    facts = {name: facts_of(model) for name, model in models.items()}
    for name in sys.argv[2:] if "--write" in sys.argv else []:
        GOLDEN.with_name(f"{name}.phv").write_bytes(golden_file(models[name]))
        GOLDEN.with_name(f"{name}.json").write_text(json.dumps(facts[name], indent=1) + "\n")
        if name == "tiny":
            PICTURE.write_bytes(golden_picture_file(models[name]))
    print(json.dumps(facts))  # noqa: T201
