"""Integers <-> bytes: one independent range-coded section per call; `bitstream_spec.md` specifies every bit.

    symbols, table_index -> group by table (stable) -> range coder, one run per table -> escapes -> seal

Grouping lets one native call code each run with one model (constriction 0.5: checked memory, fixed output).
The section is the shortest byte string, read as a binary fraction, inside the final interval; the decoder
reads zeros behind its end, so a section has no padding and no length of its own: the container carries it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from constriction import stream
from numpy.typing import ArrayLike, NDArray

from mvcodec.entropy.tables import MAX_SYMBOL, Tables
from mvcodec.errors import BitstreamError

ESCAPE_CLASSES = 16
_CLASS = stream.model.Uniform(ESCAPE_CLASSES)  # k of an escape: 4 raw bits ...
_RAW = [None, *(stream.model.Uniform(1 << k) for k in range(1, ESCAPE_CLASSES))]  # ... then k raw bits


def encode(symbols: ArrayLike, table_index: ArrayLike, tables: Tables) -> bytes:
    """Code symbols[i] with table table_index[i].

    symbols: [N] integers, |symbol| <= 32767; table_index: [N] integers in 0 .. len(tables) - 1.
    Raises ValueError for symbols that cannot be coded, a non-zero one of a skipped table among them.
    """
    values = np.asarray(symbols)
    index = _checked_index(table_index, tables)
    if values.shape != index.shape or (values.dtype.kind not in "iu" and values.size):
        shapes = f"{values.dtype} {list(values.shape)} for table_index {list(index.shape)}"
        raise ValueError(f"symbols must be integers, one per table index, not {shapes}")
    if values.size and (int(values.min()) < -MAX_SYMBOL or int(values.max()) > MAX_SYMBOL):
        raise ValueError(f"symbols {values.min()} .. {values.max()} reach beyond +-{MAX_SYMBOL}")
    order = np.argsort(index, kind="stable")
    return _encode_sorted(values.astype(np.int32)[order], index, tables)


def _encode_sorted(values: NDArray[np.int32], index: NDArray[np.uint16], tables: Tables) -> bytes:
    """Code values that already lie run after run; index in any order, only its histogram is used."""
    encoder = stream.queue.RangeEncoder()
    escapes: list[NDArray[np.int32]] = []
    for table, start, stop in _runs(index):
        run = values[start:stop]
        if tables.skip_first and table == 0:
            if run.any():
                raise ValueError("a symbol of the skipped table 0 is not zero; the quantiser must force it")
            continue
        entry = run - np.int32(tables.offsets[table])
        escape = np.int32(tables.lengths[table] - 1)
        outside = entry.view(np.uint32) >= escape.view(np.uint32)  # negative entries wrap to large ones
        if outside.any():
            excess = entry[outside]
            escapes.append(np.where(excess < 0, -2 * excess - 1, 2 * (excess - escape)))
            entry[outside] = escape
        encoder.encode(entry, tables.models[table])
    if escapes:
        _encode_escapes(encoder, np.concatenate(escapes))
    return _seal(encoder)


def decode(data: bytes, table_index: ArrayLike, tables: Tables) -> NDArray[np.int32]:
    """The symbols of a section: bytes -> [N] int32. Any bytes are safe: N alone bounds time and memory.

    Every symbol sequence has one code: the decoded symbols are coded once more (a third of the time) and any
    other bytes are refused, left over, cut or rewritten.
    Raises BitstreamError for bytes that no encoder writes.
    """
    symbols, verify = decode_ahead(data, table_index, tables)
    verify()
    return symbols


def decode_ahead(data: bytes, table_index: ArrayLike, tables: Tables) -> tuple[NDArray[np.int32], Callable[[], None]]:
    """`decode` in two parts: the symbols, and what codes them once more, for another thread to call.

    The symbols are safe to use but not to be believed before that has returned. Either part may raise BitstreamError.
    """
    index = _checked_index(table_index, tables)
    order = np.argsort(index, kind="stable")
    padded = data + bytes(-len(data) % 4)
    decoder = stream.queue.RangeDecoder(np.frombuffer(padded, dtype=">u4").astype(np.uint32))

    values = np.zeros(index.size, dtype=np.int32)
    escaped: list[NDArray[np.intp]] = []
    try:
        for table, start, stop in _runs(index):
            if tables.skip_first and table == 0:
                continue
            run = decoder.decode(tables.models[table], stop - start)
            where = np.flatnonzero(run == tables.lengths[table] - 1)
            if where.size:
                escaped.append(where + start)
            values[start:stop] = run + np.int32(tables.offsets[table])
        if escaped:
            where = np.concatenate(escaped)
            code = _decode_escapes(decoder, where.size)
            first = tables.offsets[index[order[where]]]
            distance = code >> 1
            values[where] = np.where(code & 1, first - 1 - distance, values[where] + distance)
    except AssertionError as error:  # constriction: the point lies in the sliver that no symbol owns
        raise BitstreamError("entropy-coded section holds a value that no encoder writes") from error
    if escaped and np.abs(values).max() > MAX_SYMBOL:
        raise BitstreamError(f"entropy-coded section holds a symbol beyond +-{MAX_SYMBOL}")
    symbols = np.empty_like(values)
    symbols[order] = values
    return symbols, partial(_verify, data, values, index, tables)


def _verify(data: bytes, values: NDArray[np.int32], index: NDArray[np.uint16], tables: Tables) -> None:
    if _encode_sorted(values, index, tables) != data:
        raise BitstreamError("entropy-coded section is not the shortest code of its symbols")


def _checked_index(table_index: ArrayLike, tables: Tables) -> NDArray[np.uint16]:
    index = np.asarray(table_index)
    if index.ndim != 1 or (index.dtype.kind not in "iu" and index.size):
        raise ValueError(f"table_index must be a row of integers, not {index.dtype} {list(index.shape)}")
    if index.size and not (int(index.min()) >= 0 and int(index.max()) < len(tables)):
        raise ValueError(f"table indexes {index.min()} .. {index.max()} do not fit {len(tables)} tables")
    return index.astype(np.uint16)


def _runs(index: NDArray[np.uint16]) -> Iterator[tuple[int, int, int]]:
    """(table, start, stop) of each non-empty run in the sorted order."""
    stops = np.cumsum(np.bincount(index))
    start = 0
    for table, stop in enumerate(stops.tolist()):
        if stop > start:
            yield table, start, stop
        start = stop


def _encode_escapes(encoder: stream.queue.RangeEncoder, code: NDArray[np.int32]) -> None:
    """Elias gamma in two parts, code + 1 = 2^k + rest, rest < 2^k: all k, then the rests of k = 1, 2, ..."""
    k = (np.frexp((code + 1).astype(np.float64))[1] - 1).astype(np.int32)
    encoder.encode(k, _CLASS)
    for bits in range(1, ESCAPE_CLASSES):
        rest = (code + 1)[k == bits] - np.int32(1 << bits)
        if rest.size:
            encoder.encode(rest.astype(np.int32), _RAW[bits])


def _decode_escapes(decoder: stream.queue.RangeDecoder, n: int) -> NDArray[np.int32]:
    k = decoder.decode(_CLASS, n)
    code = np.zeros(n, dtype=np.int32)
    for bits in range(1, ESCAPE_CLASSES):
        where = np.flatnonzero(k == bits)
        if where.size:
            code[where] = decoder.decode(_RAW[bits], where.size) + np.int32((1 << bits) - 1)
    return code


def _seal(encoder: stream.queue.RangeEncoder) -> bytes:
    """The shortest byte string that, zeros following, lies in the final interval [low, low + span)."""
    n_words, (lower, span) = encoder.pos()
    # get_compressed() settles the carry into the first n_words words for the point lower + 2^32 - 1.
    settled = encoder.get_compressed()[:n_words].astype(">u4").tobytes()
    point = (1 << 32) - 1
    low = (int.from_bytes(settled, "big") << 64) + ((lower + point) % (1 << 64)) - point
    code = low
    for drop in range(4, 9):  # span >= 2^32: four bytes can always go
        rounded = -(-low >> 8 * drop) << 8 * drop
        if rounded >= low + span:
            break
        code = rounded
    sealed: bytes = code.to_bytes(len(settled) + 8, "big")
    return sealed.rstrip(b"\0")
