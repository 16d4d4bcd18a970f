"""CUDA graphs on a machine without a GPU: what they may and may not keep of Python.

They run with the operators of the CPU.
As on a GPU, nothing is computed during a capture.
A replay repeats the recorded operators on the recorded memory.
No Python of the captured code runs again.
What draws random numbers draws new ones in every replay, from the stream it was captured with,
and a capture draws none: it may use the default stream, and those that are registered,
and may not read the state of any.
So a program whose steps hang on new tensors, or on what its Python does in each step,
gives wrong numbers here as it would there.
Not imitated are asynchrony, kernels that choose by hardware,
and calls that CUDA refuses during a capture.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings, random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from parallel.launch.cpu import enable


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class State:
    """Stands in for the state of a CUDA generator, which the generator may have for a while."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def manual_seed(self, seed: int) -> None:
        """Begins its stream anew."""
        self.value = torch.Generator().manual_seed(seed).get_state()

    def get_state(self) -> Tensor:
        """A copy, as bytes."""
        return self.value.clone()

    def set_state(self, value: Tensor) -> None:
        """Goes on from a copy."""
        self.value = value.clone()


class Streams:
    """The CPU's generator in the place of a CUDA device's default generator."""

    def __init__(self) -> None:
        self.default = self.present = State(torch.get_rng_state())
        self.capturing = False

    def get(self, device: object = None, clone: bool = False, graph_safe: bool = False) -> Any:
        """Stands in for Megatron-core's `_get_cuda_rng_state`."""
        self._check(graph_safe)
        self.present.value = torch.get_rng_state()
        if not graph_safe:
            return self.present.get_state()
        return State(self.present.get_state()) if clone else self.present

    def set(self, state: Any, device: object = None, graph_safe: bool = False) -> None:
        """Stands in for Megatron-core's `_set_cuda_rng_state`."""
        self._check(graph_safe)
        self.present.value = torch.get_rng_state()
        if graph_safe:
            self.present = state
        else:
            self.present.value = state.clone()
        torch.set_rng_state(self.present.value)

    def _check(self, graph_safe: bool) -> None:
        if self.capturing and not graph_safe:
            raise RuntimeError("cannot read or set a generator's state during a capture")


