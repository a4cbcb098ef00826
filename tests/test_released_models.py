"""What was written with the released weights is read for ever, and every shipped model proves itself."""

import json
from pathlib import Path

import pytest
import torch

from mvcodec import selftest
from mvcodec.container import unpack
from mvcodec.latents import decode_latents
from mvcodec.weights import load_model

MODELS = sorted(Path(__file__).parents[1].glob("models/*.safetensors"))


@pytest.fixture(scope="module", params=MODELS, ids=lambda path: path.stem)
def model(request: pytest.FixtureRequest):
    return load_model(request.param)


@torch.inference_mode()
def test_the_golden_file_gives_the_integers_of_its_release(model):
    facts = json.loads(model.path.with_suffix(".json").read_text())
    assert facts["model_id"] == model.id.hex()
    stream = unpack(model.path.with_suffix(".phv").read_bytes())
    assert selftest.integers_sha256(decode_latents(model, stream).y_hat) == facts["integers_sha256"]


@torch.inference_mode()
@pytest.mark.parametrize("check", [selftest.proofs, selftest.extreme_inputs, selftest.coder], ids=lambda c: c.__name__)
def test_every_layer_is_proved(model, check):
    assert check(model)


@pytest.mark.slow
def test_selftest_in_full(model):
    assert len(list(selftest.run(model))) == len(selftest.CHECKS)
