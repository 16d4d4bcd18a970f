"""Which elements of which parameters this process owns, in the engine's flat optimizer state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.names import NamedParameter
from parallel.checkpoint.format import Fragment
from parallel.engine import Engine
from parallel.gradients import Kind


def owned_fragments(engine: Engine) -> Iterator[tuple[NamedParameter, Fragment]]:
    """All pieces of this process's optimizer state with the parameters they belong to."""
    for index, (group, buffer) in enumerate(zip(engine.groups, engine.buffers, strict=True)):
        first = int(buffer.partition.storage_offset() - buffer.flat.storage_offset())
        last = first + buffer.partition.numel()
        for named, view in zip(group.parameters, buffer.views, strict=True):
            begin = int(view.storage_offset() - buffer.flat.storage_offset())
            low, high = max(begin, first), min(begin + view.numel(), last)
            if low < high:
                yield named, Fragment(named.name, index, low - first, low - begin, high - low, tuple(view.shape), named.shard)


def is_writer(engine: Engine, group: int) -> bool:
    """Whether this process writes a group: one copy of replicated parameters is enough, and the tied copy is the embedding's."""
    topology = engine.topology
    if not engine.zero and topology.data_rank:
        return False
    kind = engine.groups[group].kind
    if kind in (Kind.REPLICATED, Kind.SEQUENCE):
        return topology.tensor_rank == 0
    return kind is not Kind.TIED or topology.first_stage


def flat_state(engine: Engine, group: int, *, create: bool = False) -> dict[str, Tensor]:
    """fp32 master weights and Adam moments of a group's partition, each [n], by kind.

    Under ZeRO these are the optimizer's own tensors; at stage 0 they are gathered copies. create: make zero moments where no step was taken yet.
    """
    if engine.zero:
        flat = engine.optimizer.single_partition_of_fp32_groups[group]
        state = engine.optimizer.optimizer.state[flat]
        if create and not state:
            state.update(step=torch.zeros((), dtype=torch.float32), exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat))
        return {"master": flat.detach(), **{kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}}
    states = [engine.optimizer.state[named.parameter] for named in engine.groups[group].parameters]
    gathered: dict[str, Any] = {"master": [named.parameter.detach() for named in engine.groups[group].parameters]}
    if all(states):
        gathered |= {kind: [state[kind] for state in states] for kind in ("exp_avg", "exp_avg_sq")}
    return {kind: torch.cat([tensor.flatten() for tensor in tensors]) for kind, tensors in gathered.items()}


def set_state(engine: Engine, group: int, values: dict[str, Tensor], step: int) -> None:
    """Puts a group's flat master weights and moments [n] into the optimizer, and the number of steps Adam has taken."""
    if engine.zero:
        target = flat_state(engine, group, create=True)
        for kind, value in values.items():
            target[kind].copy_(value)
        flat = engine.optimizer.single_partition_of_fp32_groups[group]
        engine.optimizer.optimizer.state[flat]["step"] = torch.full_like(engine.optimizer.optimizer.state[flat]["step"], float(step))
        return
    for named, view in zip(engine.groups[group].parameters, engine.buffers[group].views, strict=True):
        start = view.storage_offset()
        piece = {kind: value[start : start + view.numel()].view_as(view) for kind, value in values.items()}
        named.parameter.data.copy_(piece["master"])
        if "exp_avg" in piece:
            state = engine.optimizer.state[named.parameter]
            state["step"] = torch.tensor(float(step))
            state["exp_avg"], state["exp_avg_sq"] = piece["exp_avg"].clone(), piece["exp_avg_sq"].clone()
