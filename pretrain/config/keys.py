"""The schema of a run as a flat list of dotted keys.

What a key means, and which key a mistaken one was meant to be.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from pretrain.config.schema import RunConfig
from pretrain.config.yaml_reader import Plain

Kind = Literal["value", "section", "list", "free"]
INDEX = re.compile(r"\.\d+(?=\.|$)")
LEAST_LIKENESS, LEAST_ELSEWHERE = 0.6, 0.75
"""How alike two names must be to be taken for each other: in one section, and in two."""
LONGEST = 60
"""Characters of a mistaken key for which a meant one is looked for."""


@dataclass(frozen=True)
class SchemaField:
    """One key."""

    key: str
    """Dotted; indices of lists are written `*`."""
    kind: Kind
    """What it holds.

    value; section (keys inside); list (of sections).
    free (a mapping whose keys the schema leaves open).
    """
    description: str
    required: bool
    default: Plain | tuple[Plain, ...]
    text: bool
    """Whether the value is text."""


@functools.cache
def schema() -> dict[str, SchemaField]:
    """Every key of a run's configuration, in the order of the schema."""
    return {field.key: field for field in _walk(RunConfig, "")}


def defaults() -> dict[str, Plain]:
    """Every section with the keys that have a default, as plain nested values."""
    nested: dict[str, Plain] = {}
    for field in schema().values():
        *parents, last = field.key.split(".")
        if "*" in parents or (field.required and field.kind != "section"):
            continue
        if (section := _within(nested, parents)) is None:
            continue
        section[last] = list(field.default) if isinstance(field.default, tuple) else copy(field.default)
    return nested


def _within(nested: dict[str, Plain], parents: list[str]) -> dict[str, Plain] | None:
    """The section that some keys lead to; None inside a section that is not there by default."""
    for parent in parents:
        inner = nested[parent]
        if inner is None:
            return None
        assert isinstance(inner, dict)
        nested = inner
    return nested


def general(key: str) -> str:
    """A key with its list indices replaced by `*`: data.corpora.0.path is data.corpora.*.path."""
    return INDEX.sub(".*", key)


def is_text(key: str) -> bool:
    """Whether a dotted key takes text."""
    found = schema().get(general(key))
    return found is not None and found.text


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section class inside an annotation such as `X`, `X | None` or `list[X]`.

    None where there is none.
    """
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in (Union, types.UnionType, list):
        return next((found for found in map(section_of, get_args(annotation)) if found is not None), None)
    return None


def suggest(key: str) -> str | None:
    """The valid key nearest to a mistaken one, or None where none is near.

    The last part of the key counts most, then its section.
    So `model.num_layer` is a spelling mistake, `train.num_layers` is a misplaced key.
    """
    if len(key) > LONGEST:
        return None
    parent, _, last = general(key).rpartition(".")

    def likeness(key: str) -> float | None:
        """None for a key that is too far away."""
        its_parent, _, its_last = key.rpartition(".")
        name = _ratio(last, its_last)
        if its_parent == parent:
            return name + 0.3 if name >= LEAST_LIKENESS else None
        far = 0.2 * its_parent.count(".")
        return name + 0.3 * _ratio(parent, its_parent) - far if name >= LEAST_ELSEWHERE else None

    # A section is meant only where the mistaken key is a whole section itself, at the top level.
    wanted = [field.key for field in schema().values() if field.kind in ("value", "free") or not parent]
    near = {key: score for key in wanted if (score := likeness(key)) is not None}
    return max(near, key=lambda key: near[key]).replace(".*", ".0") if near else None


def _ratio(left: str, right: str) -> float:
    return SequenceMatcher(None, left, right).ratio()


def _takes_text(annotation: object) -> bool:
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return any(map(_takes_text, get_args(annotation)))
    return annotation is str


def _kind(annotation: object) -> Kind:
    if section_of(annotation) is not None:
        return "list" if get_origin(annotation) is list else "section"
    return "free" if get_origin(annotation) is dict else "value"


def _walk(model: type[BaseModel], prefix: str) -> Iterator[SchemaField]:
    for name, info in model.model_fields.items():
        key, kind = prefix + name, _kind(info.annotation)
        default = (
            None if info.is_required() else info.get_default(call_default_factory=True, validated_data={})
        )
        if kind == "section" and (info.is_required() or default is not None):
            default = {}
        text = _takes_text(info.annotation)
        yield SchemaField(key, kind, info.description or "", info.is_required(), default, text)
        section = section_of(info.annotation)
        if section is not None:
            yield from _walk(section, f"{key}.*." if kind == "list" else f"{key}.")
