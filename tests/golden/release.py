"""The golden file of a shipped model: `python -m tests.golden.release fast --write`, once, when weights are released.

A corner of the example scene, coded with those weights: models/NAME.phv, and models/NAME.json with the hash of its
integers. `mvcodec selftest` decodes it on the user's machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from mvcodec.codec import encode_image
from mvcodec.container import unpack
from mvcodec.files import shipped
from mvcodec.images import Image, read
from mvcodec.latents import decode_latents
from mvcodec.selftest import integers_sha256
from mvcodec.weights import Model, load_model

HEIGHT, WIDTH, QUALITY = 300, 400, 40.0


def released(model: Model) -> tuple[bytes, dict[str, str]]:
    """The golden file of `model`, and what is known of it."""
    picture = read(sorted(shipped("examples/nineveh").glob("*.webp"))[0])
    data = encode_image(model, Image(picture.pixels[:HEIGHT, :WIDTH].copy()), QUALITY, camera_id="golden")
    with torch.inference_mode():
        integers = integers_sha256(decode_latents(model, unpack(data)).y_hat)
    return data, {"model_id": model.id.hex(), "integers_sha256": integers}


if __name__ == "__main__":
    model = load_model(sys.argv[1])
    data, facts = released(model)
    if "--write" in sys.argv:
        target = Path(shipped("models")) / f"{model.name}.phv"
        target.write_bytes(data)
        target.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(len(data), json.dumps(facts))  # noqa: T201
