"""Model files: one safetensors file holds the weights, the tables and, as metadata, the configuration.

The entropy path (h_s, Para-EM, tables) is integers (exact/stored.py), everything else fp16. Loading proves that the
integers can be computed with exactly on this machine, and refuses a file where they cannot.

The model id is a hash of what the decoded integers depend on: h_s, Para-EM and the tables. A better encoder or joint
decoder around the same entropy model keeps the id, and with it every file ever written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from mvcodec.blank import Uninitialised
from mvcodec.entropy.tables import Tables, counts_from_pmf, gaussian_tables, sigma_thresholds
from mvcodec.errors import ModelError
from mvcodec.exact.check import check_layers
from mvcodec.exact.fixed import EXP_LENGTH, WEIGHT_ONE, exp_table
from mvcodec.exact.quantise import fix, quantise
from mvcodec.exact.stored import exact_layers, load_tensors, to_tensors
from mvcodec.files import atomic, shipped
from mvcodec.graphs import PLAIN, Graphs, graphs_on
from mvcodec.parahydra import ModelConfig, ParaHydra
from mvcodec.precision import bfloat16_pays

FORMAT = "mvcodec-weights-2"
DEFAULT_MODEL = "fast"
EXACT_PARTS = ("h_s", "para_em")
ENTROPY_PARTS = (*(f"{part}." for part in EXACT_PARTS), "tables.")  # what the decoded integers depend on
CALIBRATION_QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
INTEGER_TYPES = (torch.int8, torch.int16, torch.int32)
FIRST_SLICE = "para_em.models.0."  # holds nearly all bits of small files, and its rounding cost 0.9 % of them
MAX_TILE = 64  # attention within larger tiles could outgrow the exact sums
HYPER_BOUND = 40  # z beyond it is coded as an escape


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded codec: networks, tables, identity. The entropy path counts in integers, everything else is float32."""

    name: str
    net: ParaHydra
    gaussian: Tables  # 64 scales, for y: of a Gaussian, or fitted
    hyper: Tables  # one per channel for each band of qualities, for z
    sigma_thresholds: Tensor  # [63] float64, between the logarithms of neighbouring scales
    id: bytes  # 8 bytes, see the module's docstring
    path: Path
    about: Mapping[str, str]  # training history from the file's metadata
    graphs: Graphs = field(default=PLAIN, compare=False, repr=False)  # what its networks are called through

    def __reduce__(self) -> tuple[Any, ...]:
        return load_model, (self.path, self.device)  # copies and other processes read the file anew

    @property
    def device(self) -> torch.device:
        return self.net.gain.log_gain.device

    def within(self, max_memory: int | None) -> Model:
        """Itself, or where memory is to stay within so many bytes without graphs, which hold theirs between calls."""
        return self if max_memory is None or self.graphs is PLAIN else replace(self, graphs=PLAIN)

    @cached_property
    def fuses(self) -> bool:
        """Whether Para-JD's fusions do anything: before their training stage all gains are zero."""
        return any(bool(fusion.fusion.gain.any()) for fusion in self.net.para_jd.fusions)

    @cached_property
    def bfloat16(self) -> bool:
        """Whether the float networks run in bfloat16."""
        return bfloat16_pays(self.device)


def entropy_id(tensors: Mapping[str, Tensor], config: ModelConfig) -> bytes:
    """First 8 bytes of SHA-256 over the entropy path: its tensors (name, shape, little-endian data) and config."""
    inexact = [n for n, x in tensors.items() if n.startswith(ENTROPY_PARTS) and x.dtype not in INTEGER_TYPES]
    if inexact:
        raise ModelError(f"no exact arithmetic without its integers: {inexact[0]} is {tensors[inexact[0]].dtype}")
    digest = hashlib.sha256()
    digest.update(json.dumps(config.entropy_switches(), sort_keys=True).encode())
    for name in sorted(n for n in tensors if n.startswith(ENTROPY_PARTS)):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.digest()[:8]


