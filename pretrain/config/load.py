"""A run's configuration, read from YAML with includes and overrides.

It is checked, written back, and explained key by key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.speech import FrameMoments
from pretrain.config.compose import Composition, compose
from pretrain.config.errors import user_error
from pretrain.config.interpolation import MARK
from pretrain.config.keys import general, schema
from pretrain.config.schema import RunConfig
from pretrain.config.yaml_reader import Plain, dump


@dataclass(frozen=True)
class Row:
    """One key of a configuration."""

    key: str
    value: object
    default: object
    required: bool
    """Has no default."""
    changed: bool
    """Differs from the default."""
    description: str
    source: str
    """File and line, command line, or '' for a default."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a configuration.

    `pretrain/config/compose.py` tells how files and overrides are merged.

    Raises UserError in one line for a missing file, an unknown or misplaced key, a value of another
    type or out of range, a missing key, or keys that do not fit each other.
    Of several problems it names the first and counts the rest.
    """
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Composition]:
    """As `load_config`, and also where every key came from."""
    composition = compose(path, overrides)
    try:
        # Strict JSON has no conversion between types.
        # But whole numbers are numbers, and lists are tuples.
        return RunConfig.model_validate_json(json.dumps(composition.values), strict=True), composition
    except ValidationError as error:
        raise user_error(error, composition) from error


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML with every key, defaults included.

    `load_config` reads an equal object from it.
    """
    return dump(_escaped(config.model_dump(mode="json")))


def explained(config: RunConfig, origins: Composition | None = None) -> list[Row]:
    """Every key that holds a value, in the order of the schema, with its meaning.

    origins: from `load_with_origins`, for the column `source`.
    """
    return list(_rows(config, "", origins or Composition()))


def complete_model(
    config: RunConfig,
    vocab_size: int | None = None,
    correlations: Mapping[int, float] | None = None,
    moments: FrameMoments | None = None,
) -> ModelConfig:
    """The model section with what it takes from the data filled in.

    That is the vocabulary (of the tokenizer), the longest sequence, how much of the input is
    the mask token, and the correlation of patches.

    correlations: of the data's patches by their size. moments: of the data's frames of speech.

    Raises UserError where model.vocab_size and the tokenizer's differ, or the sequences are longer
    than the model's positions.
    """
    model = config.model
    if vocab_size is not None and model.vocab_size not in (None, vocab_size):
        raise UserError(
            f"model.vocab_size={model.vocab_size} differs from the tokenizer's {vocab_size}: "
            "remove model.vocab_size or prepare the data with another tokenizer"
        )
    positions = model.max_position_embeddings or config.data.seq_length
    if positions < config.data.seq_length:
        raise UserError(
            f"data.seq_length={config.data.seq_length} exceeds "
            f"model.max_position_embeddings={positions}: raise the latter or remove it"
        )
    source = config.data.source_length
    longest = model.max_source_positions or source
    if source is not None and longest is not None and longest < source:
        raise UserError(
            f"data.source_length={source} exceeds model.max_source_positions={longest}: "
            "raise the latter or remove it"
        )
    found: dict[str, object] = {
        "vocab_size": model.vocab_size or vocab_size,
        "max_position_embeddings": positions,
        "max_source_positions": longest,
    }
    if "masking" in config.task.sections and model.plans_correlation and model.init.mask_token_share is None:
        share = config.masking.rate * config.masking.masked_share
        found["init"] = model.init.model_copy(update={"mask_token_share": share})
    if model.image is not None and model.image.patch_correlation is None and correlations:
        known = {"patch_correlation": correlations.get(model.image.patch, 0.0)}
        found["image"] = model.image.model_copy(update=known)
    if model.speech is not None and model.speech.moments is None and moments is not None:
        found["speech"] = model.speech.model_copy(update={"moments": moments})
    return model.model_copy(update=found)


def _rows(section: BaseModel, prefix: str, origins: Composition) -> Iterator[Row]:
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{key}.", origins)
            continue
        if isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from _rows(item, f"{key}.{index}.", origins)
            continue
        field = schema()[general(key)]
        changed = field.required or value != field.default
        yield Row(
            key,
            value,
            field.default,
            field.required,
            changed,
            field.description,
            origins.origin(key) if key in origins.origins else "",
        )


def _escaped(value: Plain) -> Plain:
    """Protects text that only looks like an interpolation from being one when it is read again."""
    if isinstance(value, str):
        return MARK.sub(lambda match: match[1] * 2 + "\\${", value)
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value
