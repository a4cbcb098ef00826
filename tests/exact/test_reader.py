"""A stranger's decoder, `tests/exact_reader.py`, gets from the document alone what the codec computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvcodec.container import Header, Stream, pack
from mvcodec.entropy.tables import sigma_thresholds
from mvcodec.latents import MU_GRID, encode_latents, snap, walk
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.weights import Model, export_model, load_model
from tests.exact_reader import ExactReader, Map, read_model
from tests.golden.make import GOLDEN, drawn_model
from tests.golden.make import MODELS as DRAWN
from tests.spec_reader import Table, crc16, decode_section, read_file

MODELS = sorted(Path(__file__).parents[2].glob("models/*.safetensors"))


@pytest.fixture(scope="module")
def golden_model() -> Model:
    return drawn_model()


@pytest.fixture(scope="module")
def golden_model_file(golden_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "golden.safetensors"
    export_model(golden_model.net, path)
    return path


def drawn_symbols(step: int, index: Map) -> Map:
    """Of the size that the index lets one expect, with a few large ones."""
    rng = np.random.Generator(np.random.PCG64(step))
    sigma = 0.11 * (256 / 0.11) ** (index / 63)
    large = rng.integers(0, 50, index.shape) == 0
    return np.rint(rng.normal(size=index.shape) * np.where(large, 20 * sigma, sigma)).astype(np.int64)


@torch.inference_mode()
def walked(model: Model, z_hat: Map, quality: int) -> tuple[list[tuple[Map, Map]], Map]:
    """What the codec itself makes of z_hat and drawn symbols: mu64 and index of each step, 64 y_hat."""
    steps = []

    def code(step: int, mu: torch.Tensor, ln_sigma: torch.Tensor) -> torch.Tensor:
        mu, index = snap(mu, ln_sigma, model.sigma_thresholds)
        steps.append(((mu[0] * MU_GRID).long().numpy(), index[0].numpy()))
        symbols = torch.from_numpy(drawn_symbols(step, index[0].numpy()))[None]
        return torch.where(index == 0, 0, symbols) + mu

    y_hat = walk(model, torch.from_numpy(z_hat)[None], quality / 10000, code)
    return steps, (y_hat[0] * MU_GRID).long().numpy()


def drawn_z(channels: int, shape: tuple[int, int]) -> Map:
    return np.random.Generator(np.random.PCG64(5)).integers(-3, 4, (channels, *shape))


def compare(path: Path, shape: tuple[int, int], quality: int) -> Map:
    """All mu64 of the reader, step after step."""
    model, reader = load_model(path), ExactReader(*read_model(path))
    z_hat = drawn_z(model.net.config.hyper_channels, shape)
    wanted, wanted_y = walked(model, z_hat, quality)
    steps, y64 = reader.read(z_hat, quality, drawn_symbols)
    assert len(steps) == len(wanted) == sum(map(model.net.config.passes_of, range(model.net.config.slices)))
    for number, (found, (mu64, index)) in enumerate(zip(steps, wanted, strict=True)):
        assert (found.mu64 == mu64).all(), f"mu64 of step {number}"
        assert (found.index == index).all(), f"index of step {number}"
    assert (y64 == wanted_y).all()
    return np.concatenate([step.mu64.ravel() for step in steps])


# Latents are four times as wide as z: five cross an attention tile of 16.
@pytest.mark.parametrize(("shape", "quality"), [((1, 1), 0), ((5, 5), 10000)], ids=str)
def test_tiny(golden_model_file, shape, quality):
    compare(golden_model_file, shape, quality)


@pytest.mark.parametrize(("shape", "quality"), [((1, 1), 0), ((2, 5), 6789)], ids=str)
def test_anchors_on_a_lattice(tmp_path, shape, quality):
    torch.manual_seed(0)
    net = ParaHydra(config_for("tiny", anchor_lattice=True))
    for value in [*net.h_s.parameters(), *net.para_em.parameters()]:
        torch.nn.init.normal_(value, std=1.4 / value[0].numel() ** 0.5)
    export_model(net, tmp_path / "lattice.safetensors")
    mu64 = compare(tmp_path / "lattice.safetensors", shape, quality)
    assert len(set(mu64.tolist())) > 100


def test_narrow_parameter_networks_and_numbers_that_saturate(tmp_path):
    net = ParaHydra(config_for("tiny", raw_slices=False))
    rng = np.random.Generator(np.random.PCG64(9))
    for value in [*net.h_s.parameters(), *net.para_em.parameters()]:
        size = 6 / np.sqrt(value[0].numel())
        value.data = torch.from_numpy(rng.uniform(-size, size, tuple(value.shape))).float()
    net.para_em.unit.fill_(32)
    export_model(net, tmp_path / "wild.safetensors")
    mu64 = compare(tmp_path / "wild.safetensors", (2, 1), 5000)
    assert mu64.max() == -mu64.min() == 64 * 16383.5


def test_a_scale_on_a_threshold_takes_the_lower_table(tmp_path):
    net = ParaHydra(config_for("tiny"))  # its parameter networks still say zero: ln sigma is ln_spread + G
    quality, ln_gain = 4321, 62842  # floor(62842.8733)
    thresholds = sigma_thresholds()
    k, above = 20 + np.arange(32), np.arange(32) % 3 - 1
    net.para_em.ln_spread[:, 0, 0] = torch.from_numpy((thresholds[k] + above - ln_gain) / 65536)
    export_model(net, tmp_path / "model.safetensors")
    compare(tmp_path / "model.safetensors", (1, 1), quality)
    z_hat = drawn_z(16, (1, 1))
    steps, _ = ExactReader(*read_model(tmp_path / "model.safetensors")).read(z_hat, quality, drawn_symbols)
    index = np.concatenate([step.index for step in steps[::2]])[:, 0, 0]
    assert (index == k + (above > 0)).all()


@pytest.mark.parametrize(
    ("shape", "quality"),
    [
        ((1, 5), 3333),
        pytest.param((5, 1), 0, marks=pytest.mark.slow),
        pytest.param((6, 5), 9999, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_shipped(path, shape, quality):
    compare(path, shape, quality)


def decoded(data: bytes, tensors: Mapping[str, Map], config: Mapping[str, Any]) -> Map:
    """File to latents with nothing of mvcodec: 64 y_hat, every slice's check verified."""

    def tables(kind: str) -> list[Table]:
        counts, lengths, offsets = (tensors[f"tables.{kind}.{part}"] for part in ("counts", "lengths", "offsets"))
        rows = np.split(counts, np.cumsum(lengths)[:-1])
        return [Table(int(offset), row.tolist()) for offset, row in zip(offsets, rows, strict=True)]

    file = read_file(data)
    height, width = (-(-int(str(file.metadata[side])) // 64) for side in ("height", "width"))
    hyper, *sections = file.sections
    shape, gaussian = (config["hyper_channels"], height, width), tables("gaussian")
    quality = int(str(file.metadata["quality"]))
    band = (2 * quality * (len(tables("hyper")) // shape[0] - 1) + 10000) // 20000
    channels = (np.indices(shape)[0] + band * shape[0]).ravel().tolist()
    z_hat = np.array(decode_section(hyper, channels, tables("hyper"), skip_first=False)).reshape(shape)

    def symbols(step: int, index: Map) -> Map:
        if step >= len(sections):
            return np.zeros_like(index)
        values = decode_section(sections[step], index.ravel().tolist(), gaussian, skip_first=True)
        return np.array(values).reshape(index.shape)

    _, y64 = ExactReader(tensors, config).read(z_hat, quality, symbols)
    slice_channels = len(y64) // config["slices"]
    parts = np.split(y64, [slice_channels * i for i in range(1, len(file.checks))])
    for part, check in zip(parts, file.checks, strict=True):
        assert crc16(part.astype("<i4").tobytes()) == check
    return y64


def sha256(y64: Map) -> str:
    return hashlib.sha256(y64.astype("<i4").tobytes()).hexdigest()


@pytest.mark.parametrize("name", DRAWN)
def test_golden_file(name, tmp_path):
    model = drawn_model(name)
    export_model(model.net, tmp_path / "golden.safetensors")
    tensors, config = read_model(tmp_path / "golden.safetensors")
    # A second export makes the tables of z anew, from weights that the first one rounded to fp16.
    tensors |= {f"tables.hyper.{part}": array.astype(np.int64) for part, array in model.hyper.arrays().items()}
    facts = json.loads(GOLDEN.with_name(f"{name}.json").read_text())
    assert sha256(decoded(GOLDEN.with_name(f"{name}.phv").read_bytes(), tensors, config)) == facts["integers_sha256"]


def test_a_file_of_fewer_slices_than_the_model_has(tmp_path, lattice_model):
    tensors, config = read_model(lattice_model.path)
    y, z = torch.zeros(1, 32, 8, 12), torch.zeros(1, 16, 2, 3)
    y[:, 8:16] = 5  # of slice 1 of 4
    latents = encode_latents(lattice_model, y, z, 0.42)
    header = Header(lattice_model.id, "tiny", 42, 192, 128)
    data = pack(Stream(header, latents.hyper, latents.slices))
    assert len(read_file(data).checks) == 2
    assert np.array_equal(decoded(data, tensors, config), 64 * latents.y_hat[0].numpy())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_released_file(path):
    facts = json.loads(path.with_suffix(".json").read_text())
    assert sha256(decoded(path.with_suffix(".phv").read_bytes(), *read_model(path))) == facts["integers_sha256"]
