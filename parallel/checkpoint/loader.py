"""Loading a checkpoint into an engine of any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import UserError
from model.parameters.names import NamedParameter
from model.parameters.shards import full_shape
from parallel.checkpoint.format import STATE_KINDS, Fragment
from parallel.checkpoint.fragments import owned_fragments, set_state
from parallel.checkpoint.random_state import rng_states, set_rng_states
from parallel.checkpoint.reader import CheckpointReader, Run
from parallel.engine.engine import Engine
from parallel.exchange import together


def check_model(reader: CheckpointReader, parameters: Sequence[NamedParameter]) -> None:
    """Raises UserError where a checkpoint lacks a parameter of the model.

    Also where it has the parameter in another shape.
    """
    for named in parameters:
        wanted = full_shape(named.shape, named.shard)
        found = reader.shape(named.name)
        if wanted != found:
            raise UserError(
                f"{reader.folder}: {named.name} has shape {list(found)}, "
                f"the configured model needs {list(wanted)}"
            )


def check_optimizer(reader: CheckpointReader, engine: Engine) -> None:
    """Raises UserError when a checkpoint's moments are another optimizer's."""
    saved = reader.sections.optimizer.kind
    wanted = engine.options.optimizer
    if saved != wanted:
        raise UserError(
            f"{reader.folder} was written with optimizer.kind={saved}, "
            f"whose moments optimizer.kind={wanted} cannot go on from: set optimizer.kind={saved}"
        )


def load(engine: Engine, reader: CheckpointReader) -> bool:
    """Puts weights, moments and, on an unchanged layout, random states into an engine. Collective.

    Returns whether the random states were restored.
    Raises on every process what any of them met:
    UserError for damage or another model, before anything is changed.
    """
    with together():
        check_model(reader, engine.parameters)
        check_optimizer(reader, engine)
        reader.verify(sorted(reader.manifest.files)[dist.get_rank() :: dist.get_world_size()])
    reader.trust()
    with together():
        _read_state(engine, reader)
        saved = _same_streams(engine, reader)
    if engine.topology.layout.zero == 3:
        engine.weights_from_masters()
    if saved:
        set_rng_states(saved)
    return bool(saved)


def _read_state(engine: Engine, reader: CheckpointReader) -> None:
    """This process's weights and moments."""
    kinds = STATE_KINDS if reader.trained else STATE_KINDS[:1]
    with torch.no_grad():
        for named in engine.parameters if engine.topology.layout.zero < 3 else ():
            shape = named.parameter.shape
            named.parameter.copy_(
                reader.part(named.name, "master", named.shard, 0, shape.numel()).view(shape)
            )
    by_group: dict[int, list[Fragment]] = defaultdict(list)
    for _, fragment in owned_fragments(engine):
        by_group[fragment.group].append(fragment)
    for group in range(len(engine.groups)):
        set_state(engine, group, kinds, _filler(reader, by_group[group]), reader.progress.optimizer_step)


def _same_streams(engine: Engine, reader: CheckpointReader) -> dict[str, Tensor]:
    """This process's saved random states.

    Empty where another layout or another kind of device saved them.
    """
    if (
        reader.manifest.layout != engine.topology.layout.summary()
        or reader.manifest.world_size != dist.get_world_size()
    ):
        return {}
    saved = reader.rng_states(dist.get_rank())
    # Generators of CPU and GPU do not read each other's states.
    same = {name: state.shape for name, state in saved.items()} == {
        name: state.shape for name, state in rng_states().items()
    }
    return saved if same else {}


def _filler(reader: CheckpointReader, fragments: Sequence[Fragment]) -> Callable[[str, Tensor], None]:
    """Writes these fragments of any kind into a flat tensor.

    On an unchanged layout neighbours were neighbours: they are copied as one.
    """
    copies: list[tuple[int, Run]] = []
    others: list[Fragment] = []
    for fragment in fragments:
        runs, at = (
            reader.runs(fragment.name, fragment.shard, fragment.start, fragment.length),
            fragment.offset,
        )
        if runs is None:
            others.append(fragment)
            continue
        for run in runs:
            start, last = copies[-1] if copies else (0, Run("", 0, 0, 0))
            if (last.file, last.group, last.offset + last.length, start + last.length) == (
                run.file,
                run.group,
                run.offset,
                at,
            ):
                copies[-1] = start, last._replace(length=last.length + run.length)
            else:
                copies.append((at, run))
            at += run.length

    def fill(kind: str, flat: Tensor) -> None:
        for at, run in copies:
            flat[at : at + run.length] = reader.elements(run, kind)
        for fragment in others:
            flat[fragment.offset : fragment.offset + fragment.length] = reader.part(
                fragment.name, kind, fragment.shard, fragment.start, fragment.length
            )

    return fill
