"""Integers in, the shortest bytes out, and back; any other bytes are refused and nothing crashes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mvcodec.entropy import SIGMAS, Tables, counts_from_pmf, decode, encode, gaussian_tables
from mvcodec.entropy.tables import MAX_SYMBOL, TOTAL
from mvcodec.errors import BitstreamError
from tests import spec_reader

GAUSSIAN = gaussian_tables()
NARROW = Tables([100, 65000, 400, 36], [4], [-1])  # values -1, 0, 1 and the escape
SKEWED = Tables([1, 65535, 65535, 1, 32768, 32768], [2, 2, 2], [0, 0, 0])


def plain(tables: Tables) -> list[spec_reader.Table]:
    rows = np.split(tables.counts, np.cumsum(tables.lengths)[:-1])
    return [spec_reader.Table(int(o), row.tolist()) for o, row in zip(tables.offsets, rows, strict=True)]


def latents(seed: int, n: int, highest: int = 63) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Gaussian symbols with heavy tails, so that all tables and some escapes occur."""
    r = np.random.default_rng(seed)
    index = r.integers(0, highest + 1, n).astype(np.uint8)
    symbols = np.rint(r.standard_t(4, n) * SIGMAS[index]).clip(-MAX_SYMBOL, MAX_SYMBOL).astype(np.int32)
    symbols[index == 0] = 0
    return symbols, index


symbol = st.one_of(st.integers(-3, 3), st.integers(-MAX_SYMBOL, MAX_SYMBOL))


@given(st.lists(st.tuples(symbol, st.integers(0, 2))), st.sampled_from([NARROW, SKEWED]))
def test_round_trip(pairs: list[tuple[int, int]], tables: Tables) -> None:
    symbols = np.array([s for s, _ in pairs], dtype=np.int32)
    index = np.array([t % len(tables) for _, t in pairs], dtype=np.int32)
    assert (decode(encode(symbols, index, tables), index, tables) == symbols).all()


@pytest.mark.parametrize("n", [0, 1, 2, 3, 17, 1000, 30_000])
def test_round_trip_of_latents(n: int) -> None:
    symbols, index = latents(n, n)
    decoded = decode(encode(symbols, index, GAUSSIAN), index, GAUSSIAN)
    assert decoded.dtype == np.int32
    assert (decoded == symbols).all()


@given(st.lists(st.tuples(symbol, st.integers(0, 2)), max_size=60), st.sampled_from([NARROW, SKEWED]))
def test_reader_written_from_the_specification_agrees(pairs: list[tuple[int, int]], tables: Tables) -> None:
    symbols = [s for s, _ in pairs]
    index = [t % len(tables) for _, t in pairs]
    section = encode(np.array(symbols, dtype=np.int32), np.array(index, dtype=np.int32), tables)
    assert spec_reader.decode_section(section, index, plain(tables), skip_first=False) == symbols


def test_reader_written_from_the_specification_reads_latents() -> None:
    symbols, index = latents(1, 1500)
    section = encode(symbols, index, GAUSSIAN)
    decoded = spec_reader.decode_section(section, index.tolist(), plain(GAUSSIAN), skip_first=True)
    assert decoded == symbols.tolist()


@pytest.mark.parametrize("point", ["80", "8001", "40", "bf", "777777777777777777777778"])
def test_carries_run_through_any_number_of_words(point: str) -> None:
    """Symbols read from one point keep it inside the interval, so a carry into it stays open to the last."""
    flat = Tables([4369] * 15 + [1], [16], [-7])
    around = spec_reader.decode_section(bytes.fromhex(point), [0] * 60, plain(flat), skip_first=False)
    runs = set()
    for n in range(1, 60):
        for last in range(-7, 8):
            symbols = np.array([*around[: n - 1], last], dtype=np.int32)
            section = encode(symbols, np.zeros_like(symbols), flat)
            assert (decode(section, np.zeros_like(symbols), flat) == symbols).all()
            assert spec_reader.decode_section(section, [0] * n, plain(flat), False) == symbols.tolist()
            runs.add(section.count(b"\xff\xff\xff\xff"))
            runs.add(-section.count(b"\0\0\0\0"))
    assert max(runs) >= 4, "a carry of four words stayed open and did not come"
    assert min(runs) <= -4, "and one that came"


