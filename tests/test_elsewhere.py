"""The branches for CUDA, on a GPU that is none: files and pictures are the CPU's, no tensor is on the wrong side.

What this shows and what it cannot is said in tests/elsewhere.py.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image as pil
from torch import Tensor

from mvcodec import api, cli, selftest
from mvcodec.codec import DecodedView, decode_set, encode_image, encode_view
from mvcodec.container import unpack
from mvcodec.errors import MvcodecError
from mvcodec.evaluation import speed
from mvcodec.graphs import CudaRecorder, graphs_on
from mvcodec.images import Image
from mvcodec.latents import decode_intact
from mvcodec.training import cells, preparation, refinement, steadying
from mvcodec.training.config import TrainConfig
from mvcodec.training.loop import Trainer, train
from mvcodec.transfers import Fetched
from mvcodec.weights import load_model
from tests.conftest import smooth_picture
from tests.elsewhere import CUDA, Elsewhere, Machine, elsewhere, missing

SLOW = pytest.mark.slow
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The device is there within every test, and only there: what fixtures of the module compute is the CPU's."""
    before = torch.get_num_threads()
    api._name_of_id.cache_clear()  # of folders of other tests
    with elsewhere() as machine:
        yield machine
    torch.set_num_threads(before)
    api._loaded.cache_clear()
    api._name_of_id.cache_clear()


@pytest.fixture(scope="module")
def pictures() -> list[Image]:
    """The third of another size."""
    return [Image(smooth_picture(*size, seed)) for seed, size in enumerate([(70, 100), (70, 100), (50, 120)])]


@pytest.fixture(scope="module")
def files(tiny_model: Any, pictures: list[Image]) -> list[bytes]:
    return [encode_image(tiny_model, picture, 30 + 20 * k, camera_id=str(k)) for k, picture in enumerate(pictures)]


def in_precision(model: Any, short: bool) -> Any:
    """The same with or without bfloat16, which a GPU has and a processor may have; with graphs of its own."""
    model = replace(model, graphs=graphs_on(model.device))
    model.__dict__["bfloat16"] = short
    return model


@pytest.fixture(scope="module")
def decoded(tiny_model: Any, files: list[bytes]) -> list[DecodedView]:
    """In float32, aligned refinement included."""
    return decode_set(in_precision(tiny_model, False), files, maps=True, max_peers=1)


@pytest.fixture(scope="module")
def gpu(tiny_model_file: Path) -> Any:
    with elsewhere():
        return load_model(tiny_model_file, "cuda")


def apart(found: list[DecodedView], wanted: list[DecodedView]) -> float:
    """Mean difference of the pictures, in levels."""
    return max(float(abs(f.pixels.astype(float) - w.pixels).mean()) for f, w in zip(found, wanted, strict=True))


def on_the_device(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).to(CUDA)


# The device itself


def test_gradients_are_those_of_torchs_engine() -> None:
    torch.manual_seed(0)
    layer, values = torch.nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    found = []
    for device in (torch.device("cpu"), CUDA):
        layer = layer.to(device)
        x = values.clone().to(device).requires_grad_()
        y = 2 * layer(x * x[0, 0, 0]).relu()
        y[0, 0].mul_(2)
        loss = (y.double() * x.mean()).sum() + y.sum()
        (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
        loss.backward()
        assert torch.equal(x.grad, wanted)
        found.append([g.cpu() for g in (x.grad, layer.weight.grad, layer.bias.grad)])
        layer.zero_grad()
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))


def test_tensors_of_both_sides_do_not_meet() -> None:
    x, here = on_the_device([1, 2]), torch.tensor([3.0, 4])
    assert x.is_cuda
    assert (x + 1).tolist() == [2, 3]
    assert (x + here.to(CUDA)).tolist() == [4, 6]
    assert (x * torch.tensor(2.0)).tolist() == [2, 4]  # a number may come from the CPU
    for mix in (
        lambda: x + here,
        lambda: torch.cat((x, here)),
        lambda: torch.stack((x[0], torch.tensor(2.0))),
        lambda: here[x.long() - 1],
        lambda: here.add_(x),
    ):
        with pytest.raises(RuntimeError, match=r"same device|on the CPU"):
            mix()
    assert x[torch.tensor([1])].tolist() == [2]  # fetched
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()


