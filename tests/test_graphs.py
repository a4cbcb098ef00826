"""Graphs replay what was recorded: what a CPU can show of it. `Tape` stands in for CUDA and keeps to its rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvcodec import codec, tiling
from mvcodec.codec import decode_set, encode_image
from mvcodec.graphs import PLAIN, Graphs, Link, graphs_on
from mvcodec.images import Image
from mvcodec.stages import Stopwatch, watched
from tests.conftest import smooth_picture


class Tape(TorchDispatchMode):
    """A recorder for CPUs: operations with the very tensors they had, repeated into the tensors they gave.

    As with CUDA, Python is not run again, addresses stay, and while recording nothing is computed that counts: results
    are overwritten with noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.open = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def ready(self) -> bool:
        return True

    def beside(self) -> Any:
        return nullcontext()

    def begin(self) -> None:
        assert not self.open
        self.open = True
        self.operations = []
        self.__enter__()

    def end(self) -> Callable[[], None]:
        self.abandon([])
        recorded = self.operations
        fresh = [x for _, args, kwargs, result in recorded for x in tensors(result) if not shares(x, (args, kwargs))]
        for x in fresh:
            if x.is_floating_point():
                x.fill_(123.25)

        @torch.autocast("cpu", enabled=False)  # what was cast is recorded as such
        def replay() -> None:
            for operation, args, kwargs, result in recorded:
                again = operation(*args, **kwargs)
                for was, now in zip(tensors(result), tensors(again), strict=True):
                    if was.data_ptr() != now.data_ptr():
                        was.copy_(now)

        return replay

    def abandon(self, before: Sequence[Link]) -> None:
        if self.open:
            self.open = False
            self.__exit__(None, None, None)


def tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def shares(x: Tensor, others: Any) -> bool:
    """Whether x lies in the memory of one of the others."""
    return x.untyped_storage().data_ptr() in [other.untyped_storage().data_ptr() for other in tensors(others)]


