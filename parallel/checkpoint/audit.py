"""Does a checkpoint hold the model that its configuration describes, and all of it?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.names import LAYER_NUMBER
from model.words import printable
from parallel.checkpoint.folders import MANIFEST
from parallel.checkpoint.format import STATE_KINDS
from parallel.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, as its configuration describes it."""

    config: ModelConfig
    """With the size of the vocabulary filled in."""
    positions: int
    """The longest sequence."""


def saved_model(reader: CheckpointReader) -> SavedModel:
    """The model of a checkpoint, compared with the tensors that are there, by name and shape.

    Raises UserError for a configuration that is none, or that describes another model.
    """
    fields, source = reader.sections.model, reader.folder / MANIFEST
    if not fields:
        raise UserError(f"{source} does not say which model it is of: use another checkpoint")
    numbers = (LAYER_NUMBER.match(name) for name in reader.names())
    depth = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    if fields.get("num_layers") != depth:  # first: a depth out of all proportion would be computed with
        raise UserError(
            f"{source} says model.num_layers={printable(fields.get('num_layers'))}, "
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
    model = SavedModel(config, config.max_position_embeddings or _seq_length(reader))
    _compare(reader, model)
    return model


def check_tensors(reader: CheckpointReader) -> int:
    """Reads every element; returns the number of tensors.

    Raises UserError for weights that are not there,
    for moments that some parameters have and others lack, and for values that are not finite.
    """
    muon = reader.sections.optimizer.kind == "muon"
    trained = any(reader.has("exp_avg", name) for name in reader.names())
    count = 0
    for name in reader.names():
        for kind in STATE_KINDS:
            needed = kind == "master" or (trained and not (muon and kind == "exp_avg_sq"))
            if not needed and not reader.has(kind, name):
                continue
            if not reader.tensor(name, kind).isfinite().all():
                raise UserError(
                    f"{reader.folder}: {name} ({kind}) has values that are not finite: the run had diverged; "
                    "use an older checkpoint"
                )
            count += 1
    return count


def _compare(reader: CheckpointReader, model: SavedModel) -> None:
    from model.parameters.table import parameter_table

    wanted = {row.name: row.shape for row in parameter_table(model.config, positions=model.positions)}
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
            f"{reader.folder} has neither model.vocab_size nor a tokenizer.model: "
            "put the tokenizer of its data there"
        )
    return _pieces(tokenizer)


def _pieces(tokenizer: Path) -> int:
    from sentencepiece import SentencePieceProcessor

    try:
        return int(SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size())
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{tokenizer} is no SentencePiece model ({printable(error)}): put the tokenizer of its data there"
        ) from None


def _seq_length(reader: CheckpointReader) -> int:
    length = reader.sections.data.seq_length
    if length is None:
        raise UserError(
            f"{reader.folder / MANIFEST} names neither model.max_position_embeddings nor data.seq_length: "
            "use another checkpoint"
        )
    return length
