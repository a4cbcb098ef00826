"""Float32 that means float32.

torch has switches that let a processor round the operands of float32 sums for speed, and trainers like to use them:
`torch.set_float32_matmul_precision("medium")` makes bfloat16 of those of matrix products, and so of the convolutions
that torch computes as such. Sums are exact no more then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch

ROUNDED = ("bf16", "tf32", "medium", "high")  # what switches say that let operands be rounded


class Strict:
    """A block in which float32 is float32, whatever torch was told.

    The switches are the process's: the first thread that comes in sets them, the last that leaves puts them back.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.undo = Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                for switch in _switches():
                    if switch.says in ROUNDED:
                        self.undo.callback(switch.set, switch.before)
                        switch.set(switch.exact)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.undo.close()


strict = Strict()


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