@pytest.mark.parametrize(
    ("symbols", "golden"),
    [
        ([], ""),
        ([0], "01"),
        ([-1] * 9, ""),  # the lower end of the interval stays 0
        ([1] * 9, "ffdbc7678cf9cadbbf"),
        ([0, 1, -1, 0, 7, -3], "fc9c2ad0e466e5"),  # the example of the specification
        ([MAX_SYMBOL, -MAX_SYMBOL], "fffffffffaf7cfb0"),
    ],
)
def test_exact_bytes(symbols: list[int], golden: str) -> None:
    values = np.array(symbols, dtype=np.int32)
    assert encode(values, np.zeros_like(values), NARROW).hex() == golden


def test_exact_bytes_of_latents() -> None:
    """Integers from a fixed formula through fixed tables: no generator, no erf between us and the bytes."""
    pmf = np.array([[1, 2, 4, 8, 16, 8, 4, 2, 1], [8, 8, 8, 8, 8, 8, 8, 0, 0]]) / 64
    tables = Tables(counts_from_pmf(pmf).ravel(), [10, 10], [-4, -4])
    i = np.arange(64)
    symbols = (i * i * 7 + i) % 11 - 5
    golden = "e98f70119ae9e78124f9669cbcfae9cf398646f80b529eec3257278fe7fc92ece3ef51177efa8b3f480eeeeeeeee65"
    assert encode(symbols, i % 2, tables).hex() == golden


def interval(entries: list[tuple[int, int]]) -> tuple[int, int, int]:
    """Section 6.4 of the specification, with integers of any size: low, high, exponent of their unit."""
    low, span, exponent = 0, 2**64 - 1, 64
    for left, right in entries:
        scale = span >> 24
        low, span = low + scale * left, scale * (right - left)
        if span < 2**32:
            low, span, exponent = low << 32, span << 32, exponent + 32
    return low, low + span, exponent


