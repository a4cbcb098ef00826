"""SIGTERM, which service managers and queues send before they kill, ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[Callable[[], bool]]:
    """Inside the `with` SIGTERM comes as SIGINT: cleaning up, and what lets Ctrl-C wait, need to know but one of them.

    Gives a function that says whether SIGTERM came. Whoever ignores it or handles it already is left alone.
    """
    came = False

    def terminate(*_: object) -> None:
        nonlocal came
        came = True
        signal.raise_signal(signal.SIGINT)

    def interrupt(*_: object) -> None:  # where Ctrl-C is ignored, as in a shell's background
        if came:
            raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()  # others may not ask
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield lambda: False
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGINT, before)
