"""Proof, on the user's own machine, that it computes the integers that every other machine does.

Each check yields one sentence on what it looked at; it raises Failed if something is not as it must be. The reference
is int64 throughout. `mvcodec selftest` runs all of them; the slow tests run them too.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mvcodec import entropy
from mvcodec.container import unpack
from mvcodec.errors import MvcodecError
from mvcodec.exact.check import check_layers
from mvcodec.exact.conv import ExactConvolution, Integers
from mvcodec.exact.proof import FLOAT32_BOUND, FLOAT64_BOUND, HALF_LIMIT, Backend, choose_backend
from mvcodec.exact.stored import exact_layers
from mvcodec.files import shipped
from mvcodec.latents import MU_GRID, decode_latents, encode_latents, integer_bytes
from mvcodec.weights import Model, exact_parts, load_model

# Settings of a process that must not change an integer.
SURROUNDINGS: tuple[dict[str, str], ...] = (
    {"OMP_NUM_THREADS": "1"},
    {"OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "2", "MVCODEC_SELFTEST_MKLDNN": "0"},
    {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    {"OMP_NUM_THREADS": "1", "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "1", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
)
DRAWN = 25  # pictures for each setting of a GPU
GOLDEN_WORDS = "fc9c2ad0e466e5"  # bitstream_spec.md 6.5


class Failed(MvcodecError):
    """Integers differ from those of other machines."""

    exit_code = 7


Check = Callable[[Model], str]


def proofs(model: Model) -> str:
    """Every bound anew, in Python's integers."""
    found: Counter[str] = Counter()
    tightest = 0.0
    for name, layer in entropy_layers(model).items():
        integers = layer.integers
        assert integers is not None
        assert layer.backend is not None
        sums = sum_per_output(layer, integers)
        for total, bias, bits in zip(sums, integers.bias.tolist(), integers.fraction_bits.tolist(), strict=True):
            offset = abs(bias) + (1 << bits) // 2
            if layer.backend is Backend.SPLIT:
                bound, limit = max(HALF_LIMIT * total + offset // 256 + 1, HALF_LIMIT * total + 256), FLOAT32_BOUND
            else:
                bound = integers.input_limit * total + offset
                limit = FLOAT32_BOUND if layer.backend is Backend.FLOAT32 else FLOAT64_BOUND
            if bound >= limit:
                raise Failed(f"{name}: a sum may reach {bound}, beyond {limit} of {layer.backend.value}")
            tightest = max(tightest, bound / limit)
        found[layer.backend.value] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.items()))
    layers = sum(found.values())
    return f"sums of {layers} layers bounded ({kinds}); the largest reaches {100 * tightest:.1f} % of its limit"


def extreme_inputs(model: Model) -> str:
    """Each distinct kind of layer on the input that attains its bound, on a saturated one and on a random one."""
    kinds = check_layers(entropy_layers(model))
    return f"{kinds} kinds of layers equal int64 on random, saturated and bound-attaining inputs"


def negative_control(model: Model) -> str:
    """A layer whose sums do not fit must be refused by the proof, and be wrong without it."""
    rng = np.random.default_rng(1)
    weight = rng.integers(20001, 32768, (1, 512, 1, 1)) * rng.choice([-1, 1], (1, 512, 1, 1))
    one = np.array([1])
    if choose_backend(np.abs(weight).sum(axis=(1, 2, 3)), 0 * one, 127, 15 * one) is Backend.FLOAT32:
        raise Failed("a layer beyond float32's bound was let through")
    x = 127 * np.sign(weight)
    x[0, 0] = 126 * np.sign(weight[0, 0])
    signal, kernel = (torch.from_numpy(a).to(model.device, torch.float32) for a in (x, weight))
    with _switched(tf32=False, benchmark=False):  # TF32 would be wrong whatever the bound says
        in_float32 = torch.nn.functional.conv2d(signal, kernel)
    if in_float32.item() == (x * weight).sum():
        raise Failed("the input that must overflow float32 did not")
    return "a layer beyond the bound is refused, and is wrong in float32 as the bound says"


