"""CUDA graphs on a machine without a GPU: what they may and may not keep of Python.

They run with the operators of the CPU.
As on a GPU, nothing is computed during a capture.
A replay repeats the recorded operators on the recorded memory.
No Python of the captured code runs again.
So a program whose steps hang on new tensors, or on what its Python does in each step,
gives wrong numbers here as it would there.
Not imitated are asynchrony, kernels that choose by hardware,
and calls that CUDA refuses during a capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph.

    captures, replays: counts over all graphs since `emulated` began.
    """

    captures = 0
    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._remember(func, args, kwargs)
        result = func(*args, **kwargs)
        read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        self.own |= {_storage(tensor) for tensor in _tensors(result)} - read
        self.operators.append((func, args, kwargs, result))
        return result

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
        Graph.captures += 1

    def reset(self) -> None:
        """Nothing is left to replay."""
        self.operators.clear()

    def replay(self) -> None:
        """The recorded operators, their results into the recorded memory."""
        assert self.operators
        Graph.replays += 1
        with torch._C._AutoDispatchBelowAutograd():  # where they were recorded
            for func, args, kwargs, result in self.operators:
                read = {_storage(tensor) for tensor in _tensors((args, kwargs))}
                for recorded, new in zip(_tensors(result), _tensors(func(*args, **kwargs)), strict=True):
                    if _storage(recorded) not in read:
                        recorded.copy_(new)


class _Capture(contextlib.AbstractContextManager):  # type: ignore[type-arg]
    """Stands in for torch.cuda.graph."""

    def __init__(self, cuda_graph: Graph, *, stream: Any, capture_error_mode: str) -> None:
        assert isinstance(stream, _Stream)
        assert capture_error_mode == "thread_local"
        self.graph = cuda_graph

    def __enter__(self) -> None:
        self.graph.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.graph.__exit__(*error)
        with torch.no_grad():
            self.graph.undo()


class _Stream:
    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream)
        assert other is not self


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
    saved = {name: getattr(torch.cuda, name) for name in changes}
    Graph.captures = Graph.replays = 0
    for name, change in changes.items():
        setattr(torch.cuda, name, change)
    try:
        yield Graph
    finally:
        for name, original in saved.items():
            setattr(torch.cuda, name, original)
