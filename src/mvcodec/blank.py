"""A network without values, whose parameters are about to be read from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from mvcodec.errors import ModelError

_MAKERS = {"empty", "zeros", "ones", "full"}


class Uninitialised(TorchFunctionMode):
    """Modules made in this block have parameters of any value, in memory that nothing has touched.

    most: numbers that they may hold in all; ModelError beyond, before much is allocated. Not torch's "meta" device: its
    initialisers and its arithmetic are Python, over a second of it to import.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.left = most

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        made = function(*args, **kwargs)
        if getattr(function, "__name__", None) in _MAKERS:
            self.left -= made.numel()
            if self.left < 0:
                raise ModelError("its networks would be far larger than what it holds")
        return made
