"""Configuration values from files and the command line, merged in order.

Each key is kept with the place it came from.

A file may start with `include:`, a list of files that are merged first, in order.
Its own keys come after them.
Overrides come last, left to right: `key.sub=value` sets one value, `+include=FILE` merges another
file.
Sections are merged; values, lists and free mappings are replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from model.errors import UserError
from model.words import printable
from pretrain.config.interpolation import interpolated
from pretrain.config.keys import LEAST_LIKENESS, defaults, general, is_text, schema
from pretrain.config.yaml_reader import LARGEST, LONGEST_KEY, Plain, YamlError, dotted, parse, read_text

SHIPPED = Path(__file__).resolve().parents[2] / "configs"
COMMAND_LINE = "command line"
BRACKETS = re.compile(r"\[(\d+)\]")
MOST_FILES, LONGEST_CHAIN, MOST_PARTS, MOST_NAMES = 100, 10, 10, 6
"""Most of each.

Files merged into one configuration, files that include each other in a row, parts of a dotted key,
names in a hint.
"""
Container = list[Plain] | dict[str, Plain]


@dataclass
class Composition:
    """Merged values over the schema's defaults."""

    values: dict[str, Plain] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """The file and line, or the command line, that gave each dotted key."""

    def origin(self, key: str) -> str:
        """Where a key came from.

        For a key that nobody gave, where its nearest section came from, or ''.
        """
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(".")[0]
        return ""


def compose(path: Path | str, overrides: Sequence[str] = (), near: str = "*.yaml") -> Composition:
    """Merges a file, its includes and the overrides, and resolves `${interpolations}`.

    near: as in `find`.

    Raises UserError for a missing or unreadable file, a circle of includes, an override that is no
    key=value, and an interpolation that leads nowhere; OSError as the file system does.
    """
    file = find(str(path), [Path.cwd()], near)
    merging = _Merging()
    merging.add_file(file, ())
    for text in overrides:
        merging.add_override(text, file)
    values = _merged(defaults(), merging.values)
    return Composition(interpolated(values, merging.origins), merging.origins)


def find(name: str, folders: Sequence[Path], near: str = "**/*.yaml") -> Path:
    """The file `name` in the first folder that has it, `.yaml` added where it is missing.

    The shipped configurations come last, with `configs/` before their names or without.
    Raises UserError, naming the shipped files (glob `near`) whose names are like it.
    """
    for folder, inside in [*((folder, name) for folder in folders), (SHIPPED, _in_shipped(name))]:
        if file := _file(folder, inside):
            return file
    known = {str(file.relative_to(SHIPPED).with_suffix("")): file.stem for file in sorted(SHIPPED.glob(near))}
    alike = get_close_matches(Path(name).stem[:LONGEST_KEY], known.values(), n=3, cutoff=LEAST_LIKENESS)
    names = [path for path, stem in known.items() if stem in alike] or list(known)
    what = "is a folder, not a configuration file" if Path(name).is_dir() else "does not exist"
    more = f" and {len(names) - MOST_NAMES} more in {shown(SHIPPED)}" if len(names) > MOST_NAMES else ""
    are = "are" if len(names) > 1 else "is"
    raise UserError(
        f"configuration {printable(name)} {what}; there {are} {', '.join(names[:MOST_NAMES])}{more}"
    )


def shipped(name: str) -> Path | None:
    """The shipped file that a name stands for.

    None where the working folder has one of that name, and where there is none at all.
    """
    return None if _file(Path.cwd(), name) else _file(SHIPPED, _in_shipped(name))


