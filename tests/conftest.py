"""Fixtures every test may use: the untrained tiny codec, small real-looking pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from numpy.typing import NDArray

settings.register_profile("mvcodec", deadline=None)  # a busy machine is no defect of ours
settings.load_profile("mvcodec")


@pytest.fixture(autouse=True, scope="session")
def _caches_of_the_tests_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def smooth_picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """[H, W, 3] uint8 with gradients, waves and an edge: enough structure for every channel of a codec."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width]
    phase, tilt = rng.uniform(0, 6, 3), rng.uniform(0.02, 0.2, (3, 2))
    waves = np.sin(row[..., None] * tilt[:, 0] + column[..., None] * tilt[:, 1] + phase)
    edge = (column > width * rng.uniform(0.3, 0.7))[..., None] * rng.uniform(-60, 60, 3)
    return (128 + 50 * waves + edge).clip(0, 255).astype(np.uint8)


def write_tiny_model(path: Path, **changes: Any) -> Path:
    """The tiny profile as an exported file: untrained, started as the KLT of smooth pictures."""
    import torch

    from mvcodec.parahydra import ParaHydra, config_for
    from mvcodec.training.data import Scene
    from mvcodec.training.klt import block_covariance
    from mvcodec.weights import export_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ParaHydra(config_for("tiny", **changes))
    views = tuple(smooth_picture(64, 96, seed) for seed in range(8))
    net.start_as_klt(block_covariance([Scene("smooth", views, ((0, 0),) * 8)], blocks_per_view=200))
    export_model(net, path)
    return path


@pytest.fixture(scope="session")
def tiny_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def tiny_model(tiny_model_file: Path):
    from mvcodec.weights import load_model

    return load_model(tiny_model_file)


@pytest.fixture(scope="session")
def lattice_model(tmp_path_factory: pytest.TempPathFactory):
    """The same with anchors of slice 0 on a lattice: it writes version 3 of the format."""
    from mvcodec.weights import load_model

    return load_model(write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors", anchor_lattice=True))
