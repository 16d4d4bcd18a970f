"""Loading a checkpoint into an engine of any layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import UserError
from model.names import NamedParameter
from model.shards import full_shape, take
from parallel.checkpoint.format import Fragment
from parallel.checkpoint.fragments import flat_state, owned_fragments, set_state
from parallel.checkpoint.reader import CheckpointReader
from parallel.checkpoint.writer import set_rng_states
from parallel.engine import Engine


def check_model(reader: CheckpointReader, parameters: Sequence[NamedParameter]) -> None:
    """Raises UserError when a checkpoint lacks a parameter of the model or has it in another shape."""
    for named in parameters:
        wanted = full_shape(named.parameter.shape, named.shard)
        found = reader.shape(named.name)
        if wanted != found:
            raise UserError(f"{reader.folder}: {named.name} has shape {list(found)}, the configured model needs {list(wanted)}")


def load(engine: Engine, reader: CheckpointReader) -> bool:
    """Puts weights, moments and, on an unchanged layout, random states into an engine. Returns whether the random states were restored.

    Raises UserError for damage or another model, before anything is changed.
    """
    check_model(reader, engine.parameters)
    _verify_together(reader)
    step = int(reader.progress["optimizer_step"])
    moments = ["exp_avg", "exp_avg_sq"] if reader.has("exp_avg") else []
    _load_weights(engine, reader)
    by_group: dict[int, list[Fragment]] = defaultdict(list)
    for _, fragment in owned_fragments(engine):
        by_group[fragment.group].append(fragment)
    for group in range(len(engine.groups)):
        values = {kind: torch.zeros_like(flat_state(engine, group, create=True)["master"], device="cpu") for kind in ("master", *moments)}
        for fragment in by_group[group]:
            for kind, flat in values.items():
                flat[fragment.offset : fragment.offset + fragment.length] = _piece(reader, fragment, kind)
        set_state(engine, group, values, step)
    same = reader.manifest["layout"] == engine.topology.layout.summary() and reader.manifest["world_size"] == dist.get_world_size()
    if same:
        set_rng_states(reader.rng_states(dist.get_rank()))
    return same


def _piece(reader: CheckpointReader, fragment: Fragment, kind: str) -> Tensor:
    local = take(reader.tensor(fragment.name, kind), fragment.shard)
    return local.reshape(-1)[fragment.start : fragment.start + fragment.length]


def _load_weights(engine: Engine, reader: CheckpointReader) -> None:
    """Model weights, in the model's precision, from the master weights."""
    with torch.no_grad():
        for named in engine.parameters:
            named.parameter.copy_(take(reader.tensor(named.name), named.shard))


def _verify_together(reader: CheckpointReader) -> None:
    """Every process checks its share of the files; all raise UserError when any finds damage."""
    rank, world = dist.get_rank(), dist.get_world_size()
    problem = ""
    try:
        reader.verify(sorted(reader.manifest["files"])[rank::world])
    except UserError as error:
        problem = str(error)
    problems: list[str] = [""] * world
    dist.all_gather_object(problems, problem)
    for text in problems:
        if text:
            raise UserError(text)