def _file(folder: Path, name: str) -> Path | None:
    """The file `name` of a folder, `.yaml` added where it is missing; None where it has none.

    Raises UserError for what is neither a file nor a folder.
    """
    for candidate in (folder / name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
        if candidate.exists() and not candidate.is_dir():
            raise UserError(
                f"configuration {printable(name)} is no regular file: write it into one and name that"
            )
    return None


def _in_shipped(name: str) -> str:
    """The name of a file inside of the shipped folder, without the name of the folder itself."""
    parts = Path(name).parts
    return str(Path(*parts[1:])) if parts[:1] == (SHIPPED.name,) and len(parts) > 1 else name


def shown(path: Path) -> str:
    """A path as a person would write it: relative to the working folder where it is inside."""
    relative = os.path.relpath(path)
    return printable(path if relative.startswith("..") else relative)


class _Merging:
    """The state of one composition."""

    def __init__(self) -> None:
        self.values: dict[str, Plain] = {}
        self.origins: dict[str, str] = {}
        self._files = self._characters = 0

    def add_file(self, file: Path, chain: tuple[Path, ...]) -> None:
        """Merges a file after its includes. chain: the files that led to it."""
        name = shown(file)
        if file.resolve() in chain:
            raise UserError(
                f"{name} includes itself: {' -> '.join(shown(link) for link in (*chain, file.resolve()))}"
            )
        if len(chain) > LONGEST_CHAIN:
            raise UserError(f"{name}: more than {LONGEST_CHAIN} files include each other in a row")
        values, lines = self._read(file, name)
        includes = values.pop("include", None) or []
        files = [one for one in includes if isinstance(one, str)] if isinstance(includes, list) else []
        if not isinstance(includes, list) or len(files) < len(includes):
            raise UserError(f"{name}: include={printable(repr(includes), 60)} must be a list of files")
        for one in files:
            try:
                included = find(one, _folders(file))
            except UserError as error:
                raise UserError(f"{name}: include: {error}") from error
            self.add_file(included, (*chain, file.resolve()))
        values = _without_empty_sections(values)
        self._merge(self.values, values, "")
        for key in _flat(values):
            self.origins[key] = f"{name}:{lines[key]}" if key in lines else name

    def add_override(self, text: str, main: Path) -> None:
        """Applies one argument of the command line.

        main: the configuration's file, beside which includes are looked for.
        """
        key, equals, value = text.partition("=")
        said = f"override {printable(repr(text), 100)}"
        if not equals or not key.strip("+- "):
            raise UserError(f"{said} is not of the form key=value, e.g. train.steps=100, or +include=FILE")
        if key == "+include":
            self.add_file(find(value, [Path.cwd(), *_folders(main)]), ())
            return
        if key.startswith(("+", "-")) or key == "include":
            wanted = "+include=FILE" if key.strip("+-") == "include" else printable(text.lstrip("+-"), 100)
            raise UserError(f"{said}: write {wanted} instead")
        if key != key.strip():
            raise UserError(
                f"{said}: write {printable(f'{key.strip()}={value.strip()}', 100)}, "
                "without blanks around the key"
            )
        key = BRACKETS.sub(r".\1", key)
        if len(key) > LONGEST_KEY or key.count(".") >= MOST_PARTS or not all(key.split(".")):
            raise UserError(
                f"{said}: a key is words joined by dots, as in train.steps=100; "
                "`fathom config FILE` lists all keys"
            )
        try:
            parsed = parse(value, is_text, key).value
        except YamlError as error:
            raise UserError(f"{said}: the value is not valid YAML ({error})") from error
        self._set(key, parsed, said)
        self.origins[key] = COMMAND_LINE
        above, _, _ = key.rpartition(".")
        if above in schema() and schema()[above].kind != "section":
            self.origins[above] = COMMAND_LINE  # a key below a value replaces the value
        self.origins.update((f"{key}.{inner}", COMMAND_LINE) for inner in _flat(parsed))

    def _read(self, file: Path, name: str) -> tuple[dict[str, Plain], dict[str, int]]:
        """Values of a file and the line of every dotted key."""
        text = read_text(file, name)
        self._files, self._characters = self._files + 1, self._characters + len(text)
        if self._files > MOST_FILES or self._characters > LARGEST:
            raise UserError(
                f"{name}: with it more than {MOST_FILES} files or "
                f"{LARGEST} characters are included; name each file once"
            )
        try:
            document = parse(text, is_text)
        except YamlError as error:
            raise UserError(f"{name} is not valid YAML: {error}") from error
        values = {} if document.value is None else document.value
        if not isinstance(values, dict):
            raise UserError(
                f"{name} must hold `key: value` lines, "
                f"not {'a list' if isinstance(values, list) else 'a text'}"
            )
        return values, document.lines

    def _merge(self, into: dict[str, Plain], values: Mapping[str, Plain], prefix: str) -> None:
        """Puts `values` over `into`, forgetting where what is replaced came from."""
        for name, value in values.items():
            key = prefix + name
            free = general(key) in schema() and schema()[general(key)].kind == "free"
            old = into.get(name)
            if isinstance(value, dict) and isinstance(old, dict) and not free:
                self._merge(old, value, f"{key}.")
            else:
                self._forget(key, old)
                into[name] = value

    def _set(self, key: str, value: Plain, said: str) -> None:
        """Sets a dotted key, making sections on the way."""
        *parents, last = key.split(".")
        node: Container = self.values
        for place, part in enumerate(parents):
            node = self._below(node, part, ".".join(parents[:place]), said, parents[place + 1 :] or [last])
        above = ".".join(parents)
        self._forget(key, _item(node, last, above, said))
        _put(node, last, value, above, said)

    def _below(self, node: Container, part: str, above: str, said: str, rest: list[str]) -> Container:
        """The container at `part` of `node`; a new section where there is no container."""
        inner = _item(node, part, above, said)
        if isinstance(inner, (dict, list)):
            return inner
        key = dotted(above, part)
        kind = schema()[general(key)].kind if general(key) in schema() else "section"
        if kind == "list" and rest[0].isdecimal():
            raise UserError(f"{said}: {_short(key)}")
        section: dict[str, Plain] = {}
        _put(node, part, section, above, said)
        return section

    def _forget(self, key: str, old: Plain) -> None:
        """Drops the origins of a key and of what is below it. old: the value that goes."""
        self.origins.pop(key, None)
        for inner in _flat(old):
            self.origins.pop(f"{key}.{inner}", None)


def _item(node: Container, part: str, key: str, said: str) -> Plain:
    """What a container has at one part of a dotted key, None where it has nothing."""
    return node[_index(node, part, key, said)] if isinstance(node, list) else node.get(part)


def _put(node: Container, part: str, value: Plain, key: str, said: str) -> None:
    if isinstance(node, list):
        node[_index(node, part, key, said)] = value
    else:
        node[part] = value


def _index(items: list[Plain], part: str, key: str, said: str) -> int:
    if not part.isdecimal():
        raise UserError(f"{said}: {key} is a list: name its items by number, as in {key}.0")
    if len(part) > 9 or int(part) >= len(items):
        raise UserError(f"{said}: {_short(key)}")
    return int(part)


def _short(key: str) -> str:
    return f"the list is shorter than that; give the whole list, as in {key}=[{{path: A}}, {{path: B}}]"


def _folders(file: Path) -> list[Path]:
    """Where the includes of a file are looked for before the shipped configurations.

    Beside it, and in the `configs` folder around it.
    """
    around = [parent for parent in file.resolve().parents if parent.name == "configs"]
    return [file.parent, *around]


def _flat(values: Plain, prefix: str = "") -> Iterator[str]:
    """Every dotted key below a value, those of containers included."""
    if isinstance(values, list):
        values = {str(index): value for index, value in enumerate(values)}
    if isinstance(values, dict):
        for key, value in values.items():
            yield f"{prefix}{key}"
            yield from _flat(value, f"{prefix}{key}.")


def _merged(base: Mapping[str, Plain], over: Mapping[str, Plain]) -> dict[str, Plain]:
    """The values of `base` with those of `over` in them, section by section."""
    merged = dict(base)
    for key, value in over.items():
        inner = base.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _without_empty_sections(values: dict[str, Plain], prefix: str = "") -> dict[str, Plain]:
    """Reads null sections as empty ones.

    A section whose keys are all commented out reads as null in YAML; it means an empty section.
    """
    sections = {field.key for field in schema().values() if field.kind == "section"}
    kept = {
        key: value for key, value in values.items() if value is not None or prefix + str(key) not in sections
    }
    return {
        key: _without_empty_sections(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in kept.items()
    }