def test_what_is_on_its_way_is_there_when_it_was_waited_for() -> None:
    coming = Fetched(on_the_device([1, 2]))
    assert coming.values.tolist() != [1, 2]
    assert coming.wait().tolist() == [1, 2]


def test_a_recording_computes_nothing_and_may_not_wait_or_copy() -> None:
    x, here = on_the_device([1, -2]), torch.tensor([3.0, 4])
    recorder = CudaRecorder(CUDA)

    def recorded(function: Any) -> Any:
        with recorder.beside():
            recorder.begin()
            try:
                return function(), recorder.end()
            finally:
                recorder.abandon([])

    total, replay = recorded(lambda: x[x.argsort()].square().sum() + torch.zeros(1, device=CUDA))
    assert total.item() == 123.25
    for values in ([1, -2], [3, 4]):
        x.copy_(torch.tensor(values))
        replay()
        assert total.item() == sum(value**2 for value in values)
    for forbidden in (
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x[x > 0],
        lambda: x[[1, 0]],
        lambda: x[torch.tensor([1])],
        lambda: x.cpu(),
        lambda: here.to(CUDA),
        lambda: x.copy_(here),
        lambda: torch.tensor([1.0], device=CUDA),
        torch.cuda.synchronize,
        lambda: Fetched(x),
    ):
        with pytest.raises(RuntimeError, match="capturing"):
            recorded(forbidden)
    assert x.masked_fill(x > 3, 0).tolist() == [3, 0]


# The codec


def test_files_are_those_of_the_cpu(gpu: Any, files: list[bytes], pictures: list[Image]) -> None:
    found = [encode_image(gpu, picture, 30 + 20 * k, camera_id=str(k)) for k, picture in enumerate(pictures)]
    assert found == files
    assert gpu.device == CUDA


@pytest.fixture(scope="module")
def others(tiny_model: Any, lattice_model: Any) -> list[tuple[Any, Image, dict[str, Any], bytes]]:
    """Of every kind of file: the model, the picture, what is asked of the encoder, and what the CPU makes of it."""
    pixels = smooth_picture(64, 80, 5)
    deep = (pixels.astype(np.uint16) << 8) + 77
    kinds = [
        (tiny_model, Image(pixels[..., 0].copy()), {}),
        (tiny_model, Image(deep), {}),
        (tiny_model, Image(pixels), {"effort": 1}),
        (tiny_model, Image(smooth_picture(130, 200, 6)), {"max_memory": 1 << 32}),
        (lattice_model, Image(pixels), {}),
    ]
    return [(model, image, asked, encode_image(model, image, 60, **asked)) for model, image, asked in kinds]


def test_files_of_other_kinds_are_those_of_the_cpu(others: list[Any]) -> None:
    for model, image, asked, file in others:
        gpu = api.load_model(str(model.path), "cuda")
        assert encode_image(gpu, image, 60, **asked) == file


def test_estimates_are_those_of_the_cpu(gpu: Any, tiny_model: Any, pictures: list[Image]) -> None:
    found, wanted = (encode_view(model, pictures[0], 40, estimate=True) for model in (gpu, tiny_model))
    assert found.estimated_bits == pytest.approx(wanted.estimated_bits, rel=1e-4)


def test_integers_are_those_of_the_cpu(gpu: Any, tiny_model: Any, files: list[bytes]) -> None:
    """Damaged files included: what is intact of them, and the error where nothing is."""
    streams = [unpack(file) for file in files[:2]]
    streams += [unpack(files[1][:-40], partial=True), replace(streams[0], slices=streams[0].slices[::-1])]
    with torch.inference_mode():
        found, wanted = (decode_intact(model, streams) for model in (gpu, tiny_model))
    for (latents, stream), (other, same) in zip(found[:3], wanted[:3], strict=True):
        assert all(torch.equal(x.cpu(), y) for x, y in zip(latents, other, strict=True))
        assert stream == same
    assert isinstance(found[3], MvcodecError)
    assert str(found[3]) == str(wanted[3])