def export_model(
    net: ParaHydra,
    path: Path,
    about: Mapping[str, str] | None = None,
    pictures: Sequence[Tensor] = (),
    entropy: Mapping[str, Tensor] | None = None,
    gaussian: Tables | None = None,
) -> bytes:
    """Write `net` as a model file, whole or not at all; returns the model id.

    An entropy path without integers gets them here: calibrated on `pictures` (each [K, 3, H, W], sides multiples of
    64), or with 16-bit inputs throughout if there are none, which is slower. entropy: that of another file
    (`read_entropy_path`), taken as it is and with it the id, so that whatever it has written can be read. gaussian:
    tables of y, if not those of a Gaussian.
    """
    metadata = {"format": FORMAT, "config": json.dumps(net.config.to_dict()), **(about or {})}
    tensors = {}
    for name, value in net.state_dict().items():
        if not name.startswith(ENTROPY_PARTS):
            tensors[name] = value.detach().cpu().half().contiguous()
            if not torch.isfinite(tensors[name]).all():
                raise ModelError(f"{name} does not fit fp16 or is not finite; the model cannot be exported")
    tensors |= _new_entropy_path(net, pictures, gaussian) if entropy is None else entropy
    with atomic(path) as file:
        file.write(to_safetensors(tensors, metadata=metadata))
    return entropy_id(tensors, net.config)


