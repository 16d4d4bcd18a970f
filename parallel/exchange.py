"""Plain values between ranks: JSON, or bytes, in tensors of bytes.

Nothing that a rank sends can make another one execute anything: no object is pickled.
Every function here is collective: all ranks of the group call it, in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import UserError
from model.records import Record, as_record

LARGEST = 1 << 26
"""Bytes of the longest JSON text that one rank may send."""
LARGEST_BYTES = 1 << 31
"""Bytes of the longest block that one rank may send."""
LONGEST_WORDS = 2000
"""Characters of a problem that are told to other ranks."""

R = TypeVar("R", bound=Record)
Json = TypeVar("Json")
_KINDS: dict[str, type[Exception]] = {"UserError": UserError}


class PeerError(RuntimeError):
    """Another rank met something unexpected, and this one ends with it. The other one says more."""

    exit_code = 1
    """Of a process that ends by it."""


def is_shared(error: Exception) -> bool:
    """Whether all ranks raise this error, or what it was told as, together."""
    return isinstance(error, PeerError) or getattr(error, "shared", False)


def told_as_it_is(kind: type[Exception]) -> None:
    """From now on an exception of this kind is raised as what it is on every rank.

    The kind is made of its words alone.
    """
    _KINDS[kind.__name__] = kind


class Problem(Record):
    """What a rank met, in words. An empty `kind` means nothing."""

    kind: str = ""
    text: str = ""


def gather(value: Json, group: dist.ProcessGroup | None = None) -> list[Json]:
    """The JSON values of all ranks, in order of rank, on every rank.

    Raises ValueError for a value that is no JSON or too long.
    """
    own = json.dumps(value, allow_nan=False).encode()
    sizes = _sizes(len(own), LARGEST, group)
    buffer = torch.zeros(max(sizes), dtype=torch.uint8, device=_device(group))
    buffer[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    parts = [torch.empty_like(buffer) for _ in sizes]
    dist.all_gather(parts, buffer, group=group)
    return [json.loads(_bytes(part[:size])) for part, size in zip(parts, sizes, strict=True)]


def gather_records(value: R, group: dist.ProcessGroup | None = None) -> list[R]:
    """The records of all ranks, in order of rank, on every rank.

    Raises UserError for one that does not fit its type.
    """
    advice = "all ranks have to run the same version"
    return [
        as_record(one, type(value), f"what rank {rank} sent", advice)
        for rank, one in enumerate(gather(value.model_dump(), group))
    ]


def gather_bytes(data: bytes, group: dist.ProcessGroup | None = None) -> Iterator[bytes]:
    """The blocks of all ranks that have one, in order of rank, one after the other, on every rank.

    Exhaust it everywhere.
    Costs one broadcast a block, so that empty ones cost nothing.
    """
    sizes = _sizes(len(data), LARGEST_BYTES, group)
    for rank, size in enumerate(sizes):
        if size:
            block = torch.empty(size, dtype=torch.uint8, device=_device(group))
            if rank == dist.get_rank(group):
                block.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            dist.broadcast(block, group=group, group_src=rank)
            yield _bytes(block)


def agree(problem: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raises on every rank what the first one that has a problem met.

    There it is raised as it is, elsewhere in its words.
    """
    told = gather_records(as_problem(problem), group)
    for rank, one in enumerate(told):
        if one.kind:
            raise_told(one, rank, problem if rank == dist.get_rank(group) else None)


def as_problem(problem: Exception | None) -> Problem:
    """A problem as it is told to other ranks."""
    if problem is None:
        return Problem()
    name = next((name for name, kind in _KINDS.items() if isinstance(problem, kind)), "")
    text = " ".join(str(problem).split())[:LONGEST_WORDS]
    return (
        Problem(kind=name, text=text)
        if name
        else Problem(kind="other", text=f"{type(problem).__name__}: {text}")
    )


def raise_told(told: Problem, rank: int, own: Exception | None) -> None:
    """Raises what a rank has told. own: the exception itself, on that rank."""
    if own is not None:
        own.shared = True  # type: ignore[attr-defined]
        raise own
    kind = _KINDS.get(told.kind)
    raise kind(told.text) if kind else PeerError(f"rank {rank}: {told.text}")


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All ranks leave the block as one: where one of them fails in it, every one raises.

    The block itself must not hold collectives: a rank that fails leaves them to the others.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    agree(problem, group)


def _sizes(own: int, largest: int, group: dist.ProcessGroup | None) -> Sequence[int]:
    """The lengths of all ranks' values. Raises ValueError on every rank where one is too long."""
    sizes = [
        torch.zeros(1, dtype=torch.int64, device=_device(group)) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(sizes, torch.tensor([own], device=_device(group)), group=group)
    found = [int(size) for size in sizes]
    for rank, size in enumerate(found):
        if not 0 <= size <= largest:
            raise ValueError(
                f"rank {rank} sends {size} bytes; {largest} is the most that ranks exchange at once"
            )
    return found


def _device(group: dist.ProcessGroup | None) -> torch.device:
    """Where a group's tensors have to be."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend(group) == "nccl"
        else torch.device("cpu")
    )


def _bytes(values: Tensor) -> bytes:
    return values.cpu().numpy().tobytes()