@given(st.lists(st.integers(-1, 1), max_size=200))
def test_section_is_the_shortest_string_of_its_interval_and_then_the_smallest(
    symbols: list[int],
) -> None:
    edges = [256 * int(c) for c in np.concatenate([[0], np.cumsum(NARROW.counts)])]
    low, high, exponent = interval([(edges[s + 1], edges[s + 2]) for s in symbols])
    section = encode(np.array(symbols, dtype=np.int32), np.zeros(len(symbols), dtype=np.int32), NARROW)
    unit = 1 << exponent - 8 * len(section)  # of the section's last byte
    value = int.from_bytes(section, "big") * unit
    assert low <= value < high
    assert value - unit < low, "a smaller string of this length lies in the interval"
    if section:
        shorter = -(-low // (256 * unit)) * 256 * unit
        assert shorter >= high, "a shorter string lies in the interval"


def test_size_is_the_information_content() -> None:
    """10 kB payload: within 0.3 % and a byte of -sum log2 p."""
    symbols, index = latents(2, 40_000, highest=30)
    start = np.cumsum(GAUSSIAN.lengths) - GAUSSIAN.lengths
    entry = symbols - GAUSSIAN.offsets[index]
    inside = (entry >= 0) & (entry < GAUSSIAN.lengths[index] - 1) & (index > 0)
    symbols[~inside] = 0
    entry = symbols - GAUSSIAN.offsets[index]
    counts = GAUSSIAN.counts[(start[index] + entry)[index > 0]]
    ideal_bytes = -np.log2(counts / TOTAL).sum() / 8
    section = encode(symbols, index, GAUSSIAN)
    assert 8_000 < len(section) < 14_000
    assert ideal_bytes <= len(section) <= 1.003 * ideal_bytes + 1


def test_lowest_sigma_is_not_coded() -> None:
    symbols, index = np.zeros(1000, dtype=np.int32), np.zeros(1000, dtype=np.uint8)
    assert encode(symbols, index, GAUSSIAN) == b""
    assert not decode(b"", index, GAUSSIAN).any()
    symbols[5] = 1
    with pytest.raises(ValueError, match="skipped table 0"):
        encode(symbols, index, GAUSSIAN)
    with pytest.raises(BitstreamError, match="shortest"):
        decode(b"\x01", index, GAUSSIAN)


def test_one_table_per_channel_beyond_256() -> None:
    """The hyper-latent has up to 320 channels: indexes are not bytes, and table 0 is coded."""
    r = np.random.default_rng(3)
    counts = counts_from_pmf(r.dirichlet(np.ones(9), size=320) * 0.999)
    tables = Tables(counts.ravel(), [10] * 320, [-4] * 320)
    index = np.repeat(np.arange(320), 6)
    symbols = r.integers(-6, 7, index.size)
    assert (decode(encode(symbols, index, tables), index, tables) == symbols).all()


def test_order_of_equal_tables_is_kept_and_dtype_does_not_matter() -> None:
    symbols, index = latents(4, 500)
    section = encode(symbols, index, GAUSSIAN)
    for kind in (np.int16, np.int64):
        assert encode(symbols.astype(kind), index.astype(kind), GAUSSIAN) == section


@pytest.mark.parametrize(
    ("symbols", "index", "message"),
    [
        ([0.5], [0], "integers"),
        ([0, 1], [0], "one per table index"),
        ([MAX_SYMBOL + 1], [0], "beyond"),
        ([-MAX_SYMBOL - 1], [0], "beyond"),
        ([0], [1], "do not fit 1 tables"),
        ([0], [-1], "do not fit 1 tables"),
        ([0], [0.0], "row of integers"),
        ([[0]], [[0]], "row of integers"),
    ],
)
def test_what_cannot_be_coded_is_a_programming_error(symbols: list[int], index: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(np.array(symbols), np.array(index), NARROW)


def test_any_other_bytes_are_refused_or_other_symbols() -> None:
    """One code per symbol sequence: no other bytes decode to the same symbols, left-overs never pass."""
    symbols, index = latents(5, 300, highest=25)
    section = encode(symbols, index, GAUSSIAN)
    variants = [
        section + b"\0",
        section + b"\1",
        section + bytes(8),
        section[:-1],
        section[1:],
        b"",
        b"\xff" * 99,
    ]
    variants += [section[:i] + bytes([section[i] ^ 1 << i % 8]) + section[i + 1 :] for i in range(len(section))]
    refused = 0
    for changed in variants:
        try:
            decoded = decode(changed, index, GAUSSIAN)
        except BitstreamError:
            refused += 1
        else:
            assert not (decoded == symbols).all()
    assert refused > len(variants) // 2
    for tail in (b"\0", b"\1", bytes(8), b"abc"):
        with pytest.raises(BitstreamError, match="shortest"):
            decode(section + tail, index, GAUSSIAN)


@given(st.binary(max_size=80))
def test_random_bytes_never_do_more_than_raise(data: bytes) -> None:
    _, index = latents(6, 100)
    for tables, numbers in ((GAUSSIAN, index), (NARROW, index * 0), (SKEWED, index % 3)):
        try:
            symbols = decode(data, numbers, tables)
        except BitstreamError:
            continue
        assert encode(symbols, numbers, tables) == data


def test_escape_beyond_the_cap_is_refused() -> None:
    """The same bytes mean 32767 above a table that ends at 0 and 32802 above one that ends at 35."""
    counts, one = [65000, *[1] * 35, 501], np.zeros(1, dtype=np.int32)
    section = encode(np.array([MAX_SYMBOL]), one, Tables(counts, [37], [-35]))
    with pytest.raises(BitstreamError, match="beyond"):
        decode(section, one, Tables(counts, [37], [0]))


def test_fuzz_in_a_process_of_its_own() -> None:
    """A native crash would take the test run with it; here it would be a return code."""
    program = """
        import random, numpy as np
        from mvcodec.entropy import decode, gaussian_tables
        from mvcodec.errors import BitstreamError
        tables, rng = gaussian_tables(), random.Random(0)
        index = np.arange(4096, dtype=np.uint8) % 64
        for _ in range(300):
            data = rng.randbytes(rng.choice([0, 1, 3, 4, 8, 100, 5000]))
            try:
                decode(data, index[: rng.randrange(4096)], tables)
            except BitstreamError:
                pass
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
