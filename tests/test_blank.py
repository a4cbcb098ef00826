"""Loading weights initialises nothing, and inference imports nothing that only training or comparisons need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from mvcodec.blank import Uninitialised
from mvcodec.parahydra import ParaHydra, config_for


def test_a_network_made_for_loading_takes_no_random_numbers() -> None:
    before = torch.get_rng_state()
    with Uninitialised(10**9):
        blank = ParaHydra(config_for("tiny"))
    assert torch.equal(torch.get_rng_state(), before)
    made = ParaHydra(config_for("tiny"))
    assert {n: v.shape for n, v in blank.state_dict().items()} == {n: v.shape for n, v in made.state_dict().items()}


def test_encoding_and_decoding_import_no_more_than_they_need(tiny_model_file: Path) -> None:
    program = (
        "import sys, numpy as np, mvcodec;"
        "files = [mvcodec.encode(np.full((64, 64, 3), k, np.uint8), model=sys.argv[1]) for k in (9, 90)];"
        "mvcodec.decode_set(files, model=sys.argv[1]);"
        "print({'compressai', 'matplotlib', 'torch._dynamo', 'torch._inductor'} & sys.modules.keys() or '')"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model_file)], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == ""
