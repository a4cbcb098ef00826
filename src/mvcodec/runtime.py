"""What a process of mvcodec asks of the system's libraries: threads that sleep, and memory that stays.

For a program that owns its process, as the `mvcodec` command does, and before torch is imported there:

    from mvcodec.runtime import prepare
    prepare()

Results do not depend on it; speed on a processor does. What the environment already says is left alone.
"""

import ctypes
import os
from contextlib import suppress

# Threads that spin for long while they wait for each other take six times as long on a machine that does anything else,
# and so do cameras' computers; threads that sleep at once make the thousands of small operations of Para-EM slower on
# two cores than on one. A spin of a tenth of a millisecond or so is enough for those; where something else holds a
# core they are better off with one thread, which `cores.cores_that_pay` finds out.
THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}

# To give the process a map of a megapixel, page by page, takes as long as to compute it. glibc's malloc shall keep
# what is freed in pieces of up to KEPT bytes, the first of them that its version takes, until STAYS have come together.
KEPT, STAYS = (64 << 20, 32 << 20), 512 << 20
GIVEN_BACK = 4 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def prepare() -> None:
    """Settings of threads and memory for this process. Nothing happens where the C library is not glibc."""
    for name, value in THREADS.items():
        os.environ.setdefault(name, value)
    _keep(KEPT, STAYS)


def give_back() -> None:
    """What is kept, and from here on what is freed, goes back to the system: for a process that has a budget."""
    _keep((GIVEN_BACK,), 2 * GIVEN_BACK)
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _keep(pieces: tuple[int, ...], together: int) -> None:
    """Pieces of so many bytes, the first of these sizes that glibc takes, until so many have come together."""
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version  # others have a mallopt that means nothing
        if any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in pieces):
            libc.mallopt(M_TRIM_THRESHOLD, together)