class Twice(nn.Module):
    """Asks for a value on its way, and counts how often Python ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, code: Callable[..., Tensor]) -> Tensor:
        self.calls += 1
        first = code(0, x + 1, x)
        return first * 10 + code(1, first + x, x)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def answers(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
    return 100 * step + mu


def test_a_shape_is_recorded_in_its_second_call_and_replayed_from_then_on() -> None:
    graphs, module = Graphs(Tape()), Twice()
    for n in range(5):
        x = torch.full((2, 3), float(n))
        assert torch.equal(graphs(module, x, code=answers), Twice()(x, answers))
    assert module.calls == 3  # once, once more, and once for the recording
    assert graphs.state() == {"recorded": {"Twice": 1}, "replayed": {"Twice": 4}, "refused": {}}
    graphs(module, torch.zeros(2, 4), code=answers)
    graphs(module, torch.zeros(2, 3, dtype=torch.float64), code=answers)
    graphs(module, torch.zeros(3, 2).T, code=answers)
    assert module.calls == 6  # another shape, type or order in memory is another key


class Pair(NamedTuple):
    first: Tensor
    rest: tuple[Tensor, ...]


def turned_round(pair: Pair, times: int, nothing: None) -> tuple[Pair, Tensor]:
    assert nothing is None
    return Pair(pair.rest[0] * times, (pair.first,)), sum(pair.rest, pair.first)


def test_tuples_of_tensors_go_in_and_come_out_and_constants_are_part_of_what_is_recorded() -> None:
    graphs = Graphs(Tape())
    for n in range(5):
        for times in (2, 3):
            given = Pair(torch.full((2,), 1.0 * n), (torch.ones(3, 1), torch.zeros(3, 1)))
            found, wanted = graphs(turned_round, given, times, None), turned_round(given, times, None)
            assert isinstance(found[0], Pair)
            assert all(torch.equal(x, y) for x, y in zip(tensors(found), tensors(wanted), strict=True))
    assert graphs.state()["recorded"] == {"turned_round": 2}
    assert graphs.state()["replayed"] == {"turned_round": 8}
    graphs(turned_round, Pair(torch.ones(2), (torch.ones(3, 1),)), 2, None)  # one tensor less is another key
    assert graphs.state()["replayed"] == {"turned_round": 8}


def test_results_are_the_callers_own() -> None:
    graphs = Graphs(Tape())
    relu = nn.ReLU()
    results = [graphs(relu, torch.full((3,), 1.0 * n)) for n in range(5)]
    assert [x[0].item() for x in results] == [0, 1, 2, 3, 4]  # none was overwritten by the next


def test_no_more_than_so_many_are_kept() -> None:
    graphs, module = Graphs(Tape(), most=2), Twice()
    for size in (1, 2, 3, 1, 2, 3, 1, 2, 3):
        graphs(module, torch.ones(size), code=answers)
    assert graphs.state()["recorded"] == {"Twice": 2}
    assert graphs.state()["replayed"] == {"Twice": 4}


def test_many_sizes_that_come_once_are_forgotten_one_by_one() -> None:
    graphs = Graphs(Tape())
    relu = nn.ReLU()
    with patch("mvcodec.graphs.REMEMBERED", 3):
        for size in (*range(1, 9), 1, 1):
            graphs(relu, torch.ones(size))
    assert graphs.state()["recorded"] == {"ReLU": 1}


def test_where_recording_fails_the_result_is_there_and_the_reason_is_told() -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if tape.open:  # what a GPU says to `if x.any():`
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")
            return x + 1

    tape, looks = Tape(), Looks()
    graphs = Graphs(tape)
    assert [graphs(looks, torch.full((2,), 1.0 * n))[0].item() for n in range(4)] == [1, 2, 3, 4]
    assert graphs.state()["refused"] == {"Looks": "RuntimeError: operation not permitted when stream is capturing"}
    assert not tape.open
    relu = nn.ReLU()
    assert [graphs(relu, torch.full((2,), 1.0 * n))[0].item() for n in range(4)] == [0, 1, 2, 3]
    assert graphs.state()["replayed"] == {"ReLU": 3}  # others are recorded as before


def test_what_is_asked_for_on_the_way_is_asked_once_for_each_call_recording_or_not() -> None:
    graphs, module = Graphs(Tape()), Twice()
    asked: list[int] = []

    def code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
        asked.append(step)
        return mu

    for _ in range(3):
        graphs(module, torch.ones(2), code=code)
    assert asked == [0, 1] * 3


def test_another_thread_or_gradients_go_without() -> None:
    graphs, module = Graphs(Tape()), Twice()

    def nested(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
        graphs(module, mu, code=answers)  # as another thread would, while the first is in a replay
        return mu

    for _ in range(3):
        graphs(module, torch.ones(2), code=nested)
    assert graphs.state()["replayed"] == {"Twice": 2}
    with torch.inference_mode(False):
        module.calls = 0
        graphs(module, torch.ones(2), code=answers)
        assert module.calls == 1


def test_on_a_cpu_there_are_none() -> None:
    assert graphs_on(torch.device("cpu")) is PLAIN
    assert PLAIN.state() is None


@pytest.fixture
def taped(tiny_model: Any) -> Any:
    return replace(tiny_model, graphs=Graphs(Tape()))


def picture(seed: int, height: int = 70, width: int = 100) -> Image:
    return Image(smooth_picture(height, width, seed))


def test_replayed_files_and_pictures_are_those_of_the_networks(tiny_model: Any, taped: Any) -> None:
    """Encoding and decoding, alone and together, each picture another and at another quality."""
    for n in range(4):
        files = [encode_image(tiny_model, picture(k), 20 + 15 * n + k, camera_id=str(k)) for k in (n, n + 1)]
        assert [encode_image(taped, picture(k), 20 + 15 * n + k, camera_id=str(k)) for k in (n, n + 1)] == files
        for given in (files, files[:1]):
            found, wanted = (decode_set(model, given) for model in (taped, tiny_model))
            for view, other in zip(found, wanted, strict=True):
                assert (view.pixels == other.pixels).all()
    state = taped.graphs.state()
    assert not state["refused"]
    assert state["recorded"]["ParaEM"] == 2  # walks of one view, encoder's and decoder's, and of two
    recorded = {"KltAnalysis", "HyperAnalysis", "HyperSynthesis", "KltSynthesisCoarse", "AlignedRefinement.clean"}
    recorded |= {"_prepare", "_meeting", "_refined", "_settled"}  # of alignment
    assert recorded < set(state["replayed"])


def test_no_graphs_within_a_budget_or_for_tiles_or_large_walks(taped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = encode_image(taped, picture(0), 50)
    for _ in range(3):
        encode_image(taped, picture(0), 50, max_memory=1 << 31)
        decode_set(taped, [file], max_memory=1 << 31)
    assert not taped.graphs.state()["recorded"]
    monkeypatch.setattr(codec, "pixels_at_once", lambda *_, **__: 64 * 64)
    monkeypatch.setattr("mvcodec.latents.USUAL", 64 * 64)
    for _ in range(3):
        decode_set(taped, [encode_image(taped, picture(0), 50)])
    assert not taped.graphs.state()["recorded"]
    assert tiling.USUAL > 2 * 1920 * 1080


def test_stages_are_seen_in_replays(taped: Any) -> None:
    files = [encode_image(taped, picture(k), 50, camera_id=str(k)) for k in range(2)]
    stages = []
    for _ in range(3):
        watch = Stopwatch(torch.device("cpu"))
        with watched(taped, watch):
            decode_set(taped, files)
            encode_image(taped, picture(0), 50)
        stages.append(set(watch.seconds))
    assert taped.graphs.state()["replayed"]["ParaEM"]
    assert stages[0] == stages[1] == stages[2]
