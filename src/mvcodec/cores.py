"""Views beside each other on a processor's cores.

The operations of a network divide badly between cores: many are small, and large ones wait for memory. Views divide
well. So where several are to be computed, each core takes the next one and computes it alone. One that is by itself
takes all cores, if that is faster just then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from statistics import median
from threading import Thread
from time import perf_counter
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

TRIES = 5  # of each number of threads: three milliseconds together
DIVIDED, WHOLE = 1 << 19, 1 << 12  # numbers in an operation that torch divides among threads, and in one it does not


def beside(
    work: Callable[[Item], Result], items: Sequence[Item], device: torch.device, most: int | None = None
) -> list[Result]:
    """`work` of each item, in their order; on a processor several at a time: as many as torch has threads.

    most: at a time, where each needs much memory. The threads share what torch was told about gradients and precision.
    The first error ends it, once what has begun is done.
    """
    cores, threads = torch.get_num_threads(), min(len(items), at_a_time(device, most))
    if threads < 2:
        return [work(item) for item in items]
    waiting = deque(enumerate(items))
    results: dict[int, Result] = {}
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    autocast, precision = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def next_one() -> tuple[int, Item] | None:
        with suppress(IndexError):  # another thread may have taken the last
            return waiting.popleft()
        return None

    def take_turns() -> None:
        _compute_with(max(1, cores // threads), cores)
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(gradients),
            torch.autocast("cpu", precision, autocast),
        ):
            try:
                while (chosen := next_one()) is not None:
                    results[chosen[0]] = work(chosen[1])
            except BaseException:
                waiting.clear()
                raise

    try:
        with ThreadPoolExecutor(threads - 1) as others:
            running = [others.submit(take_turns) for _ in range(threads - 1)]
            take_turns()
            finish(running)
    finally:
        torch.set_num_threads(cores)
    return [results[place] for place in range(len(items))]


@contextmanager
def cores_that_pay() -> Iterator[None]:
    """Operations within are divided among all cores, or computed by this one alone: what small ones like better now.

    All threads meet after each operation. Where another program holds a core, or a core of a virtual machine is slow
    to wake, thousands of operations of some microseconds then take two or three times as long on two cores as on one.
    """
    cores = torch.get_num_threads()
    with nullcontext() if cores < 2 or _fastest(cores) > 1 else on_one_core():
        yield


@contextmanager
def on_one_core() -> Iterator[None]:
    """Operations within are computed by this thread alone."""
    cores = torch.get_num_threads()
    _compute_with(1, cores)
    try:
        yield
    finally:
        torch.set_num_threads(cores)


def _fastest(cores: int) -> int:
    """Whether one thread or `cores` of them are faster at operations as Para-EM has them, in turns."""
    large, small = (torch.zeros(n, dtype=torch.float32, device="cpu") for n in (DIVIDED, WHOLE))
    times: dict[int, list[float]] = {cores: [], 1: []}
    try:
        for _ in range(TRIES):
            for threads, taken in times.items():
                torch.set_num_threads(threads)
                began = perf_counter()
                for _ in range(3):
                    large.add_(1)
                    for _ in range(4):  # meanwhile the others wait
                        small.add_(1)
                taken.append(perf_counter() - began)
    finally:
        torch.set_num_threads(cores)
    return min(times, key=lambda threads: median(times[threads]))


def _compute_with(threads: int, others: int) -> None:
    """So many threads for the operations of this one, and `others` for those of threads that begin later.

    What torch is told holds for the thread that says so, and for all that have not asked yet.
    """
    torch.get_num_threads()
    torch.set_num_threads(threads)
    last_word = Thread(target=torch.set_num_threads, args=(others,))
    last_word.start()
    last_word.join()


def finish(running: Sequence[Future[None]]) -> None:
    """Wait for what the other cores still have to do."""
    for thread in running:
        thread.result()


def at_a_time(device: torch.device, most: int | None = None) -> int:
    """How many items `beside` computes at a time, if there are so many."""
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    return cores if most is None else max(1, min(most, cores))
