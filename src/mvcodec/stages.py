"""Times of the codec's stages, taken inside the real encode_image and decode_set.

Stages nest (the coder runs inside Para-EM); each is charged its own time alone, so that they add up. Where views are
computed beside each other, stages are those of the thread that called, and its wait for the others is one more.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch

from mvcodec import codec, cores, entropy, latents
from mvcodec.graphs import Chain
from mvcodec.weights import Model

OTHER = "other"
MODULES = {"g_a": "g_a", "h_a": "h_a", "h_s": "h_s", "para_em": "Para-EM", "para_jd": "Para-JD", "refinement": "refine"}
FUNCTIONS: list[tuple[Any, str, str]] = [
    (codec, "to_unit", "to tensor"),
    (codec, "to_image", "to picture"),
    (codec, "cleaned", "refine"),
    (codec._Cells, "draw_back", "cells"),
    (codec._Cells, "draw_back_again", "cells"),
    (codec, "pack", "container"),
    (codec, "unpack", "parse"),
    (entropy, "encode", "coder"),
    (entropy, "decode", "coder"),
    (latents, "finish", "coder"),
    (latents, "decode_sections", "coder"),
    (latents, "verify_sections", "coder"),
    (cores, "finish", "other cores"),
]


class Stopwatch:
    """Seconds per stage of one run, each stage without those inside it."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.thread = threading.get_ident()
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def start(self, stage: str) -> None:
        self._charge()
        self._open.append(stage)

    def stop(self) -> None:
        self._charge()
        self._open.pop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop()

    def _charge(self) -> None:
        """Give the time since the last event to the innermost open stage."""
        if self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(self.device)  # kernels run on after their call returns
        now = self.clock()
        if self._open:
            stage = self._open[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now


@contextmanager
def watched(model: Model, watch: Stopwatch) -> Iterator[None]:
    """Inside this block `watch` sees every stage of the codec; what belongs to none is `OTHER`."""
    stages = {getattr(model.net, attribute): stage for attribute, stage in MODULES.items()}
    replay = Chain.replay

    def replayed(chain: Chain, *inputs: Any) -> Any:
        """A graph calls no module."""
        stage = stages.get(chain.function)
        with watch.stage(stage) if stage else nullcontext():
            return replay(chain, *inputs)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Chain, "replay", replayed))
        for module, stage in stages.items():
            if module is None:
                continue

            def enter(*_: Any, name: str = stage) -> None:
                if threading.get_ident() == watch.thread:
                    watch.start(name)

            def leave(*_: Any) -> None:
                if threading.get_ident() == watch.thread:
                    watch.stop()

            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        for home, attribute, stage in FUNCTIONS:
            stack.enter_context(patch.object(home, attribute, _timed(getattr(home, attribute), stage, watch)))
        stack.enter_context(watch.stage(OTHER))
        yield


def _timed(function: Callable[..., Any], stage: str, watch: Stopwatch) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != watch.thread:  # what runs beside the codec costs no more than the wait for it
            return function(*args, **kwargs)
        with watch.stage(stage):
            return function(*args, **kwargs)

    return call
