"""Does a checkpoint hold the model that its configuration describes, and all of it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.names import LAYER_NUMBER
from model.parameters.table import Row, parameter_table
from model.words import printable
from parallel.checkpoint.folders import MANIFEST
from parallel.checkpoint.format import STATE_KINDS
from parallel.checkpoint.reader import CheckpointReader
from parallel.optimizers import OPTIMIZERS, STATES


@dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, as its configuration describes it."""

    config: ModelConfig
    """With the size of the vocabulary filled in."""
    positions: int
    """The longest sequence."""
    source_positions: int | None = None
    """The longest sequence of an encoder under a decoder; None where there is none."""


def saved_model(reader: CheckpointReader) -> SavedModel:
    """The model of a checkpoint, compared with the tensors that are there, by name and shape.

    Raises UserError for a configuration that is none, or that describes another model.
    """
    fields, source = reader.sections.model, reader.folder / MANIFEST
    if not fields:
        raise UserError(f"{source} does not say which model it is of: use another checkpoint")
    # First: a depth out of all proportion would be computed with.
    for key, depth in _depths(reader).items():
        said = fields.get(key)
        if said is None and key == "encoder_layers":
            said = fields.get("num_layers")
        if said != depth:
            raise UserError(
                f"{source} says model.{key}={printable(said)}, "
                f"its files hold {depth} layers: use another checkpoint"
            )
    try:
        unknown = fields.get("vocab_size") is None
        config = ModelConfig.model_validate(
            {"vocab_size": _vocabulary(reader), **fields} if unknown else fields
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("model", *first["loc"])))
        raise UserError(
            f"{source} is damaged ({printable(key)}: {printable(first['msg'])}): use another checkpoint"
        ) from None
    model = SavedModel(
        config,
        config.max_position_embeddings or _length(reader, "seq_length", "max_position_embeddings"),
        (config.max_source_positions or _length(reader, "source_length", "max_source_positions"))
        if config.blueprint.crossed
        else None,
    )
    _compare(reader, model)
    return model


def _depths(reader: CheckpointReader) -> dict[str, int]:
    """Layers that the files hold, by the key that should say so.

    With two stacks num_layers is that of the decoder.
    """
    found: dict[str, int] = {}
    for match in filter(None, map(LAYER_NUMBER.match, reader.names())):
        found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    if len(found) < 2:
        return {"num_layers": max(found.values(), default=0)}
    return {"num_layers": found["decoder"], "encoder_layers": found["encoder"]}


def check_tensors(reader: CheckpointReader, saved: SavedModel | None = None) -> int:
    """Reads every element; returns the number of tensors.

    saved: of which model; None where that is not known.

    Raises UserError for weights that are not there,
    for moments that some parameters have and others lack, and for values that are not finite.
    """
    kept = _kept(reader, saved)
    trained = any(reader.has(kind, name) for name in reader.names() for kind in STATES)
    count = 0
    for name in reader.names():
        for kind in STATE_KINDS:
            needed = kind == "master" or (trained and kind in kept(name))
            if not needed and not reader.has(kind, name):
                continue
            if not reader.tensor(name, kind).isfinite().all():
                raise UserError(
                    f"{reader.folder}: {name} ({kind}) has values that are not finite: the run had diverged; "
                    "use an older checkpoint"
                )
            count += 1
    return count


def _rows(saved: SavedModel) -> Iterator[Row]:
    return parameter_table(saved.config, positions=saved.positions, source_positions=saved.source_positions)


def _kept(reader: CheckpointReader, saved: SavedModel | None) -> Callable[[str], tuple[str, ...]]:
    """What the optimizer must have kept of each parameter."""
    kind = reader.sections.optimizer.kind
    if kind not in OPTIMIZERS:
        raise UserError(
            f"{reader.folder} was written with optimizer.kind={printable(kind)}, which this version does not "
            f"know (it knows {', '.join(OPTIMIZERS)}): use another checkpoint"
        )
    optimizer = OPTIMIZERS[kind]
    if saved is None:
        both = tuple(state for state in optimizer.others.states if state in optimizer.hidden.states)
        return lambda name: both
    hidden = {row.name: row.hidden for row in _rows(saved)}
    return lambda name: optimizer.update(hidden=hidden[name]).states


def _compare(reader: CheckpointReader, model: SavedModel) -> None:
    wanted = {row.name: row.shape for row in _rows(model)}
    found = set(reader.names())
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(
                f"{reader.folder}: its configuration describes {name}, its files lack it: "
                "use another checkpoint"
            )
        if reader.shape(name) != shape:
            raise UserError(
                f"{reader.folder}: {name} has shape {list(reader.shape(name))}, "
                f"its configuration gives {list(shape)}: use another checkpoint"
            )
    for name in sorted(found - set(wanted)):
        raise UserError(
            f"{reader.folder}: its files hold {printable(name)}, its configuration has no place for it: "
            "use another checkpoint"
        )


def _vocabulary(reader: CheckpointReader) -> int:
    tokenizer = reader.tokenizer_path
    if tokenizer is None:
        raise UserError(
            f"{reader.folder} has neither model.vocab_size nor a tokenizer: "
            "put the tokenizer of its data there"
        )
    from model.hf.tokenizer.table import vocabulary

    return vocabulary(tokenizer)


def _length(reader: CheckpointReader, data: str, model: str) -> int:
    """Tokens of a sample, by their key of section data; they stand for one of section model."""
    length: int | None = getattr(reader.sections.data, data)
    if length is None:
        raise UserError(
            f"{reader.folder / MANIFEST} names neither model.{model} nor data.{data}: use another checkpoint"
        )
    return length
