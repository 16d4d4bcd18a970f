"""The schema itself: every value has bounds, so that no library is the first to refuse one."""

from __future__ import annotations

import math
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.config.keys import section_of
from pretrain.config.schema import RunConfig

CHOSEN_BY_NAME = ("model.scheme", "model.scheme_options", "model.family", "train.task")
"""Looked up in a table that has bounds of its own."""


def leaves(annotation: Any, limits: tuple[Any, ...], key: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Every plain type inside an annotation, with the limits that hold for it."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        flat = [
            one for limit in more for one in (limit.metadata if isinstance(limit, FieldInfo) else [limit])
        ]
        yield from leaves(inner, (*limits, *flat), key)
    elif get_origin(annotation) in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from leaves(inner, limits, key)
    elif get_origin(annotation) in (list, tuple):
        for inner in get_args(annotation):
            yield from leaves(inner, (), f"{key}.*")
        if get_origin(annotation) is list:
            yield key, list, limits
    elif get_origin(annotation) is not Literal and annotation is not type(None):
        yield key, annotation, limits


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    for name, info in model.model_fields.items():
        section = section_of(info.annotation)
        if section is None or get_origin(info.annotation) is list:
            yield from leaves(info.annotation, tuple(info.metadata), prefix + name)
        if section is not None:
            yield from fields(section, f"{prefix}{name}.")


def bound(limits: tuple[Any, ...], *names: str) -> float:
    return next(
        (float(getattr(limit, name)) for limit in limits for name in names if hasattr(limit, name)), math.nan
    )


def test_every_number_and_text_and_list_has_finite_bounds() -> None:
    seen = 0
    for key, kind, limits in fields(RunConfig):
        if key in CHOSEN_BY_NAME or kind is bool or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            continue
        seen += 1
        if kind in (int, float):
            assert math.isfinite(bound(limits, "ge", "gt")), key
            assert math.isfinite(bound(limits, "le", "lt")), key
        elif kind is list:
            assert math.isfinite(bound(limits, "max_length")), key
        else:
            assert kind is str, key
            assert any(hasattr(limit, "func") for limit in limits) or math.isfinite(
                bound(limits, "max_length")
            ), key
    assert seen > 50


def test_no_section_takes_infinities() -> None:
    for key, kind, _ in fields(RunConfig):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert kind.model_config["allow_inf_nan"] is False, key
