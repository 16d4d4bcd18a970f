"""Which elements of which parameters this process owns, in the engine's flat optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.parameters.names import NamedParameter
from parallel.checkpoint.format import Fragment
from parallel.engine.engine import Engine
from parallel.engine.gradients import Kind


def owned_fragments(engine: Engine) -> Iterator[tuple[NamedParameter, Fragment]]:
    """All pieces of this process's optimizer state with the parameters they belong to."""
    for index, buffer in enumerate(engine.buffers):
        for named, offset, start, length, shape in buffer.pieces():
            yield named, Fragment(named.name, index, offset, start, length, shape, named.shard)


def is_writer(engine: Engine, group: int) -> bool:
    """Whether this process writes a group.

    One copy of replicated parameters is enough, and the tied copy is the embedding's.
    """
    topology = engine.topology
    if not engine.zero and topology.replica_rank:
        return False
    kind = engine.groups[group].kind
    if kind in (Kind.REPLICATED, Kind.SEQUENCE):
        return topology.tensor_rank == 0
    return kind is not Kind.TIED or topology.first_stage


def moments(engine: Engine, group: int) -> tuple[str, ...]:
    """Kinds of tensors that the optimizer of a group keeps besides the weights."""
    return engine.groups[group].update.states


def flat_state(engine: Engine, group: int, *, create: bool = False) -> dict[str, Tensor]:
    """fp32 master weights and the optimizer's moments of a group's partition, each [n], by kind.

    Under ZeRO these are the optimizer's own tensors; at stage 0 they are gathered copies.
    create: make zero moments where no step was taken yet.
    """
    kinds = moments(engine, group)
    if engine.zero:
        flat = engine.masters[group]
        state = engine.optimizer.optimizer.state[flat]
        if create and not state:
            state.update(
                step=_step_count(engine.optimizer.optimizer, group, flat, 0),
                **{kind: torch.zeros_like(flat) for kind in kinds},
            )
        return {"master": flat.detach(), **{kind: state[kind] for kind in kinds if kind in state}}
    states = [engine.optimizer.state[named.parameter] for named in engine.groups[group].parameters]
    gathered: dict[str, list[Tensor]] = {
        "master": [named.parameter.detach() for named in engine.groups[group].parameters]
    }
    if all(states):
        gathered |= {kind: [state[kind] for state in states] for kind in kinds}
    return {kind: torch.cat([tensor.flatten() for tensor in tensors]) for kind, tensors in gathered.items()}


def set_state(
    engine: Engine, group: int, kinds: Sequence[str], fill: Callable[[str, Tensor], None], step: int
) -> None:
    """Sets master weights, moments and the number of steps the optimizer has taken.

    kinds: what was saved, "master" among them; of it what the group's optimizer keeps is read.
    fill: writes a group's flat values of one kind into a CPU tensor [n].
    """
    target = flat_state(engine, group, create=True)
    kept = moments(engine, group)
    kinds = [kind for kind in kinds if kind == "master" or kind in kept]
    direct = engine.zero and not target["master"].is_cuda
    values = {
        kind: target[kind] if direct else torch.zeros_like(target["master"], device="cpu") for kind in kinds
    }
    for kind, value in values.items():
        fill(kind, value)
        if engine.zero and not direct:
            target[kind].copy_(value)
    if engine.zero:
        flat = engine.masters[group]
        engine.optimizer.optimizer.state[flat]["step"] = _step_count(
            engine.optimizer.optimizer, group, flat, step
        )
        return
    for named, start, _, length, shape in engine.buffers[group].pieces():
        piece = {kind: value[start : start + length].view(shape) for kind, value in values.items()}
        named.parameter.data.copy_(piece["master"])
        if len(piece) > 1:
            state = engine.optimizer.state[named.parameter]
            state["step"] = _step_count(engine.optimizer, group, named.parameter, step)
            for kind in kinds[1:]:
                state[kind] = piece[kind].to(named.parameter.device, copy=True)


def _step_count(optimizer: torch.optim.Optimizer, group: int, parameter: Tensor, step: int) -> Tensor:
    """Adam's step counter: on the parameter's device for fused kernels, else on the CPU."""
    on_device = optimizer.param_groups[group].get("fused") or optimizer.param_groups[group].get("capturable")
    return torch.tensor(float(step), device=parameter.device if on_device else "cpu")
