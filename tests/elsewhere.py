"""A GPU that is none: tensors say that they are on cuda:0, and the arithmetic is the CPU's.

    with elsewhere():
        model = load_model(path, torch.device("cuda"))  # its tensors wrap CPU tensors
        decode_set(model, files)                        # takes every branch that a GPU would

What it shows: that no operation is given tensors of both sides, which CUDA refuses; that results of the branches for
CUDA are those of the CPU; that what crosses later (pinned memory) is not read before it was waited for; and that
nothing waits for the device, or copies to or from it, where launches are recorded as a graph. There, as with CUDA,
Python does not run again, addresses stay, and what an operation gives while it is recorded is noise.

What it cannot show: limits of CUDA's own kernels (types, sizes and layouts that they lack), their rounding and cuDNN's
choices; any time or memory; an order between streams, as all work is done when it is issued; what torch's own engine
for gradients does, or its optimizers with many tensors at once. Other threads than the caller's use tensors, but cannot
bring any to the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from mvcodec.precision import bfloat16_pays

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NEEDED = ("_ensureCUDADeviceGuardSet", "_dispatch_has_kernel_for_dispatch_key", "_disabled_torch_function_impl")
NOISE = {True: 123.25, False: 77}  # of floating-point numbers and of integers

CROSSING = {"aten._to_copy.default", "aten.copy_.default"}
INDEXING = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default", "aten._index_put_impl_.default"}
TAKES_A_NUMBER = {
    "aten.fill_.Tensor",  # what `x[..] = 1` calls; of pointwise operations until torch 2.14
    "aten.masked_fill.Tensor",
    "aten.masked_fill_.Tensor",
    "aten._local_scalar_dense.default",
}
WHOLE = {"aten.narrow.default", "aten.reshape.default", "aten.flatten.using_ints", "aten.view_as.default"}  # only views
WAITS = {  # how much they give, or what they return to Python, is known when the device has done it
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.bincount.default",
    "aten._unique2.default",
    "aten.unique_dim.default",
    "aten.unique_consecutive.default",
    "aten._linalg_check_errors.default",
}


def missing() -> str | None:
    """Why this cannot be done here, if it cannot."""
    absent = [name for name in NEEDED if not hasattr(torch._C, name)]
    if absent:
        return f"torch {torch.__version__} has no {absent[0]}, by which a GPU is pretended"
    return "a GPU is there, and need not be pretended" if torch.cuda.is_available() else None


class Elsewhere(Tensor):
    """A CPU tensor that says that it is on cuda:0."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type[Elsewhere], held: Tensor) -> Elsewhere:
        # Not as an inference tensor: views of what is none are none, and torch marks them so afterwards.
        with torch._C._InferenceMode(False):
            made: Elsewhere = Tensor._make_wrapper_subclass(
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                layout=held.layout,
                device=CUDA,
            )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as what is read back with map_location="cpu"."""
        return self.held.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return MACHINE.run(func, args, kwargs or {})


class Stream:
    """A name: all work is done when it is issued."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None: ...

    def synchronize(self) -> None:
        MACHINE.arrive()


class Event:
    """What was on its way from the device when it was recorded has arrived when it was waited for."""

    def __init__(self, **_: Any) -> None:
        self.coming: list[Callable[[], Any]] = []

    def record(self, stream: Stream | None = None) -> None:
        self.coming = list(MACHINE.coming)

    def synchronize(self) -> None:
        MACHINE.arrive(self.coming)


