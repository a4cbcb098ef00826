"""Work that waits for a disk or a picture library, done in a thread while the network computes."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(work: Callable[[T], R], items: Sequence[T]) -> Iterator[Callable[[], R]]:
    """For each item, in order, what waits for work(item) and returns its result or raises its error.

    The next item is worked on while the caller deals with this one, and none further: two results are held at most.
    A lone item is worked on in the caller's own thread, where Ctrl-C reaches it.
    """
    if len(items) == 1:
        yield functools.partial(work, items[0])
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming: deque[Future[R]] = deque()
        for item in items:
            coming.append(thread.submit(work, item))
            if len(coming) > 1:
                yield coming.popleft().result
        if coming:
            yield coming.popleft().result
