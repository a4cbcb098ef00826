"""The golden file is written and read bit by bit as before, and no damage to it does harm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvcodec.codec import decode_set
from mvcodec.container import Stream, describe, unpack
from mvcodec.errors import BitstreamError, DesyncError, MvcodecError
from mvcodec.latents import Latents, decode_intact, decode_latents
from tests.golden.make import (
    GOLDEN,
    MODELS,
    PICTURE,
    drawn_model,
    golden_file,
    golden_picture_file,
    integers_sha256,
    picture_is_stable,
)


def facts(name: str) -> dict:
    return json.loads(GOLDEN.with_name(f"{name}.json").read_text())


DATA = GOLDEN.read_bytes()
KNOWN = facts("tiny")
SECTIONS = describe(DATA)["sections"]
SLICES = len(SECTIONS) // 2
CRC8_KERNEL = bytes([0x01, 0x07])  # x^8 + x^2 + x + 1: added anywhere, it leaves the CRC-8 as it was


@pytest.fixture(scope="module")
def model():
    return drawn_model()


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_fixed_picture_gives_these_bytes(model, threads):
    assert picture_is_stable(model)  # or its float transforms could tip a rounding
    for count in (1, 2):
        threads(count)
        assert golden_picture_file(model) == PICTURE.read_bytes()
    (view,) = decode_set(model, [PICTURE.read_bytes()])
    assert view.pixels.shape == (64, 64, 3)


def flipped(position: int, pattern: bytes) -> bytes:
    damaged = bytearray(DATA)
    for i, bits in enumerate(pattern):
        damaged[position + i] ^= bits
    return bytes(damaged)


def decoded(model, stream: Stream) -> tuple[Latents, Stream]:
    with torch.inference_mode():
        (found,) = decode_intact(model, [stream])
    if isinstance(found, MvcodecError):
        raise found
    return found


class Salvage:
    """What a damaged file gives: the golden integers of its intact slices. Equal streams are decoded once."""

    def __init__(self, model) -> None:
        self.model, self.whole = model, decoded(model, unpack(DATA))[0].y_hat
        self.width = self.whole.shape[1] // SLICES
        self.seen: dict[tuple, int] = {}

    def slices(self, data: bytes) -> int:
        """How many slices were recovered, or -1 for a file that was refused; they are the golden ones."""
        try:
            stream = unpack(data, partial=True)
        except BitstreamError:
            return -1
        assert stream.damage is not None
        key = stream.hyper, stream.slices
        if key not in self.seen:
            self.seen[key] = self._decode(stream)
        return self.seen[key]

    def _decode(self, stream: Stream) -> int:
        try:
            (y_hat, *_), used = decoded(self.model, stream)
        except BitstreamError:
            return -1
        whole = sum(len(part.sections) == 2 for part in used.slices)
        kept = whole * self.width
        assert torch.equal(y_hat[:, :kept], self.whole[:, :kept])
        assert y_hat.isfinite().all()
        return whole


@pytest.fixture(scope="module")
def salvage(model):
    return Salvage(model)


def test_files_here_are_those_that_the_facts_are_about():
    assert (len(DATA), describe(DATA)["model_id"]) == (KNOWN["bytes"], KNOWN["model_id"])


@pytest.mark.parametrize("count", [1, 2])
def test_encoder_and_decoder_with_any_number_of_threads(model, threads, count):
    threads(count)
    assert model.id.hex() == KNOWN["model_id"]
    assert golden_file(model) == DATA
    assert integers_sha256(decode_latents(model, unpack(DATA)).y_hat) == KNOWN["integers_sha256"]


def test_versions_2_and_3(threads):
    lattice, known = drawn_model("lattice"), facts("lattice")
    data, older = (GOLDEN.with_name(f"{name}.phv").read_bytes() for name in ("lattice", "lattice_v2"))
    assert (describe(data)["version"], len(data), lattice.id.hex()) == (3, known["bytes"], known["model_id"])
    assert describe(older)["version"] == 2
    for count in (1, 2):
        threads(count)
        assert golden_file(lattice) == data
        for written in (data, older):
            assert integers_sha256(decode_latents(lattice, unpack(written)).y_hat) == known["integers_sha256"]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # torch about its own switch
def test_without_onednn_the_same_file(model):
    with torch.backends.mkldnn.flags(enabled=False):
        assert golden_file(model) == DATA


@pytest.mark.parametrize(
    ("onednn", "aten"), [("AVX2", "avx2"), pytest.param("SSE41", "default", marks=pytest.mark.slow)]
)
def test_lesser_processors_write_the_same_file(onednn, aten):
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "ATEN_CPU_CAPABILITY": aten,
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.golden.make"], env=environment, cwd=root, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == {name: facts(name) for name in MODELS}


@pytest.mark.parametrize("patterns", [(0x01, 0x80, 0xFF), pytest.param(range(1, 256), marks=pytest.mark.slow)])
def test_every_changed_byte_is_refused_or_costs_its_slice_and_those_after_it(salvage, patterns):
    payload = SECTIONS[0]["offset"]
    for position in range(len(DATA)):
        hit = next((i for i, s in enumerate(SECTIONS) if position < s["offset"] + s["bytes"]), len(SECTIONS))
        expected = -1 if position < SECTIONS[1]["offset"] else (hit - 1) // 2
        for pattern in patterns:
            damaged = flipped(position, bytes([pattern]))
            if position >= payload:  # the header's CRC has tests of its own, with the container's
                with pytest.raises(BitstreamError):
                    unpack(damaged)
            assert salvage.slices(damaged) == expected, f"byte {position} ^ {pattern:#x}"


def test_every_truncation_gives_the_slices_that_arrived(salvage):
    ends = [s["offset"] + s["bytes"] for s in SECTIONS]
    for length in range(len(DATA)):
        arrived = sum(end <= length for end in ends)
        assert salvage.slices(DATA[:length]) == (-1 if arrived == 0 else (arrived - 1) // 2), f"{length} bytes"


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_damage_that_the_crc8_misses_cuts_the_file_at_its_slice(salvage, stride):
    for i, section in enumerate(SECTIONS):
        index = (i - 1) // 2
        for position in range(section["offset"], section["offset"] + section["bytes"] - 1, stride):
            damaged = flipped(position, CRC8_KERNEL)
            damage = unpack(damaged, partial=True).damage
            assert damage is not None
            assert not damage.missing  # the container saw no more than a wrong file CRC
            # With slice 0 wrong the hyper-latent is as suspect as the slice: nothing is left to decode.
            assert salvage.slices(damaged) == (index if index > 0 else -1), f"byte {position}"


def test_a_cut_is_told_with_the_picture(model):
    position = SECTIONS[5]["offset"] + 3  # of slice 2, its anchors
    (view,) = decode_set(model, [flipped(position, CRC8_KERNEL)], partial=True)
    assert view.damage is not None
    assert view.damage.reason.startswith("wrong integers in slice 2")
    assert view.damage.missing == ("slice 2 anchor", "slice 2 non-anchor", "slice 3 anchor", "slice 3 non-anchor")
    assert view.pixels.shape == (50, 100, 3)


def test_wrong_integers_in_an_intact_file_are_never_cut_away(model):
    stream = unpack(DATA)
    wrong = Stream(stream.header, stream.hyper, (*stream.slices[:3], stream.slices[2]))
    with pytest.raises(DesyncError, match="slice 3"):
        decoded(model, wrong)
