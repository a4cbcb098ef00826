"""Networks and alignment on a GPU as CUDA graphs: thousands of launches, recorded once for each shape, then replayed.

A walk through the entropy model stops for the coder at every step. It is recorded as a chain of graphs, cut there:

    inputs --[graph 0]--> (mu, ln sigma) --coder--> y_hat of step 0 --[graph 1]--> ... --[graph n]--> output

So is alignment, where the host solves a small problem (nn/epipolar.py); between its graphs the host decides.
The first call of a shape runs as always: who codes one picture pays for nothing. The second runs once for nothing on
the stream where recording follows it, the warm-up that recording asks for, without the coder: pinned memory that had
been used on that stream must not be given back while it records. Then, and in all further calls, it is replayed.
Recording executes nothing and has no result to lose: where it fails, that network goes on as always, and `refused`
says why. Graphs launch the very kernels that would be launched one by one: no integer can change.

All graphs share one pool of memory (those after a recording that failed another one), which is sound because each
replay's results are copied out before the next begins and all replay on one stream. Graphs are kept for good, so many
of them at most: PyTorch frees cuBLAS's workspace of a stream with any graph recorded there (its issue 193402), so that
none may go before the others.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Code = Callable[[int, Tensor, Tensor], Tensor]  # as para_em.CodeStep: what it returns has the second argument's shape
Key = tuple[Any, ...]
MOST = 64  # chains: about four sizes of pictures, coded and decoded jointly
REMEMBERED = 256  # shapes that were seen once


class Recorder(Protocol):
    """How launches are recorded: `CudaRecorder`, or in tests something that runs on a CPU."""

    def ready(self) -> bool:
        """Whether the current thread is where replays may be issued."""

    def beside(self) -> AbstractContextManager[None]:
        """What runs inside warms up for what is recorded inside."""

    def begin(self) -> None:
        """From here on nothing is executed."""

    def end(self) -> Callable[[], None]:
        """What was issued since `begin`, to be executed as often as one likes."""

    def abandon(self, before: Sequence[Link]) -> None:
        """Instead of `end`, after an error; may be called where nothing has begun. before: links that no one needs."""


class CudaRecorder:
    """torch.cuda.CUDAGraph on a stream of its own, which is also that of the warm-up."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed: list[Callable[[], None]] = []  # kept, with their graphs: see the module's docstring

    def ready(self) -> bool:
        """On the device's default stream alone: replays on several would meet in the shared memory."""
        return bool(torch.cuda.current_stream(self.device) == torch.cuda.default_stream(self.device))

    @contextmanager
    def beside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)  # also for memory that was freed while work on it was still to come
        with torch.cuda.stream(self.stream):
            yield
        here.wait_stream(self.stream)

    def begin(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Threads of the coder and of a caller may use the device meanwhile.
        self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        assert self.graph is not None
        self.graph.capture_end()
        graph, self.graph = self.graph, None
        return graph.replay

    def abandon(self, before: Sequence[Link]) -> None:
        self.failed += [link.replay for link in before]
        if self.graph is not None:
            try:
                self.graph.capture_end()
            except RuntimeError:  # before it told the memory pool and the random numbers that recording is over
                self.pool = torch.cuda.graph_pool_handle()
                generator = torch.cuda._get_generator(self.device)
                generator.graphsafe_set_state(generator.clone_state())
            self.failed.append(self.graph.replay)
            self.graph = None


class Link(NamedTuple):
    """Up to one call of `code`: what is executed before it, what it is told, and where its answer is put."""

    replay: Callable[[], None]
    step: int
    told: tuple[Tensor, Tensor]
    answer: Tensor


class Chain:
    """A function recorded at one shape."""

    def __init__(self, recorder: Recorder, function: Callable[..., Any], inputs: tuple[Any, ...], pauses: bool) -> None:
        """To be called inside `recorder.beside`, after the function has run there."""
        self.function = function
        self.inputs = _each(torch.zeros_like, inputs)
        self.links: list[Link] = []

        def cut(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
            replay = recorder.end()
            self.links.append(Link(replay, step, (mu, ln_sigma), torch.zeros_like(mu)))
            recorder.begin()
            return self.links[-1].answer

        try:
            recorder.begin()
            self.output = function(*self.inputs, *([cut] if pauses else []))
            self.last = recorder.end()
        except BaseException:
            recorder.abandon(self.links)
            raise

    def replay(self, inputs: tuple[Any, ...], code: Code | None) -> Any:
        """The function of these inputs, in tensors of its own."""
        for held, x in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            held.copy_(x)
        for link in self.links:
            link.replay()
            assert code is not None
            link.answer.copy_(code(link.step, *link.told))
        self.last()
        return _each(Tensor.clone, self.output)


class Graphs:
    """Calls functions of tensors, in graphs where that pays. Without a recorder, as on a CPU, always as they are."""

    def __init__(self, recorder: Recorder | None = None, most: int = MOST) -> None:
        self.recorder = recorder
        self.most = most
        self.replays: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self._chains: dict[Key, Chain] = {}
        self._seen: OrderedDict[Key, None] = OrderedDict()
        self._busy = threading.Lock()

    def __call__(self, function: Callable[..., Any], *inputs: Any, code: Code | None = None) -> Any:
        """function(*inputs), or function(*inputs, code) if it asks for values on its way.

        inputs, and what the function returns: tensors, tuples of such, or what is always the same for a shape.
        The function does the same whatever its tensors hold, and nothing waits for the device in it. `code` keeps
        none of the tensors it is given. Outside inference mode nothing is recorded.
        """
        recorder = self.recorder
        if recorder is None or not torch.is_inference_mode_enabled() or not recorder.ready():
            return _plain(function, inputs, code)
        if not self._busy.acquire(blocking=False):  # another thread is at it
            return _plain(function, inputs, code)
        try:
            return self._call(recorder, function, inputs, code)
        finally:
            self._busy.release()

    def _call(
        self, recorder: Recorder, function: Callable[..., Any], inputs: tuple[Any, ...], code: Code | None
    ) -> Any:
        key = function, torch.is_autocast_enabled("cuda"), _each(lambda x: (x.shape, x.stride(), x.dtype), inputs)
        if (chain := self._chains.get(key)) is None:
            chain = self._recorded(recorder, key, function, inputs, code)
        if chain is None:
            return _plain(function, inputs, code)
        self.replays[_name(function)] += 1
        return chain.replay(inputs, code)

    def _recorded(
        self, recorder: Recorder, key: Key, function: Callable[..., Any], inputs: tuple[Any, ...], code: Code | None
    ) -> Chain | None:
        """Where the shape has been seen before, and recording it is possible."""
        if _name(function) in self.refused or len(self._chains) >= self.most:
            return None
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
            return None
        del self._seen[key]
        try:
            with recorder.beside():
                _plain(function, inputs, code and _no_code)
                self._chains[key] = Chain(recorder, function, inputs, code is not None)
        except Exception as error:  # whatever it is: what is called for goes on as always, or meets it again
            sentence = (str(error).splitlines() or [""])[0]
            self.refused[_name(function)] = f"{type(error).__name__}: {sentence}"
        return self._chains.get(key)

    def up_to(self, most: int, pixels: int) -> Graphs:
        """Itself, or for more pixels than that none: what is large keeps a GPU busy, and would hold much memory."""
        return self if pixels <= most else PLAIN

    @contextmanager
    def off(self) -> Iterator[None]:
        """For a block that must see every module run, or compares."""
        recorder, self.recorder = self.recorder, None
        try:
            yield
        finally:
            self.recorder = recorder

    def state(self) -> dict[str, Any] | None:
        """For reports: how many chains of what are recorded, how often they were replayed, what was refused and why."""
        if self.recorder is None:
            return None
        recorded = Counter(_name(chain.function) for chain in self._chains.values())
        return {"recorded": dict(recorded), "replayed": dict(self.replays), "refused": dict(self.refused)}


PLAIN = Graphs()


def graphs_on(device: torch.device) -> Graphs:
    """For a model on this device."""
    return Graphs(CudaRecorder(device)) if device.type == "cuda" else PLAIN


def _plain(function: Callable[..., Any], inputs: tuple[Any, ...], code: Code | None) -> Any:
    return function(*inputs) if code is None else function(*inputs, code)


def _no_code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
    """In the coder's place."""
    return torch.zeros_like(mu)


def _each(of: Callable[[Tensor], Any], value: Any) -> Any:
    """The same tuples of what `of` makes of their tensors."""
    if isinstance(value, Tensor):
        return of(value)
    if not isinstance(value, tuple):
        return value
    parts = (_each(of, x) for x in value)
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(found.append, value)
    return found


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)
