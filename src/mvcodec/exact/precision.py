"""Float32 that means float32.

torch has switches that let a processor round the operands of float32 sums for speed, and trainers like to use them:
`torch.set_float32_matmul_precision("medium")` makes bfloat16 of those of matrix products, and so of the convolutions
that torch computes as such. Sums are exact no more then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch

from mvcodec.errors import DesyncError

ROUNDED = ("bf16", "tf32", "medium", "high")  # what switches say that let operands be rounded


class Switch(NamedTuple):
    set: Callable[[str], None]
    says: str
    before: str  # what to set it to again: "none" where it says what a switch above it was told
    exact: str


def _switches() -> Iterator[Switch]:
    every = torch.backends.mkldnn
    if not hasattr(every, "matmul"):  # before torch 2.9
        says = torch.get_float32_matmul_precision()
        yield Switch(torch.set_float32_matmul_precision, says, says, "highest")
        return
    for operation in (getattr(every, name) for name in ("conv", "matmul")):
        says = operation.fp32_precision
        before = "none" if says == getattr(every, "fp32_precision", None) else says
        yield Switch(partial(setattr, operation, "fp32_precision"), says, before, "ieee")


class Strict:
    """A block in which float32 is float32, whatever torch was told before.

    The switches are the process's: the first thread that comes in sets them, the last that leaves puts them back.
    Raises DesyncError in the end if another thread has meanwhile told torch to round, unless it took that back as well.
    """

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.before: list[str | None] = []  # of each switch that was set

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                switches = list(_switches())
                self.before = [switch.before if switch.says in ROUNDED else None for switch in switches]
                for switch, before in zip(switches, self.before, strict=True):
                    if before is not None:
                        switch.set(switch.exact)
            self.inside += 1

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            switches = list(_switches())
            if not self.inside:
                for switch, before in zip(switches, self.before, strict=True):
                    if before is not None and switch.says == switch.exact:
                        switch.set(before)
        if error is None and any(switch.says in ROUNDED for switch in switches):
            raise DesyncError("another thread told torch to round float32 sums meanwhile; try again")


strict = Strict()
