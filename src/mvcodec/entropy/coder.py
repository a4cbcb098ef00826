"""Integers <-> bytes: the range coder behind a section; `bitstream_spec.md` specifies every bit.

    symbols, table_index -> group by table (stable) -> range coder, one run per table -> escapes -> .. -> seal

Grouping lets one native call code each run with one model (constriction 0.5: checked memory, fixed output). A section
holds one such pass or several, one after another. It is the shortest byte string, read as a binary fraction, inside the
final interval; the decoder reads zeros behind its end, so a section has no padding and no length of its own: the
container carries it.
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
    """A section of one pass: see `Encoder`."""
    encoder = Encoder()
    encoder.put(symbols, table_index, tables)
    return encoder.seal()


def decode(data: bytes, table_index: ArrayLike, tables: Tables) -> NDArray[np.int32]:
    """The symbols of a section of one pass, [N] int32.

    Every symbol sequence has one code: the decoded symbols are coded once more (a third of the time) and any
    other bytes are refused, left over, cut or rewritten.
    Raises BitstreamError for bytes that no encoder writes.
    """
    symbols, again = Decoder(data).take(table_index, tables)
    verify(data, again)
    return symbols


class Encoder:
    """A section, pass by pass."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def put(self, symbols: ArrayLike, table_index: ArrayLike, tables: Tables) -> None:
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
        self.put_sorted(values.astype(np.int32)[order], index, tables)

    def put_sorted(self, values: NDArray[np.int32], index: NDArray[np.uint16], tables: Tables) -> None:
        """Code values that already lie run after run; index in any order, only its histogram is used."""
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
            self._coder.encode(entry, tables.models[table])
        if escapes:
            _encode_escapes(self._coder, np.concatenate(escapes))

    @property
    def seen(self) -> int:
        """How many bytes of the section a decoder has looked at once it has these symbols."""
        words: int = self._coder.pos()[0]
        return 4 * (words + 2)

    def seal(self) -> bytes:
        """The section: the shortest byte string that, zeros following, lies in the final interval [low, low + span)."""
        n_words, (lower, span) = self._coder.pos()
        # get_compressed() settles the carry into the first n_words words for the point lower + 2^32 - 1.
        settled = self._coder.get_compressed()[:n_words].astype(">u4").tobytes()
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


Again = Callable[[Encoder], None]  # codes once more what has been decoded


class Decoder:
    """The passes of a section, in their order. Any bytes are safe: the number of symbols bounds time and memory."""

    def __init__(self, data: bytes) -> None:
        padded = data + bytes(-len(data) % 4)
        self._coder = stream.queue.RangeDecoder(np.frombuffer(padded, dtype=">u4").astype(np.uint32))

    def take(self, table_index: ArrayLike, tables: Tables) -> tuple[NDArray[np.int32], Again]:
        """The symbols of the next pass, [N] int32, and what codes them once more, perhaps in another thread.

        They are safe to use but not to be believed before that shows that no other bytes stand for them (`verify`).
        Raises BitstreamError for what no encoder writes.
        """
        index = _checked_index(table_index, tables)
        order = np.argsort(index, kind="stable")
        values = np.zeros(index.size, dtype=np.int32)
        escaped: list[NDArray[np.intp]] = []
        try:
            for table, start, stop in _runs(index):
                if tables.skip_first and table == 0:
                    continue
                run = self._coder.decode(tables.models[table], stop - start)
                where = np.flatnonzero(run == tables.lengths[table] - 1)
                if where.size:
                    escaped.append(where + start)
                values[start:stop] = run + np.int32(tables.offsets[table])
            if escaped:
                where = np.concatenate(escaped)
                code = _decode_escapes(self._coder, where.size)
                first = tables.offsets[index[order[where]]]
                distance = code >> 1
                values[where] = np.where(code & 1, first - 1 - distance, values[where] + distance)
        except AssertionError as error:  # constriction: the point lies in the sliver that no symbol owns
            raise BitstreamError("entropy-coded section holds a value that no encoder writes") from error
        if escaped and np.abs(values).max() > MAX_SYMBOL:
            raise BitstreamError(f"entropy-coded section holds a symbol beyond +-{MAX_SYMBOL}")
        symbols = np.empty_like(values)
        symbols[order] = values
        return symbols, partial(Encoder.put_sorted, values=values, index=index, tables=tables)


def verify(data: bytes, *passes: Again) -> None:
    """BitstreamError unless `data` is the section that these passes give."""
    encoder = Encoder()
    for again in passes:
        again(encoder)
    if encoder.seal() != data:
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
