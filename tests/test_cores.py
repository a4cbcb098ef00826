"""Work on several cores at a time: what it computes, in what order, and what it leaves behind."""

import threading
import time
from itertools import accumulate, count

import pytest
import torch

from mvcodec import codec, cores
from mvcodec.codec import decode_set
from mvcodec.cores import beside
from mvcodec.images import Image
from mvcodec.stages import Stopwatch, watched
from tests.conftest import smooth_picture

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_two_at_a_time_in_order_and_alone_where_told():
    meeting = threading.Barrier(2, timeout=60)  # passes only if two are there together

    def work(item):
        meeting.wait()
        return item, torch.get_num_threads()

    assert beside(work, range(4), CPU) == [(k, 1) for k in range(4)]
    assert torch.get_num_threads() == 2
    for how in ({"device": CPU, "most": 1}, {"device": CPU, "most": 0}, {"device": torch.device("cuda")}):
        assert beside(lambda _: threading.get_ident(), range(3), **how) == [threading.get_ident()] * 3
    assert beside(work, [], CPU) == []


@pytest.mark.usefixtures("two_threads")
def test_threads_of_others_that_begin_meanwhile_have_all_cores():
    meeting, told = threading.Barrier(2, timeout=60), []

    def work(_):
        meeting.wait()
        other = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
        other.start()
        other.join()

    beside(work, range(4), CPU)
    assert told == [2] * 4


@pytest.mark.usefixtures("two_threads")
def test_threads_know_what_their_caller_was_told():
    def told(_):
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

    assert set(beside(told, range(8), CPU)) == {(False, True, torch.float32)}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert set(beside(told, range(8), CPU)) == {(True, False, torch.bfloat16)}


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("error", [IndexError, KeyboardInterrupt])
def test_the_first_error_ends_it(error):
    done = []

    def work(item):
        if item == 1:
            raise error("one")
        done.append(item)

    with pytest.raises(error, match="one"):
        beside(work, range(1000), CPU)
    assert len(done) < 999
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_views_decoded_beside_each_other_are_the_same_views(tiny_model, monkeypatch):
    """In no layer does a thread meet what another has put there."""
    files = [
        codec.encode_image(tiny_model, Image(smooth_picture(130, 190, seed)), 20 * seed, camera_id=f"cam{seed}")
        for seed in range(5)
    ]
    for how in ({}, {"joint": False}):
        found = decode_set(tiny_model, files, **how)
        with monkeypatch.context() as patch:
            patch.setattr("mvcodec.codec.beside", lambda work, items, *_: [work(item) for item in items])
            patch.setattr("mvcodec.tiling.beside", lambda work, items, *_: [work(item) for item in items])
            one_by_one = decode_set(tiny_model, files, **how)
        for a, b in zip(found, one_by_one, strict=True):
            assert abs(a.pixels.astype(int) - b.pixels).max() <= 1  # sums in another order


@pytest.mark.usefixtures("two_threads")
def test_a_stopwatch_is_not_confused_by_other_threads(tiny_model):
    files = [
        codec.encode_image(tiny_model, Image(smooth_picture(70, 90, seed)), 50, camera_id=f"cam{seed}")
        for seed in range(4)
    ]
    watch = Stopwatch(CPU)
    began = time.perf_counter()
    with watched(tiny_model, watch):
        decode_set(tiny_model, files, joint=False)
    assert {"Para-EM", "Para-JD", "other cores"} <= set(watch.seconds)
    assert 0 < sum(watch.seconds.values()) < time.perf_counter() - began
    assert min(watch.seconds.values()) >= 0


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fastest", [1, 2])
def test_one_view_takes_the_cores_that_pay_and_puts_them_back(monkeypatch, fastest):
    """Whichever is faster just now: the threads of operations within, those after, and those of other threads."""
    monkeypatch.setattr(cores, "_fastest", lambda available: fastest)
    others: list[int] = []
    with cores.cores_that_pay():
        assert torch.get_num_threads() == fastest
        other = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert (torch.get_num_threads(), others) == (2, [2])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("slow", [1, 2])
def test_cores_that_pay_are_found_by_trying_them(monkeypatch, slow):
    """By a clock that goes faster while so many threads compute."""
    ticks = accumulate(10.0 if torch.get_num_threads() == slow else 1.0 for _ in count())
    monkeypatch.setattr(cores, "perf_counter", lambda: next(ticks))
    assert cores._fastest(2) == 3 - slow
    assert torch.get_num_threads() == 2
