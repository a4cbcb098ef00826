"""Reading ahead keeps order and errors, and never runs further ahead than one."""

from __future__ import annotations

import threading

import pytest

from mvcodec.cli.ahead import ahead
from mvcodec.errors import PictureError


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_results_come_in_order(count: int) -> None:
    assert [wait() for wait in ahead(lambda n: n * n, range(count))] == [n * n for n in range(count)]


def test_an_error_is_raised_where_its_result_is_wanted() -> None:
    def work(n: int) -> int:
        if n == 1:
            raise PictureError("bad")
        return n

    waits = ahead(work, range(3))
    assert next(waits)() == 0
    bad = next(waits)
    with pytest.raises(PictureError):
        bad()
    assert next(waits)() == 2


def test_one_item_is_worked_on_ahead_and_no_more() -> None:
    begun = [threading.Event() for _ in range(4)]
    waits = ahead(lambda n: begun[n].set(), range(4))
    next(waits)()
    assert begun[1].wait(10)
    assert not begun[2].is_set()