class Graph:
    """torch.cuda.CUDAGraph: operations with the very tensors they had, repeated into the tensors they gave."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.thread = 0
        self.pool: Any = None
        self.spoilt = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if MACHINE.stream is MACHINE.default or MACHINE.recording is not None:
            raise RuntimeError("a graph is recorded on a stream of its own, and one at a time")
        if pool in MACHINE.left_open:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.thread, self.pool = threading.get_ident(), pool
        MACHINE.recording, MACHINE.generator.capturing = self, True

    def capture_end(self) -> None:
        if MACHINE.recording is not self:
            raise RuntimeError("this graph is not being recorded")
        MACHINE.recording = None
        if self.spoilt:  # CUDA says so first of all: neither pool nor random numbers learn that it is over
            MACHINE.left_open.append(self.pool)
            raise RuntimeError("operation failed due to a previous error during capture")
        MACHINE.generator.capturing = False
        for _, args, kwargs, result in self.operations:
            given = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
            for x in tensors(result):
                if x.untyped_storage().data_ptr() not in given:
                    x.fill_(NOISE[x.is_floating_point()])

    def replay(self) -> None:
        with _disable_current_modes():  # these are the CPU's own
            for func, args, kwargs, result in self.operations:
                again = func(*args, **kwargs)
                for was, now in zip(tensors(result), tensors(again), strict=True):
                    if was.data_ptr() != now.data_ptr():
                        was.copy_(now)


class Generator:
    """Of random numbers, as far as recording concerns it."""

    def __init__(self) -> None:
        self.capturing = False

    def clone_state(self) -> Generator:
        return Generator()

    def graphsafe_set_state(self, state: Generator) -> None:
        self.capturing = state.capturing


class Machine:
    """The state of the device that is none."""

    def __init__(self) -> None:
        self.default = self.stream = Stream()
        self.recording: Graph | None = None
        self.left_open: list[Any] = []  # pools of recordings that failed
        self.pools = 0
        self.generator = Generator()
        self.coming: list[Callable[[], Any]] = []  # copies that have not arrived
        self.lock = threading.Lock()

    def taped(self) -> Graph | None:
        """The graph that this thread records."""
        graph = self.recording
        return graph if graph is not None and graph.thread == threading.get_ident() else None

    def forbid(self, what: str) -> None:
        """What may not be while a graph is recorded spoils the recording."""
        if graph := self.taped():
            graph.spoilt = True
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    def pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    def arrive(self, coming: Sequence[Callable[[], Any]] | None = None) -> None:
        """Wait for the device."""
        self.forbid("it waits for the device")
        with self.lock, torch.inference_mode(), _disable_current_modes():
            for copy in list(self.coming) if coming is None else coming:
                if copy in self.coming:
                    copy()
                    self.coming.remove(copy)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation by the CPU, if the device could do it."""
        there: list[Elsewhere] = []
        here: list[Tensor] = []
        plain = tuple([_taken(x, there, here) for x in args])
        named = {name: _taken(x, there, here) for name, x in kwargs.items()}
        device = named.get("device")
        goes = bool(there) if device is None else torch.device(device).type == "cuda"
        if not there and not goes:  # the CPU's own affair
            if named.pop("pin_memory", None):
                found = func(*plain, **named)
                found.pinned = True
                return found
            return func(*plain, **named)
        graph, rule = self.taped(), rule_of(func)
        if rule.name == "aten.copy_.default":
            return self._copy(graph, func, args, plain, named)
        rule.check(args, there, here, graph is not None)
        if goes and torch.Tag.nondeterministic_seeded in func.tags and graph is None and self.generator.capturing:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if device is not None:
            named["device"] = CPU
        named.pop("pin_memory", None)
        if not goes or (rule.crossing and not there):
            self.forbid(f"{func} copies from or to the CPU")
        found = func(*plain, **named)
        if not goes:
            return found
        if graph is not None:
            graph.operations.append((func, plain, named, found))
        if rule.written:  # in place: the very tensors that were given
            given = [args[place] if place < len(args) else kwargs[name] for place, name in rule.written]
            return None if not rule.returns else given[0] if rule.returns == 1 else tuple(given)
        return Elsewhere(found) if isinstance(found, Tensor) else tree_map(_moved, found)

    def _copy(self, graph: Graph | None, func: Any, args: Any, plain: Any, named: Any) -> Any:
        """Into a given tensor, from the other side or from the same. Into pinned memory it may come later."""
        target, source = args[:2]
        if isinstance(target, Elsewhere) == isinstance(source, Elsewhere) or source.ndim == 0:
            if graph is not None:
                graph.operations.append((func, plain, named, plain[0]))
            func(*plain, **named)
            return target
        self.forbid(f"{func} crosses")
        later = named.get("non_blocking") or (len(plain) > 2 and plain[2])
        if later and isinstance(source, Elsewhere) and getattr(target, "pinned", False):
            if self.stream is not self.default:  # given back while that stream records, it would be asked about it
                raise RuntimeError("pinned memory is used on a stream that records")
            values = plain[1].clone()
            target.fill_(NOISE[target.is_floating_point()])
            self.coming.append(lambda: target.copy_(values))
        else:
            func(*plain, **named)
        return target


MACHINE = Machine()


