"""Values for every key of a configuration, valid and invalid, from the schema itself."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.depth.schemes import SCHEMES
from pretrain.config.keys import section_of
from pretrain.config.schema import RunConfig

MINIMAL: dict[str, Any] = {
    "name": "tiny",
    "model": {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2},
    "data": {"corpora": [{"path": "somewhere"}], "seq_length": 16},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 4, "global_batch_size": 2, "micro_batch_size": 1},
}
WORDS = st.text(max_size=20)
NUMBERS = st.one_of(
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, -0.0, 5e-324, 1e308, 10**19]),
)
ANYTHING: SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=5,
)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z")
PATHS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=30
)
OPTIONS = sorted({option for scheme in SCHEMES.values() for option in scheme.options})


@dataclass(frozen=True)
class Key:
    """One key that takes a value."""

    name: str
    """Dotted; the first item of a list is 0."""
    valid: SearchStrategy[Any]
    """Values that the schema takes, if other keys fit."""
    invalid: SearchStrategy[Any]
    """Values that are refused whatever the others are."""


def keys() -> list[Key]:
    """Every key of a run's configuration."""
    return list(_keys(RunConfig, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, info in model.model_fields.items():
        key, section = prefix + name, section_of(info.annotation)
        if section is not None:
            yield from _keys(section, f"{key}.0." if get_origin(info.annotation) is list else f"{key}.")
        elif key == "model.scheme":
            yield Key(key, st.sampled_from(sorted(SCHEMES)), st.one_of(st.just("b3t"), NUMBERS))
        elif key == "model.scheme_options":
            values = st.one_of(st.floats(0, 1), st.floats(), st.booleans())
            yield Key(key, st.dictionaries(st.sampled_from(OPTIONS), values, max_size=2), WORDS)
        elif key == "name":
            yield Key(key, NAMES, st.one_of(st.just("a/b"), st.just("-"), NUMBERS.map(lambda one: [one])))
        else:
            valid, invalid = values_of(info.annotation, tuple(info.metadata))
            yield Key(key, valid, invalid)


def values_of(annotation: Any, limits: tuple[Any, ...]) -> tuple[SearchStrategy[Any], SearchStrategy[Any]]:
    """Valid and invalid values of a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *more = arguments
        flat = [
            one for limit in more for one in (limit.metadata if isinstance(limit, FieldInfo) else [limit])
        ]
        return values_of(inner, (*limits, *flat))
    if origin in (Union, types.UnionType):
        arms = [values_of(arm, limits) for arm in arguments if arm is not type(None)]
        valid = st.one_of([arm[0] for arm in arms] + ([st.none()] if type(None) in arguments else []))
        # What is invalid for one arm may be valid for another, as null is.
        # A list is valid for one of number, word and null only.
        invalid = arms[0][1].filter(lambda one: one is not None)
        return valid, invalid if len(arms) == 1 else st.lists(ANYTHING, min_size=9, max_size=9)
    if origin is Literal:
        return st.sampled_from(arguments), st.sampled_from(["gelo", -1, 1.5, [], {}, 10**30])
    if origin in (tuple, list):
        item, wrong = values_of(arguments[0], ())
        size = len(arguments) if origin is tuple else None
        valid = st.lists(item, min_size=size or 1, max_size=size or 4)
        return valid, st.one_of(WORDS, st.lists(wrong, min_size=1, max_size=3), st.just({"a": 1}))
    return _of_plain(annotation, limits)


def _of_plain(annotation: Any, limits: tuple[Any, ...]) -> tuple[SearchStrategy[Any], SearchStrategy[Any]]:
    if annotation is bool:
        return st.booleans(), st.sampled_from([0, 1, "yes", "true", None, [], 1.0])
    if annotation is str:
        return PATHS, st.sampled_from(["", "a\tb", "\x1b[2J", "n" * 300, "n/" * 3000, [], {"a": 1}, True])
    least, most = _bounds(limits)
    if annotation is int:
        outside = st.one_of(st.integers(max_value=least - 1), st.integers(min_value=most + 1))
        small = st.integers(least, min(most, least + 64))
        wrong = st.sampled_from([1.5, "x", "3", True, [], {}, float("inf"), float("nan")])
        return st.one_of(small, st.integers(least, most)), st.one_of(outside, wrong)
    assert annotation is float, annotation
    outside = st.one_of(
        st.floats(max_value=least, exclude_max=True, allow_nan=False),
        st.floats(min_value=most, exclude_min=True),
    )
    return st.floats(least, most), st.one_of(
        outside, st.just(float("nan")), st.sampled_from(["x", True, [], {}])
    )


def _bounds(limits: tuple[Any, ...]) -> tuple[Any, Any]:
    """Least and largest valid value.

    A bound that is excluded is moved by one for whole numbers, and to the next number else.
    """
    found: dict[str, Any] = {}
    for limit in limits:
        found |= {
            name: getattr(limit, name)
            for name in ("ge", "gt", "le", "lt")
            if getattr(limit, name, None) is not None
        }
    least = found.get("ge", found.get("gt"))
    most = found["le"] if "le" in found else _below(found["lt"])
    return least, most


def _below(limit: Any) -> Any:
    return limit - 1 if limit > 1 else 1 - 2**-53


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key in nested values."""
    *parents, last = key.split(".")
    node: Any = values
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[last] = value
