"""Between symbols and the bytes of a file: passes in their order, one payload or, in older files, a section for each.

Writer:    z, pass, pass, ... -> payload, and how many slices are in it
reader_of: stream -> z, pass, pass, ...; zeros for what is lost
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mvcodec import entropy
from mvcodec.container import FIRST, VERSIONS, Stream, pass_names, sections_of
from mvcodec.errors import BitstreamError
from mvcodec.transfers import Fetched
from mvcodec.weights import Model

Tables = NDArray[np.int32]  # numbers of tables, one for each symbol
# Symbols, and what raises BitstreamError where other bytes would stand for them.
Pass = tuple[NDArray[np.int32], Callable[[], None]]


class Writer:
    """The payload of a file: z, then slice 0 and all up to the last that holds a symbol other than zero."""

    def __init__(self, model: Model) -> None:
        self.model, self.encoder = model, entropy.Encoder()
        self.coded = 1  # slices to be written
        self.zeros: list[tuple[int, NDArray[np.int16]]] = []  # passes since: their slices and tables

    def hyper(self, coming: Fetched, tables: Tables) -> None:
        self.encoder.put(coming.wait().ravel(), tables, self.model.hyper)

    def step(self, index: int, coming: Fetched) -> None:
        """The next pass, of slice `index`: symbols and tables."""
        symbols, tables = coming.wait().reshape(2, -1)
        if symbols.any():
            self.coded = index + 1
            self._put_zeros()
            self.encoder.put(symbols, tables, self.model.gaussian)
        else:
            self.zeros.append((index, tables))

    def finish(self) -> tuple[bytes, int]:
        """The payload, and how many slices it holds."""
        self._put_zeros()
        return self.encoder.seal(), self.coded

    def _put_zeros(self) -> None:
        """Those of slices that are to be written."""
        for index, tables in self.zeros:
            if index < self.coded:
                self.encoder.put(np.zeros_like(tables), tables, self.model.gaussian)
        self.zeros.clear()


class Reader(Protocol):
    """The symbols of one file, asked for in coding order."""

    stream: Stream  # whose damage says what turned out to be missing
    checked: int  # checks that the file has
    whole: int  # slices whose integers are to be right

    def hyper(self, tables: Tables) -> NDArray[np.int32]:
        """Those of z. BitstreamError if they cannot be had."""

    def holds(self, step: int) -> bool:
        """Whether the file has this pass of y."""

    def take(self, step: int, tables: Tables) -> Pass:
        """A pass of y, zeros where it turns out to be lost."""

    def wrong(self) -> BitstreamError | None:
        """What is wrong with the file though all its integers are right, once all passes have been verified."""


def reader_of(model: Model, stream: Stream) -> Reader:
    """Raises BitstreamError where the model writes no such file."""
    return (_Payload if stream.version == VERSIONS[-1] else _Sections)(model, stream)


class _Payload:
    """Symbols of a file of version 3: one section, pass after pass."""

    def __init__(self, model: Model, stream: Stream) -> None:
        self.model, self.stream, config = model, stream, model.net.config
        if len(stream.slices) > config.slices:
            raise BitstreamError(f"file has {len(stream.slices)} slices where the model has {config.slices}")
        self.checked = len(stream.slices)
        self.passes = [config.passes_of(i) for i in range(config.slices)]
        self.decoder, self.again = entropy.Decoder(stream.first), entropy.Encoder()
        self.truncated = stream.damage is not None and FIRST[stream.version] in stream.damage.missing
        self.whole = len(stream.slices) if stream.kept is None else stream.kept  # slices whose integers are to be right
        self.known = sum(self.passes[: self.whole])  # passes that are to be had
        self.last = -1  # of them that holds anything

    def hyper(self, tables: Tables) -> NDArray[np.int32]:
        found, again = self.decoder.take(tables, self.model.hyper)
        again(self.again)
        if not self._arrived():
            raise BitstreamError("truncated inside the hyper-latent")
        return found

    def holds(self, step: int) -> bool:
        return step < self.known

    def take(self, step: int, tables: Tables) -> Pass:
        if self.truncated:
            return self._take_if_arrived(step, tables), lambda: None
        found, again = self.decoder.take(tables, self.model.gaussian)
        if found.any():
            self.last = step
        return found, partial(again, self.again)

    def _take_if_arrived(self, step: int, tables: Tables) -> NDArray[np.int32]:
        """The same of a truncated file; what did not arrive is zero."""
        with suppress(BitstreamError):
            found, again = self.decoder.take(tables, self.model.gaussian)
            again(self.again)
            if self._arrived():
                return found
        self.known, ends = step, np.cumsum(self.passes)
        self.whole = int((ends <= step).sum())
        lost = tuple(chain(*pass_names(self.passes)))[step:]
        assert self.stream.damage is not None
        self.stream = replace(self.stream, damage=replace(self.stream.damage, missing=lost))
        return np.zeros_like(tables)

    def _arrived(self) -> bool:
        """Whether all that the decoder has looked at is in what there is of the payload."""
        return not self.truncated or self.again.seen <= len(self.stream.first)

    def wrong(self) -> BitstreamError | None:
        """What is wrong with the file though all its integers are right."""
        if self.stream.damage is not None:
            return None
        if self.again.seal() != self.stream.first:
            return BitstreamError("the payload is not the shortest code of its symbols")
        if self.last < sum(self.passes[: len(self.stream.slices) - 1]) and len(self.stream.slices) > 1:
            return BitstreamError("the last slice of the file holds nothing")
        return None


class _Sections:
    """Symbols of a file of version 1 or 2: a section for each pass."""

    def __init__(self, model: Model, stream: Stream) -> None:
        self.model, self.stream = model, stream
        config = model.net.config
        passes = [config.passes_of(i) for i in range(config.slices)]
        found = [len(part.sections) for part in stream.slices]
        if len(found) > config.slices or (len(found) < config.slices and stream.damage is None):
            raise BitstreamError(f"file has {len(found)} slices where the model has {config.slices}")
        if sections_of(stream.version, 0) != passes[0]:
            raise BitstreamError(f"file is of version {stream.version}, which this model does not write")
        self.checked = config.slices
        self.sections = [section for part in stream.slices for section in part.sections]
        self.whole = sum(there == all_ for there, all_ in zip(found, passes, strict=False))

    def hyper(self, tables: Tables) -> NDArray[np.int32]:
        return entropy.decode(self.stream.first, tables, self.model.hyper)

    def holds(self, step: int) -> bool:
        return step < len(self.sections)

    def take(self, step: int, tables: Tables) -> Pass:
        section = self.sections[step]
        found, again = entropy.Decoder(section).take(tables, self.model.gaussian)
        return found, partial(entropy.verify, section, again)

    def wrong(self) -> None:
        """Nothing that `take` would not have found."""
