"""Configuration values from files and the command line, merged in order, each key with the place it came from.

A file may start with `include:`, a list of files that are merged first, in order; its own keys come after them. Overrides come last, left to
right: `key.sub=value` sets one value, `+include=FILE` merges another file. Sections are merged; values, lists and free mappings are replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from model.errors import UserError
from pretrain.config.keys import defaults, general, schema

SHIPPED = Path(__file__).resolve().parents[2] / "configs"
COMMAND_LINE = "command line"
BRACKETS = re.compile(r"\[(\d+)\]")


@dataclass
class Composition:
    """Merged values over the schema's defaults. origins: the file and line, or the command line, that gave each dotted key."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where a key came from; for a key that nobody gave, where its nearest section came from, or ''."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return ""


def compose(path: Path | str, overrides: Sequence[str] = ()) -> Composition:
    """Merges a file, its includes and the overrides, and resolves `${interpolations}`.

    Raises UserError for a missing or unreadable file, a circle of includes, an override that is no key=value, and an interpolation that leads nowhere.
    """
    file = find(str(path), [Path.cwd(), SHIPPED], "*.yaml")
    merging = _Merging()
    merging.add_file(file, ())
    for text in overrides:
        merging.add_override(text, file)
    return Composition(merging.resolved(), merging.origins)


def find(name: str, folders: Sequence[Path], near: str = "**/*.yaml") -> Path:
    """The file `name` in the first folder that has it, `.yaml` added where it is missing.

    Raises UserError, naming the shipped files (glob `near`) whose names are like it.
    """
    for folder in folders:
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    shipped = {file.stem: shown(file) for file in sorted(SHIPPED.glob(near))}
    alike = [shipped[stem] for stem in get_close_matches(Path(name).stem, shipped, n=3, cutoff=0.5)] or list(
        shipped.values()
    )
    what = "is a folder, not a configuration file" if Path(name).is_dir() else "does not exist"
    raise UserError(
        f"configuration {name} {what}; {'there are' if len(alike) > 1 else 'there is'} {', '.join(alike) or 'no shipped configurations'}"
    )


def shown(path: Path) -> str:
    """A path as a person would write it: relative to the working folder where it is inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


class _Merging:
    """The state of one composition."""

    def __init__(self) -> None:
        self.config: DictConfig = OmegaConf.create({})
        self.origins: dict[str, str] = {}

    def add_file(self, file: Path, chain: tuple[Path, ...]) -> None:
        if file.resolve() in chain:
            raise UserError(
                f"{shown(file)} includes itself: {' -> '.join(shown(link) for link in (*chain, file.resolve()))}"
            )
        values, lines = _read(file)
        includes = values.pop("include", None) or []
        if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
            raise UserError(f"{shown(file)}: include={includes!r} must be a list of files")
        for name in includes:
            try:
                included = find(name, _folders(file))
            except UserError as error:
                raise UserError(f"{shown(file)}: include: {error}") from error
            self.add_file(included, (*chain, file.resolve()))
        values = _without_empty_sections(values)
        for key, _ in _flat(values):
            if general(key) in schema() and schema()[general(key)].kind in ("free", "list"):
                self._forget(key)
        self.config = OmegaConf.merge(self.config, values)  # type: ignore[assignment]
        for key, _ in _flat(values):
            self.origins[key] = f"{shown(file)}:{lines[key]}" if key in lines else shown(file)

    def add_override(self, text: str, main: Path) -> None:
        key, equals, value = text.partition("=")
        if not equals or not key.strip("+-"):
            raise UserError(
                f"override {text!r} is not of the form key=value, e.g. train.steps=100, or +include=FILE"
            )
        if key == "+include":
            self.add_file(find(value, [Path.cwd(), *_folders(main)]), ())
            return
        if key.startswith(("+", "-")) or key == "include":
            raise UserError(
                f"override {text!r}: write {'+include=FILE' if key.strip('+-') == 'include' else text.lstrip('+-')} instead"
            )
        key = BRACKETS.sub(r".\1", key)
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore[index, call-overload]
            self._forget(key)
            OmegaConf.update(self.config, key, parsed, merge=False, force_add=True)
        except yaml.YAMLError as error:
            raise UserError(
                f"override {text!r}: the value is not valid YAML ({_yaml_problem(error)})"
            ) from error
        except IndexError as error:
            raise UserError(
                f"override {text!r}: the list is shorter than that; give the whole list, as in data.corpora=[{{path: A}}, {{path: B}}]"
            ) from error
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(
                f"override {text!r} does not fit the configuration: {_first_line(error)}"
            ) from error
        self.origins[key] = COMMAND_LINE
        above, _, _ = key.rpartition(".")
        if above in schema() and schema()[above].kind != "section":
            self.origins[above] = COMMAND_LINE  # a key below a value replaces the value
        self.origins.update((f"{key}.{inner}", COMMAND_LINE) for inner, _ in _flat(parsed))

    def resolved(self) -> dict[str, Any]:
        try:
            # Over the defaults, so that `${model.scheme}` also finds a scheme that nobody gave.
            return OmegaConf.to_container(
                OmegaConf.merge(defaults(), self.config), resolve=True, throw_on_missing=True
            )  # type: ignore[return-value]
        except OmegaConfBaseException as error:
            key = BRACKETS.sub(r".\1", str(getattr(error, "full_key", "") or ""))
            place = f" ({self.origins[key]})" if key in self.origins else ""
            problem = "must be set" if isinstance(error, MissingMandatoryValue) else _first_line(error)
            raise UserError(f"{key or 'configuration'}: {problem}{place}") from error

    def _forget(self, key: str) -> None:
        """Drops the value of a key and the origins below it, so that what follows replaces it."""
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(self.config, parent) if parent else self.config
        if OmegaConf.is_dict(node) and last in node:
            del node[last]
        for old in [old for old in self.origins if old == key or old.startswith(f"{key}.")]:
            del self.origins[old]


def _folders(file: Path) -> list[Path]:
    """Where the includes of a file are looked for: beside it, in the `configs` folder around it, in the shipped configurations."""
    around = [parent for parent in file.resolve().parents if parent.name == "configs"]
    return [file.parent, *around, SHIPPED, SHIPPED.parent]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Values of a file and the line of every dotted key."""
    try:
        text = file.read_text(encoding="utf-8")
        loaded = OmegaConf.load(file)
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader)))
    except yaml.YAMLError as error:
        raise UserError(f"{shown(file)} is not valid YAML: {_yaml_problem(error)}") from error
    except (UnicodeDecodeError, OmegaConfBaseException, OSError) as error:
        raise UserError(f"{shown(file)} cannot be read: {_first_line(error)}") from error
    values = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(values, dict):
        raise UserError(f"{shown(file)} must hold `key: value` lines, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}, lines


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield f"{prefix}{key.value}", key.start_mark.line + 1
            yield from _lines(value, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield f"{prefix}{index}", value.start_mark.line + 1
            yield from _lines(value, f"{prefix}{index}.")


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a value, containers included."""
    items = (
        values.items()
        if isinstance(values, Mapping)
        else enumerate(values)
        if isinstance(values, list)
        else ()
    )
    for key, value in items:
        yield f"{prefix}{key}", value
        yield from _flat(value, f"{prefix}{key}.")


def _without_empty_sections(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A section whose keys are all commented out reads as null in YAML; it means an empty section."""
    sections = {field.key for field in schema().values() if field.kind == "section"}
    kept = {
        key: value for key, value in values.items() if value is not None or prefix + str(key) not in sections
    }
    return {
        key: _without_empty_sections(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark is not None else problem


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