def test_pictures_are_those_of_the_cpu(gpu: Any, files: list[bytes], decoded: list[DecodedView]) -> None:
    """Three views jointly, aligned refinement and all, in one precision: one sample of a hundred may be a level off."""
    found = decode_set(in_precision(gpu, False), files, maps=True, max_peers=1)
    assert apart(found, decoded) < 0.01
    for view, other in zip(found, decoded, strict=True):
        assert (view.header, view.peers) == (other.header, other.peers)
        assert view.weights == pytest.approx(other.weights, abs=1e-3)
        assert view.maps is not None
        assert other.maps is not None
        assert abs(view.maps.astype(int) - other.maps).mean() < 0.1


def test_what_cannot_be_recorded_leaves_nothing_behind() -> None:
    """Neither the others' recording nor random numbers of the device, both of which a failed recording would end."""
    graphs, x = graphs_on(CUDA), on_the_device([1, -2])

    def waits(x: Tensor) -> Tensor:
        return x + x.sum().item()

    def doubles(x: Tensor) -> Tensor:
        return 2 * x

    with torch.inference_mode():
        assert [graphs(waits, x).tolist() for _ in range(4)] == [[0, -3]] * 4
        assert torch.rand(3, device=CUDA).shape == (3,)
        assert [graphs(doubles, x).tolist() for _ in range(4)] == [[2, -4]] * 4
    state = graphs.state()
    assert state is not None
    (refused,) = state["refused"].values()
    assert refused.startswith("RuntimeError: operation not permitted when stream is capturing")
    assert list(state["replayed"].values()) == [3]


def test_graphs_of_a_recording_that_failed_midway_are_kept() -> None:
    """With the last graph of a stream PyTorch frees what all the others need."""
    graphs, x = graphs_on(CUDA), on_the_device([1, -2])

    def waits(x: Tensor, code: Any) -> Tensor:
        total: Tensor = code(0, x + 1, x).sum()
        return x + (total.item() if recorder.graph is not None else total)

    recorder = graphs.recorder
    assert isinstance(recorder, CudaRecorder)
    with torch.inference_mode():
        for _ in range(3):
            assert graphs(waits, x, code=lambda step, mu, ln_sigma: mu).tolist() == [2, -1]
    assert len(recorder.failed) == 2


def test_graphs_replay_what_was_called(gpu: Any, files: list[bytes]) -> None:
    """In bfloat16, as a GPU does it, recorded in the second call and replayed from then on."""
    gpu = in_precision(gpu, True)
    called, recorded, replayed = (decode_set(gpu, files[:2]) for _ in range(3))
    assert apart(called, replayed) == apart(called, recorded) == 0
    state = gpu.graphs.state()
    assert state["refused"] == {}
    assert state["recorded"].keys() == state["replayed"].keys()
    networks = {"ParaEM", "HyperSynthesis", "KltSynthesisCoarse", "KltSynthesisFine"}
    alignment = {"_prepare", "_meeting", "_refined", "_settled"}
    assert networks | alignment < state["replayed"].keys()


def test_bfloat16_costs_little(tiny_model_file: Path, files: list[bytes]) -> None:
    """Blocks that have learned something round what they add, by hundredths of a level, and not what they add it to."""
    gpu = load_model(tiny_model_file, "cuda")
    learned = [layer for name, layer in gpu.net.para_jd.named_parameters() if name.endswith("conv2.weight")]
    for weight in learned:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 8)
    found, wanted = (decode_set(in_precision(gpu, short), files[:1]) for short in (True, False))
    assert 0 < apart(found, wanted) < 0.05