def coder(model: Model) -> str:
    """The range coder's words, and tables of the weights file."""
    table = entropy.Tables([100, 65000, 400, 36], [4], [-1])
    symbols = np.array([0, 1, -1, 0, 7, -3], dtype=np.int32)
    index = np.zeros(6, dtype=np.int32)
    words = entropy.encode(symbols, index, table)
    if words.hex() != GOLDEN_WORDS or not np.array_equal(entropy.decode(words, index, table), symbols):
        raise Failed(f"the range coder gives {words.hex()}, not {GOLDEN_WORDS}")
    rng = np.random.default_rng(3)
    index = rng.integers(0, len(model.gaussian), 100_000).astype(np.int32)
    symbols = np.where(index == 0, 0, rng.integers(-40, 41, len(index))).astype(np.int32)
    if not np.array_equal(
        entropy.decode(entropy.encode(symbols, index, model.gaussian), index, model.gaussian), symbols
    ):
        raise Failed("the range coder does not recover its symbols")
    return "golden words of the range coder; 100,000 symbols recovered with the model's 64 tables"


def all_backends(model: Model) -> str:
    """The whole walk with every layer in float64, against the proved choice; on CUDA, also against the CPU."""
    digest = walk_digest(model)
    other = load_model(model.path, "cpu")
    for layer in entropy_layers(other).values():
        assert layer.integers is not None
        layer.set_integers(layer.integers, Backend.FLOAT64)
    if walk_digest(other) != digest:
        raise Failed("float64 throughout gives other integers than the chosen back ends")
    where = f"{model.device} and CPU, " if model.device.type != "cpu" else ""
    return f"h_s and Para-EM whole: {where}chosen back ends and float64 throughout, one digest {digest[:16]}"


def devices(model: Model) -> str:
    """On CUDA: files from the CPU decode there, and the other way round, whatever precision switches are set."""
    if model.device.type != "cuda":
        return "no CUDA device asked for: CPU and GPU are equal by proof, not measured here"
    host = load_model(model.path, "cpu")
    count = 0
    for tf32, benchmark in product((False, True), repeat=2):
        with _switched(tf32, benchmark), model.graphs.off():  # a graph keeps the switches of its recording
            for seed in range(DRAWN):
                y, z = drawn_latents(model, 8, 12, seed)
                files = [encode_latents(m, y.to(m.device), z.to(m.device), seed / 24) for m in (host, model)]
                if files[0].slices != files[1].slices or files[0].hyper != files[1].hyper:
                    raise Failed(f"CPU and {model.device} write different files (TF32 {tf32}, benchmark {benchmark})")
                count += 1
    return f"{count} drawn pictures: the files of CPU and {torch.cuda.get_device_name(model.device)} are the same bytes"


@contextmanager
def _switched(tf32: bool, benchmark: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = tf32
        cudnn.benchmark = benchmark
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def replays(model: Model) -> str:
    """Recorded graphs give the files and integers of the networks they were recorded from."""
    if model.graphs.state() is None:
        return "no graphs without a GPU"
    for seed in range(6):
        y, z = (x.to(model.device) for x in drawn_latents(model, 12, 16, seed))
        replayed = encode_latents(model, y, z, seed / 6)
        with model.graphs.off():
            called = encode_latents(model, y, z, seed / 6)
        if replayed[:2] != called[:2] or not torch.equal(replayed.y_hat, called.y_hat):
            raise Failed(f"a graph gives other integers than the networks it was recorded from (picture {seed})")
    return f"6 drawn pictures through graphs and without: the same bytes ({model.graphs.state()})"


def surroundings(model: Model) -> str:
    """The same digest in processes with other threads, without oneDNN, and on lesser processors."""
    digests = {}
    running = []
    for settings in SURROUNDINGS:
        command = [sys.executable, "-m", "mvcodec.selftest", str(model.path)]
        # Passive waiting: threads that spin for each other on a busy machine take minutes.
        path = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **settings, "PYTHONPATH": path}
        running.append((settings, subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)))
    for settings, process, (output, _) in [(*one, one[1].communicate()) for one in running]:
        if process.returncode:
            raise Failed(f"with {settings} the digest cannot be computed")
        digests[output.split()[-1]] = settings
    if set(digests) != {walk_digest(model)}:
        raise Failed(f"integers differ between settings of this machine: {digests}")
    kinds = "1 and 2 threads, oneDNN on, off and told to round, AVX2 and SSE4.1 only"
    return f"{len(SURROUNDINGS)} processes ({kinds}): one digest"


