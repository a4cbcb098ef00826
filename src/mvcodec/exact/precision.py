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
                for switch, before, exact in _switches():
                    if before in ROUNDED:
                        self.undo.callback(switch, before)
                        switch(exact)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.undo.close()


strict = Strict()


def _switches() -> Iterator[tuple[Callable[[str], None], str, str]]:
    """How each is set, what it says now, and what it says where nothing is rounded."""
    if not hasattr(torch.backends.mkldnn, "matmul"):  # before torch 2.9
        yield torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest"
        return
    for operation in (getattr(torch.backends.mkldnn, name) for name in ("conv", "matmul")):
        yield partial(setattr, operation, "fp32_precision"), operation.fp32_precision, "ieee"