class Rule:
    """What is to know of an operation, looked up once."""

    def __init__(self, func: Any) -> None:
        self.name = str(func)
        schema = func._schema
        self.crossing = self.name in CROSSING
        self.indexing = self.name in INDEXING
        self.waits = self.name in WAITS
        # A tensor without dimensions may be a number of the CPU's where an operation is made of numbers.
        self.number = self.crossing or self.indexing or torch.Tag.pointwise in func.tags or self.name in TAKES_A_NUMBER
        self.returns = len(schema.returns)
        self.written = [
            (place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        self.reshapes = torch.Tag.inplace_view in func.tags

    def check(self, args: Any, there: list[Elsewhere], here: list[Tensor], recording: bool) -> None:
        """RuntimeError where CUDA would have one."""
        if self.reshapes:
            raise NotImplementedError(f"{self.name}: the wrapper would keep its shape")
        if there and here and not self.crossing:
            mixed = [x for x in here if x.ndim or not self.number]
            if mixed and not (self.indexing and isinstance(args[0], Elsewhere)):
                shapes = [tuple(x.shape) for x in mixed]
                raise RuntimeError(f"Expected all tensors to be on the same device: {self.name}, on the CPU {shapes}")
        if not recording:
            return
        if self.waits or (self.indexing and self._chooses(args)):
            MACHINE.forbid(f"{self.name} waits for the device")
        if self.indexing and here:
            MACHINE.forbid(f"{self.name} fetches from the CPU")

    @staticmethod
    def _chooses(args: Any) -> bool:
        """Whether it must count what a mask picks. To put one value there is no more than a masked_fill."""
        masked = any(isinstance(x, Tensor) and x.dtype is torch.bool for x in args[1])
        return masked and (len(args) < 3 or args[2].numel() > 1)


@cache
def rule_of(func: Any) -> Rule:
    return Rule(func)


@cache
def composite(func: Any) -> bool:
    """Whether it is made of others, which are to be seen; inference mode does not take it apart."""
    return str(func) not in WHOLE and bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
    )


def tensors(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _taken(x: Any, there: list[Elsewhere], here: list[Tensor]) -> Any:
    """An argument as the CPU takes it; notes whose it was."""
    if isinstance(x, Elsewhere):
        there.append(x)
        return x.held
    if isinstance(x, Tensor):
        here.append(x)
        return x
    return [_taken(part, there, here) for part in x] if isinstance(x, (list, tuple)) else x


def _moved(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) else x


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what makes tensors and what moves them, which no tensor that is elsewhere takes part in."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is none here, and to skip it takes longer than many an operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if composite(func):
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return MACHINE.run(func, args, kwargs or {})


HANDLED = {Tensor.__getitem__, Tensor.__setitem__, Tensor.new_tensor, Tensor.tolist, torch.tensor, torch.as_tensor}


class Calls(TorchFunctionMode):
    """Sees what makes tensors of Python's numbers, or numbers of tensors, and passes every dispatch mode by."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in HANDLED:
            return func(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            index = args[1]
            parts = index if isinstance(index, tuple) else (index,)
            if any(isinstance(part, (list, np.ndarray)) for part in parts):
                moved = tuple(_sent(torch.tensor(p)) if isinstance(p, (list, np.ndarray)) else p for p in parts)
                args = (args[0], moved, *args[2:])
        elif func is Tensor.tolist:  # torch has none for wrappers
            return func(args[0].cpu())
        elif func is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return _sent(torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)))
        elif func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or CPU).type == "cuda":
            made = func(*args, **{**kwargs, "device": None})
            return made if isinstance(made, Elsewhere) else _sent(made)
        return func(*args, **kwargs)


def _sent(x: Tensor) -> Tensor:
    if MACHINE.taped():
        raise RuntimeError("operation not permitted when stream is capturing: numbers of Python's go to the device")
    return Elsewhere(x)


ENGINE = torch.autograd.graph._engine_run_backward


def backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    retain: bool,
    create: bool,
    inputs: Sequence[Any],
    *unreachable: bool,
    accumulate_grad: bool,
    **reachable: bool,
) -> tuple[Tensor | None, ...]:
    """Torch's engine refuses to work for a device that is absent: its nodes one after the other, as it would."""
    if not any(isinstance(x, Elsewhere) for x in outputs):
        options: Any = {"accumulate_grad": accumulate_grad, **reachable}
        return ENGINE(outputs, gradients, retain, create, inputs, *unreachable, **options)
    assert not create, "gradients of gradients are nothing that this can do"
    ends: list[tuple[Any, int]] = [(edge.node, edge.output_nr) for edge in map(get_gradient_edge, inputs)]
    order = _ordered([x.grad_fn for x in outputs])
    needed: set[Any] = {node for node, _ in ends}
    for node in reversed(order):
        if not ends or any(after in needed for after, _ in node.next_functions):
            needed.add(node)
    coming: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in order}
    found: dict[Any, Tensor | None] = {}
    with torch.no_grad():
        for x, gradient in zip(outputs, gradients, strict=True):
            _give(coming[x.grad_fn], x.grad_fn, x.output_nr, gradient)
        for node in order:
            given = coming.pop(node)
            found |= {end: given[end[1]] for end in ends if end[0] is node}
            if node not in needed or all(gradient is None for gradient in given):
                continue
            if type(node).__name__ == "AccumulateGrad":
                if accumulate_grad:
                    node(*given)
                continue
            call = getattr(node, "apply", node)  # of torch.autograd.Function
            result = call(*given)
            for (after, place), gradient in zip(
                node.next_functions, result if isinstance(result, tuple) else (result,), strict=False
            ):
                if after in needed and gradient is not None:
                    _give(coming[after], after, place, gradient)
    return tuple(found[end] for end in ends)


def _ordered(roots: Sequence[Any]) -> list[Any]:
    """Each node before those that it gives gradients to."""
    order, seen = [], set()
    waiting = [(root, False) for root in roots]
    while waiting:
        node, done = waiting.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            waiting.append((node, True))
            waiting += [(after, False) for after, _ in node.next_functions if after is not None]
    return order[::-1]


def _give(given: list[Tensor | None], node: Any, place: int, gradient: Tensor) -> None:
    """Add a gradient to what a node was given, in the form of what it is the gradient of."""
    wanted = node._input_metadata[place]
    if gradient.device != wanted.device:
        raise RuntimeError(f"{node.name()}: expected a gradient on {wanted.device}, but it is on {gradient.device}")
    if gradient.shape != wanted.shape:
        gradient = gradient.sum_to_size(wanted.shape)
    gradient = gradient.to(wanted.dtype)
    before = given[place]
    given[place] = gradient if before is None else before + gradient


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    before, MACHINE.stream = MACHINE.stream, stream
    try:
        yield
    finally:
        MACHINE.stream = before


def _pinned(x: Tensor, device: Any = None) -> Tensor:
    assert not isinstance(x, Elsewhere), "only the CPU's memory can be pinned"
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype).copy_(x)  # no element may stand for several