STREAMS = Streams()


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph.

    captures, replays: counts over all graphs since `emulated` began.
    """

    captures = 0
    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any, State]] = []
        self.registered = [STREAMS.default]
        self.states: list[Tensor] = []
        self.own: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._remember(func, args, kwargs)
        drawn_from = STREAMS.present
        if torch.Tag.nondeterministic_seeded in func.tags and drawn_from not in self.registered:
            raise RuntimeError("a generator draws that the graph has not registered")
        result = func(*args, **kwargs)
        read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self.own |= {_storage(tensor) for tensor in _tensors(result)} - read
        # A graph knows addresses: a tensor may be given other memory after the operator.
        seen = tree_map_only(Tensor, lambda tensor: tensor.detach(), (args, kwargs, result))
        self.operators.append((func, *seen, drawn_from))
        return result

    def register_generator_state(self, state: State) -> None:
        """Lets operators draw from it."""
        self.registered.append(state)

    def begin(self) -> None:
        """A capture begins."""
        STREAMS.present.value = torch.get_rng_state()
        self.states = [state.get_state() for state in self.registered]
        STREAMS.capturing = True

    def _remember(self, func: Any, args: Any, kwargs: Any) -> None:
        """Copies what an operator is about to change and the capture did not make."""
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(args[index] if index < len(args) else kwargs.get(argument.name)):
                if _storage(tensor) not in self.own and _storage(tensor) not in self.before:
                    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
                    self.before[_storage(tensor)] = (whole, whole.clone())

    def undo(self) -> None:
        """Nothing of a capture has been computed."""
        for whole, copy in self.before.values():
            whole.copy_(copy)
        self.before.clear()
        for state, value in zip(self.registered, self.states, strict=True):
            state.set_state(value)
        torch.set_rng_state(STREAMS.present.value)
        STREAMS.capturing = False
        Graph.captures += 1

    def reset(self) -> None:
        """Nothing is left to replay."""
        self.operators.clear()

    def replay(self) -> None:
        """The recorded operators, their results into the recorded memory."""
        assert self.operators
        Graph.replays += 1
        before, begun = STREAMS.present, _Begun()
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for func, args, kwargs, result, drawn_from in self.operators:
                if drawn_from is not STREAMS.present:
                    STREAMS.set(drawn_from, graph_safe=True)
                read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
                begun.wait(read)
                given = func(*args, **kwargs)
                begun.note(read, given)
                for recorded, new in zip(_tensors(result), _tensors(given), strict=True):
                    if _storage(recorded) not in read:
                        recorded.copy_(new)
        begun.wait(set(begun.works))
        STREAMS.set(before, graph_safe=True)


class _Begun:
    """Messages under way, by the memory that they read or write."""

    def __init__(self) -> None:
        self.works: defaultdict[int, list[Any]] = defaultdict(list)

    def note(self, memory: set[int], given: Any) -> None:
        """What an operator on this memory has given, of which some may be under way."""
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.ScriptObject):
                for storage in memory:
                    self.works[storage].append(leaf)

    def wait(self, memory: set[int]) -> None:
        """Lets messages that touch this memory arrive."""
        for storage in memory & set(self.works):
            for work in self.works.pop(storage):
                work.wait()


class _Capture(contextlib.AbstractContextManager):  # type: ignore[type-arg]
    """Stands in for torch.cuda.graph."""

    def __init__(self, cuda_graph: Graph, *, stream: Any, capture_error_mode: str) -> None:
        assert isinstance(stream, _Stream)
        assert capture_error_mode == "thread_local"
        self.graph = cuda_graph

    def __enter__(self) -> None:
        self.graph.begin()
        self.graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        with torch.no_grad():
            self.graph.undo()


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)
        assert other is not self


def _synchronize(*args: Any) -> None:
    if STREAMS.capturing:
        raise RuntimeError("the host cannot wait for a device during a capture")


class _Done:
    def wait(self) -> None:
        """Nothing to wait for."""


def _reduce_scatter(
    output: Tensor, input: Tensor, group: Any = None, async_op: bool = False, **more: Any
) -> _Done | None:
    """What gloo does: it sums everything and copies its piece.

    It copies when somebody waits, outside of what a capture sees.
    """
    whole = input.clone()
    dist.all_reduce(whole, group=group)
    output.copy_(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)].view_as(output))
    return _Done() if async_op else None


@contextlib.contextmanager
def emulated() -> Iterator[type[Graph]]:
    """Inside it, torch.cuda's graphs and streams are the imitation."""
    main = _Stream()
    changes: dict[str, Callable[..., Any]] = {
        "CUDAGraph": Graph,
        "graph": _Capture,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: main,
    }
    enable()
    Graph.captures = Graph.replays = 0
    STREAMS.__init__()  # type: ignore[misc]
    core: Any = random
    host = torch.get_rng_state()
    with ExitStack() as stack:
        for name, change in changes.items():
            stack.enter_context(patch.object(torch.cuda, name, change))
        # Megatron-core saves and restores the host's stream too, which is another one.
        for owner, name, change in (
            (core, "_get_cuda_rng_state", STREAMS.get),
            (core, "_set_cuda_rng_state", STREAMS.set),
            (core.torch, "get_rng_state", lambda: host),
            (core.torch, "set_rng_state", lambda state: None),
            (core.torch.cuda, "CUDAGraph", Graph),
            (core.torch.cuda, "synchronize", _synchronize),
            (dist, "reduce_scatter_tensor", _reduce_scatter),
            (mappings, "dist_reduce_scatter_func", _reduce_scatter),
            (layers, "dist_reduce_scatter_func", _reduce_scatter),
            # As they were, afterwards.
            (core, "_CUDA_RNG_STATE_TRACKER", core._CUDA_RNG_STATE_TRACKER),
            (core, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", core._CUDA_RNG_STATE_TRACKER_INITIALIZED),
        ):
            stack.enter_context(patch.object(owner, name, change))
        yield Graph