def test_decoding_otherwise_gives_what_the_cpu_gives(
    gpu: Any, tiny_model: Any, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and damaged, and in tiles without the refinement."""
    both = in_precision(gpu, False), in_precision(tiny_model, False)

    def same(given: list[Any], **how: Any) -> None:
        found, wanted = (decode_set(model, given, **how) for model in both)
        assert apart(found, wanted) < 0.01
        assert [view.damage for view in found] == [view.damage for view in wanted]

    same([unpack(files[0][:-40], partial=True), unpack(files[2])], joint=False)
    monkeypatch.setattr("mvcodec.codec.pixels_at_once", lambda *_, **__: 64 * 64)
    same(files[:2], refine=False)


@pytest.mark.slow
def test_a_shipped_model_does_the_same() -> None:
    host, gpu = (api.load_model("fast", device) for device in ("cpu", "cuda"))
    files = [encode_image(host, Image(smooth_picture(64, 96, k)), 40, camera_id=str(k)) for k in range(2)]
    assert [encode_image(gpu, Image(smooth_picture(64, 96, k)), 40, camera_id=str(k)) for k in range(2)] == files
    for joint, most in ((False, 0.01), (True, 0.2)):  # matches are found by other sums, and these views share little
        found, wanted = (decode_set(in_precision(model, False), files, joint=joint) for model in (gpu, host))
        assert apart(found, wanted) < most
    for _ in range(3):
        assert apart(decode_set(gpu, files), wanted) < 1
    assert gpu.graphs.state()["refused"] == {}


# The program around it


def test_the_self_test_finds_nothing(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks of devices and of graphs, on fewer and smaller latents."""
    drawn = selftest.drawn_latents
    monkeypatch.setattr(selftest, "DRAWN", 1)
    monkeypatch.setattr(selftest, "drawn_latents", lambda model, *size_and_seed: drawn(model, 4, 4, *size_and_seed[2:]))
    before = switches()
    with torch.inference_mode():
        assert selftest.devices(gpu).startswith("4 drawn pictures: the files of CPU and a GPU that is none")
        assert "the same bytes" in selftest.replays(gpu)
        assert "cuda:0 and CPU" in selftest.all_backends(gpu)
        assert "is wrong in float32" in selftest.negative_control(gpu)
    assert switches() == before


def switches() -> tuple[bool, bool, bool]:
    """What the check of devices switches, and puts back."""
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


def test_devices_are_found_by_name() -> None:
    for name, found in {"auto": "cuda", "cuda": "cuda", "cuda:0": "cuda:0", "cpu": "cpu"}.items():
        assert str(api.resolve_device(name)) == found
    with pytest.raises(MvcodecError, match="torch sees 1 CUDA devices"):
        api.resolve_device("cuda:1")


@pytest.fixture
def workplace(tiny_model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MVCODEC_MODELS", str(tiny_model_file.parent))
    monkeypatch.setattr("mvcodec.weights.DEFAULT_MODEL", "tiny")
    for k in range(2):
        path = tmp_path / "scene" / f"C{k}" / "00000000.png"
        path.parent.mkdir(parents=True)
        pil.fromarray(smooth_picture(48, 64, k)).save(path)
    return tmp_path


def command(*args: object) -> list[str]:
    """Lines that a command prints."""
    outcome = CliRunner().invoke(cli.group, [str(arg) for arg in args], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output.splitlines()


def test_commands_take_a_device(workplace: Path) -> None:
    """What it encodes a CPU finds intact, integer for integer."""
    command("encode", "scene", "-o", "coded", "--device", "cuda", "--quiet")
    assert len(command("verify", "coded", "--deep", "--device", "cpu", "--json")) == 2
    command("decode", "coded", "-o", "decoded", "--device", "cuda", "--quiet", "--preview")
    for k in range(2):
        found, wanted = (np.asarray(pil.open(f"{where}/C{k}/00000000.png"), float) for where in ("decoded", "scene"))
        assert abs(found - wanted).mean() < 10


def test_times_are_measured(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `mvcodec bench` does, but for what shows the machine's best and how long an import takes."""
    ceilings = {"float32_gmac_per_s": 1.0, "bfloat16_gmac_per_s": 1.0, "gbyte_per_s": 1.0}
    monkeypatch.setattr(speed, "ceilings", lambda *_: ceilings)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: SimpleNamespace(stdout="0.5"))
    lines = command("bench", "scene", "--device", "cuda", "--runs", 1, "--warmup", 2, "--preview", "--json")
    start, encode, decode = (json.loads(line) for line in lines)
    assert start["device_name"] == "a GPU that is none"
    for record, stages in ((encode, {"g_a", "h_a", "Para-EM", "coder"}), (decode, {"h_s", "Para-EM", "Para-JD"})):
        assert stages <= record["stages"].keys()
        assert not record["graphs"]["refused"]
        assert record["floor_ms"]


# Training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two views of one place to learn from, and two of another."""
    folder = tmp_path_factory.mktemp("places")
    for seed, name in enumerate(("scenes", "others")):
        wide = smooth_picture(144, 160, seed)
        for k in range(2):
            path = folder / name / "one" / f"view{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pil.fromarray(wide[16 * k :][:128, 24 * k :][:, :128]).save(path)
    data = str(folder / "scenes")
    return TrainConfig(data, str(folder / "run"), "tiny", steps=2, batch=1, crop=64, threads=1, validate_every=2)


def losses(run: Path) -> list[float]:
    with (run / "log.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def single(config: TrainConfig) -> Path:
    """What the CPU's run leaves."""
    return train(replace(config, run_dir=f"{config.run_dir}-cpu"), progress=False)


def test_training_goes_as_on_the_cpu(config: TrainConfig, single: Path, tmp_path: Path) -> None:
    run = train(replace(config, run_dir=str(tmp_path), device="cuda"), progress=False).parent
    assert losses(run) == pytest.approx(losses(single.parent), rel=0.02)


def test_a_run_goes_on_from_its_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    """With everything that a run can have: both optimizers, averages, validation."""
    validation = config.data.replace("scenes", "others")
    run = replace(config, run_dir=str(tmp_path), device="cuda", validation=validation, optimizer="muon")
    trainer = Trainer(run, progress=False)
    trainer.train_step()
    trainer.save()
    state = torch.load(train(run, progress=False), weights_only=True, map_location="cpu")
    assert state["step"] == 2
    assert not any(isinstance(x, Elsewhere) for x in state["ema"].values())


@pytest.mark.parametrize(
    "stage", ["joint", "decoder", *(pytest.param(x, marks=SLOW) for x in ("quantise", "refine", "cells"))]
)
def test_other_stages_go(
    config: TrainConfig, single: Path, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(config, device="cuda", stage=stage, start_from=str(single), run_dir=str(tmp_path), steps=1)
    if stage == "joint":  # with this seed first a lone view, of which the fusions learn nothing, and then two
        run = replace(run, parallax=0.3, synthesis=True, optimizer="muon", steps=2)
    if stage == "refine":
        run = replace(run, crop=TrainConfig.crop, validate_every=TrainConfig.validate_every)
        for module, sizes in {
            preparation: {"WINDOW": 128, "PAIR_WINDOW": 128, "CROP": 96, "SETS": 1},
            refinement: {"CROP": 96, "TRAINED_CROP": {"mse": 64}},
            steadying: {"TRIES": 1, "STEPS": 1, "OVERLAP": 0.0},
        }.items():
            for name, value in sizes.items():
                monkeypatch.setattr(module, name, value)
    if stage == "cells":
        run = replace(run, crop=TrainConfig.crop, validate_every=TrainConfig.validate_every)
        for name, value in {"WINDOW": 128, "SETS": {False: 1, True: 1}}.items():
            monkeypatch.setattr(cells, name, value)
    found = losses(train(run, progress=False).parent)
    wanted = losses(train(replace(run, device="cpu", run_dir=str(tmp_path / "cpu")), progress=False).parent)
    assert found == pytest.approx(wanted, rel=0.02)