def read_entropy_path(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """That of a model file, for a network of `config`; ModelError if it is of another shape."""
    tensors, other, _ = read_model_file(path)
    if other.entropy_switches() != config.entropy_switches():
        raise ModelError(f"{path}: its entropy model is not of the shape of this one")
    return {name: value for name, value in tensors.items() if name.startswith(ENTROPY_PARTS)}


def exact_parts(net: ParaHydra) -> nn.ModuleDict:
    """What counts in integers, as one network whose names are those of `net`."""
    return nn.ModuleDict({part: net.get_submodule(part) for part in EXACT_PARTS})


def calibrate(net: ParaHydra, pictures: Sequence[Tensor]) -> None:
    """Give the entropy path of `net` its integers; see `export_model` for the pictures."""

    @torch.no_grad()
    def replay() -> None:
        for views in pictures:
            for t in CALIBRATION_QUALITIES:
                net(views[None], torch.full((1, len(views)), t), joint=False, fuse=False, clean=False)

    quantise(exact_parts(net), replay if pictures else None, wide=lambda name: name.startswith(FIRST_SLICE))


def _new_entropy_path(net: ParaHydra, pictures: Sequence[Tensor], gaussian: Tables | None) -> dict[str, Tensor]:
    """Integers of h_s and Para-EM, and all tables."""
    parts = exact_parts(net)
    if any(layer.integers is None for layer in exact_layers(parts).values()):
        calibrate(net, pictures)
    tensors = {name: value.contiguous() for name, value in to_tensors(parts).items()}
    pmf = net.z_prior.pmf(HYPER_BOUND).cpu().numpy()
    counts = counts_from_pmf(pmf / np.maximum(pmf.sum(axis=1, keepdims=True), 1.0))
    hyper = Tables(counts.flatten(), [counts.shape[1]] * len(counts), [-HYPER_BOUND] * len(counts))
    for kind, tables in (("gaussian", gaussian or gaussian_tables()), ("hyper", hyper)):
        for name, array in tables.arrays().items():
            tensors[f"tables.{kind}.{name}"] = torch.from_numpy(array.astype(np.int32))
    tensors["tables.sigma_thresholds"] = torch.from_numpy(sigma_thresholds())
    tensors["tables.exp"] = torch.from_numpy(exp_table())
    return tensors


def available_models() -> list[Path]:
    """The model files that came with the package, and those in $MVCODEC_MODELS, by name.

    ModelError where that is no folder.
    """
    folders = [shipped("models")]
    if extra := os.environ.get("MVCODEC_MODELS"):
        folders.append(Path(extra))
        if not folders[-1].is_dir():
            raise ModelError(f"$MVCODEC_MODELS: {extra} is no folder")
    return sorted((path for folder in folders for path in folder.glob("*.safetensors")), key=lambda path: path.stem)


def find_model(name: str) -> Path:
    """A path as it is, or the name of an available model."""
    if name.endswith(".safetensors"):
        if Path(name).is_file():
            return Path(name)
        raise ModelError(f"model file {name} does not exist")
    models = {path.stem: path for path in available_models()}
    if name not in models:
        if Path(name).is_file():
            raise ModelError(f"{name} is no model file: those end in .safetensors")
        known = ", ".join(models) or "none"
        raise ModelError(f"no model named {name!r}; available: {known}")
    return models[name]


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelConfig, dict[str, str]]:
    """Tensors, configuration and remaining metadata of a model file; ModelError if it is not one."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a readable model file: {error}") from error
    if metadata.pop("format", None) != FORMAT:
        raise ModelError(f"{path} is not an mvcodec model file (format {FORMAT})")
    try:
        config = ModelConfig.from_dict(json.loads(metadata.pop("config")))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} has no valid configuration: {error}") from error
    return tensors, config, metadata


@torch.inference_mode(False)  # others may want gradients of what a caller in inference mode was the first to load
def load_model(name: str | os.PathLike[str] = DEFAULT_MODEL, device: str | torch.device = "cpu") -> Model:
    """Load a model by name or path. Raises ModelError if it is missing, damaged or inconsistent."""
    path = find_model(os.fspath(name))
    tensors, config, about = read_model_file(path)
    identity = entropy_id(tensors, config)
    tables = {
        kind: Tables(
            **{part: _table(tensors, path, f"tables.{kind}.{part}") for part in ("counts", "lengths", "offsets")},
            skip_first=kind == "gaussian",
        )
        for kind in ("gaussian", "hyper")
    }
    if not 2 <= config.attention_tile <= MAX_TILE or config.channel_context == "attention2d":
        raise ModelError(f"{path}: attention beyond tiles of 2 to {MAX_TILE} latents has no exact form")
    thresholds = _rising(_table(tensors, path, "tables.sigma_thresholds"), path, len(tables["gaussian"]) - 1)
    exponentials = _table(tensors, path, "tables.exp")
    falling = exponentials.shape == (EXP_LENGTH,) and (np.diff(exponentials) <= 0).all() and exponentials[-1] >= 0
    if not falling or exponentials[0] != WEIGHT_ONE:
        raise ModelError(f"{path}: tables.exp is not a falling table of {EXP_LENGTH} entries")
    held = sum(value.numel() for value in tensors.values())
    try:
        with Uninitialised(2 * held), torch.device("cpu"):  # whatever the program's default is
            net = ParaHydra(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    state = {}
    for name, value in tensors.items():
        if not name.startswith(ENTROPY_PARTS):
            if not value.is_floating_point() or not value.isfinite().all():
                raise ModelError(f"{path}: {name} holds something else than finite real numbers")
            state[name] = value.float()
    for name, value in net.state_dict().items():
        if name.startswith(ENTROPY_PARTS):
            state[name] = torch.zeros(value.shape, dtype=torch.float32, device="cpu")  # for load_tensors to fill
    try:
        net.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: weights do not fit their configuration: {str(error).splitlines()[0]}") from error
    if len(tables["hyper"]) != config.hyper_bands * config.hyper_channels or len(tables["gaussian"]) != 64:
        raise ModelError(f"{path}: entropy tables do not fit the configuration")
    net.requires_grad_(False).eval()
    net.to(device)
    for part in EXACT_PARTS:
        load_tensors(net.get_submodule(part), tensors, f"{part}.")
        fix(net.get_submodule(part), torch.from_numpy(exponentials))
    mantissa, exponent = net.para_em.unit.frexp()
    if (mantissa != 0.5).any() or (exponent < 1).any():
        raise ModelError(f"{path}: para_em.unit holds something else than powers of two from 1 upwards")
    _check_machine(net, identity)
    for module in (net.g_a, net.para_jd, net.refinement):
        if module is not None:
            module.to(memory_format=torch.channels_last)
    bfloat16_pays(torch.device(device))  # tried before threads compute beside each other
    boundaries = torch.from_numpy(thresholds / 65536).to(device)
    graphs = graphs_on(torch.device(device))
    return Model(path.stem, net, tables["gaussian"], tables["hyper"], boundaries, identity, path, about, graphs)


@lru_cache
def _checked() -> set[tuple[bytes, str]]:
    """Models and devices that this process has looked at."""
    return set()


def _check_machine(net: ParaHydra, identity: bytes) -> None:
    """Once per model and device: DesyncError if this machine would write or read other integers."""
    key = identity, str(net.gain.log_gain.device)
    if key not in _checked():
        check_layers(exact_layers(exact_parts(net)))
        _checked().add(key)


def _rising(values: NDArray[np.int32], path: Path, length: int) -> NDArray[np.int32]:
    if values.shape != (length,) or (np.diff(values) <= 0).any():
        raise ModelError(f"{path}: tables.sigma_thresholds are not {length} rising numbers")
    return values


def _table(tensors: dict[str, Tensor], path: Path, name: str) -> Any:
    if name not in tensors:
        raise ModelError(f"{path}: {name} is missing")
    if tensors[name].dtype != torch.int32:
        raise ModelError(f"{path}: {name} is {tensors[name].dtype}, not torch.int32")
    return tensors.pop(name).numpy()