PRETENDED: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: (
        including_emulation or bfloat16_pays(torch.device("cpu"))  # which is what computes
    ),
    "torch.cuda.get_device_name": lambda device=None: "a GPU that is none",
    "torch.cuda._lazy_init": lambda: None,
    "torch.cuda.manual_seed_all": lambda seed: None,
    "torch.cuda.get_rng_state": lambda device=None: torch.zeros(0),
    "torch.cuda.set_rng_state": lambda state, device=None: None,
    "torch.cuda.synchronize": lambda device=None: MACHINE.arrive(),
    "torch.cuda.empty_cache": lambda: None,
    "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
    "torch.cuda.max_memory_reserved": lambda device=None: 0,
    "torch.cuda.Event": Event,
    "torch.cuda.Stream": Stream,
    "torch.cuda.stream": _on,
    "torch.cuda.current_stream": lambda device=None: MACHINE.stream,
    "torch.cuda.default_stream": lambda device=None: MACHINE.default,
    "torch.cuda.CUDAGraph": Graph,
    "torch.cuda.graph_pool_handle": lambda: MACHINE.pool(),
    "torch.cuda._get_generator": lambda device: MACHINE.generator,
    "torch.cuda.is_current_stream_capturing": lambda: MACHINE.taped() is not None,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
    "torch.Tensor.pin_memory": _pinned,
    "torch.autograd._engine_run_backward": backward,
}


@contextmanager
def elsewhere() -> Iterator[Machine]:
    """Inside, cuda:0 is there for this thread. What was made there may be used inside again."""
    with ExitStack() as stack:
        for name, value in PRETENDED.items():
            stack.enter_context(patch(name, value))
        torch._C._ensureCUDADeviceGuardSet()  # else there is nothing that knows how to be on a device
        # `module.to` replaces parameters, as memory cannot be exchanged beneath a wrapper.
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        stack.enter_context(Operations())  # type: ignore[no-untyped-call]
        stack.enter_context(Calls())
        yield MACHINE