def golden(model: Model) -> str:
    """The file that was written when these weights were released still gives its integers."""
    facts = golden_facts(model)
    if facts is None:
        return f"no golden file is shipped for {model.name}"
    data, wanted = facts
    found = integers_sha256(decode_latents(model, unpack(data)).y_hat)
    if found != wanted:
        raise Failed(f"the golden file of {model.name} decodes to other integers")
    return f"golden file of {model.name}: {len(data)} bytes give the integers {wanted[:16]} of its release"


CHECKS: tuple[Check, ...] = (
    proofs,
    extreme_inputs,
    negative_control,
    coder,
    all_backends,
    devices,
    replays,
    golden,
    surroundings,
)


@torch.inference_mode()
def run(model: Model) -> Iterator[tuple[str, str]]:
    """(name, sentence) of each check in turn; Failed ends it."""
    for check in CHECKS:
        yield check.__name__.replace("_", " "), check(model)


def entropy_layers(model: Model) -> dict[str, ExactConvolution]:
    return exact_layers(exact_parts(model.net))


def sum_per_output(layer: ExactConvolution, integers: Integers) -> list[int]:
    """Sum of |weights| behind an output, per channel: `proof.largest_sum` once more, the slow way."""
    if not layer.transposed:
        return [sum(map(abs, row)) for row in integers.weight.reshape(len(integers.weight), -1).tolist()]
    phases = [np.moveaxis(integers.weight[:, :, i::2, j::2], 1, 0) for i in (0, 1) for j in (0, 1)]
    return [max(sum(map(abs, p[c].ravel().tolist())) for p in phases) for c in range(integers.weight.shape[1])]


def drawn_latents(model: Model, height: int = 36, width: int = 40, seed: int = 2026) -> tuple[Tensor, Tensor]:
    """y and z that are the same numbers everywhere: integers and halves of numpy's PCG64, heavy tails included."""
    config = model.net.config
    rng = np.random.Generator(np.random.PCG64(seed))
    z = rng.integers(-6, 7, (1, config.hyper_channels, height // 4, width // 4)) + 0.25
    shape = (1, config.latent_channels, height, width)
    tails = np.where(rng.integers(0, 50, shape) == 0, 60, 1)
    y = (rng.integers(-2 * MU_GRID, 2 * MU_GRID, shape) * tails + 0.5) / MU_GRID
    return torch.from_numpy(y), torch.from_numpy(z)


@torch.inference_mode()
def walk_digest(model: Model) -> str:
    """SHA-256 of the sections and integers of drawn latents at two qualities: every mu and index has its part."""
    y, z = (x.to(model.device) for x in drawn_latents(model))
    digest = hashlib.sha256()
    for t in (0.2, 0.8765):
        latents = encode_latents(model, y, z, t)
        digest.update(latents.hyper)
        for part in latents.slices:
            digest.update(b"".join(part.sections))
        digest.update(integers_sha256(latents.y_hat).encode())
    return digest.hexdigest()


def integers_sha256(y_hat: Tensor) -> str:
    """Of y_hat in units of 1/64: int32, little-endian, C order."""
    return hashlib.sha256(integer_bytes(y_hat)).hexdigest()


def golden_facts(model: Model) -> tuple[bytes, str] | None:
    """The file shipped with these very weights and the hash of its integers."""
    data, facts = (shipped("models") / f"{model.name}.{suffix}" for suffix in ("phv", "json"))
    if not (data.is_file() and facts.is_file()):
        return None
    known = json.loads(facts.read_text())
    return (data.read_bytes(), known["integers_sha256"]) if known["model_id"] == model.id.hex() else None


if __name__ == "__main__":
    if os.environ.get("MVCODEC_SELFTEST_MKLDNN") == "0":
        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    print(walk_digest(load_model(Path(sys.argv[1]))))  # noqa: T201
