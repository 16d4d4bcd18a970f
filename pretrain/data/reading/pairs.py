"""Reading pairs of texts: which files hold them, and what is in each.

`pair_records` walks an input in order and yields raw pairs, cheaply.
`pair_of` turns one raw pair into two texts, or says what is wrong with it, in the worker processes.
Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from model.errors import UserError
from pretrain.data.reading.catalogues import catalogue_messages, is_catalogue
from pretrain.data.reading.compressed import DECODERS, compression, open_binary
from pretrain.data.reading.documents import json_lines, parse_json
from pretrain.data.reading.inputs import InputFile
from pretrain.data.reading.raw_record import Broken, Record, broken
from pretrain.data.reading.tables import csv_rows, hub_rows, parquet_rows

BOM = b"\xef\xbb\xbf"
LICENCE = ".license"
"""Suffix of a file that says under which licence the file beside it is (reuse.software)."""
_IDENTIFIER = re.compile(r"SPDX-License-Identifier:\s*(.+)")


class Sides(NamedTuple):
    """What the two sides of a pair are called: keys, columns or suffixes of files."""

    source: str
    target: str

    @classmethod
    def of(cls, given: str, option: str = "--pairs") -> Sides:
        """Reads an option. Raises UserError for anything but two different names."""
        names = [name.strip() for name in given.split(",")]
        if len(names) != 2 or not all(names) or names[0] == names[1]:
            wanted = "give two names, SOURCE,TARGET: keys, columns or suffixes of files, such as en,de"
            raise UserError(f"{option} {given}: {wanted}")
        return cls(*names)


@dataclass(frozen=True)
class PairFile:
    """A file that holds pairs, or a file of sources and one of targets."""

    file: InputFile
    other: str = ""
    """The file of targets, where there is one."""
    problem: str = ""
    """Why it is not read."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.file.size + (Path(self.other).stat().st_size if self.other else 0)


def pair_files(shards: Iterable[InputFile], sides: Sides) -> list[PairFile]:
    """What files hold. A file of targets is read with its sources, named or not."""
    found = []
    for shard in shards:
        name = Path(shard.name)
        if shard.problem or shard.kind != "text" or is_catalogue(shard.name):
            found.append(PairFile(shard, problem=shard.problem))
        elif name.suffix == LICENCE:
            continue
        elif (side := _side(name, sides)) is None:
            names = f"X.{sides.source} and X.{sides.target}"
            found.append(PairFile(shard, problem=f"text files of pairs come in twos, {names}"))
        elif not (other := _partner(name, sides[side], sides[1 - side])):
            found.append(PairFile(shard, problem=f"there is no file .{sides[1 - side]} beside it"))
        elif side == 0:
            found.append(PairFile(shard, other))
    return found


def licence_of(name: str) -> str:
    """What the file says that stands beside this one; empty where there is none."""
    try:
        text = Path(f"{name}{LICENCE}").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        return ""
    found = _IDENTIFIER.search(text)
    return found[1].strip() if found else ""


def pair_records(pairs: PairFile, sides: Sides, streaming: bool = False) -> Iterator[Record]:
    """Yields the raw pairs of a file in order.

    A file that turns unreadable half-way ends with a broken record that says so.
    Raises UserError for two files that do not have the same number of lines, and for a hub data
    set that cannot be loaded or lacks a column.
    """
    shard = pairs.file
    if pairs.problem:
        yield broken(shard, 0, pairs.problem)
        return
    if shard.kind == "hub":
        yield from hub_rows(shard, sides, streaming)
        return
    line = 0
    try:
        for record in _records(pairs, sides):
            line = record.line
            yield record
    except UserError:
        raise
    except (OSError, ValueError) as error:
        yield broken(shard, line + 1 if line else 0, f"unreadable from here on: {error}")


def _records(pairs: PairFile, sides: Sides) -> Iterator[Record]:
    shard = pairs.file
    if pairs.other:
        return _lines(shard, pairs.other)
    if shard.kind == "text":
        found = catalogue_messages(shard.name)
        return (Record(shard.name, shard.group, line, (one, two)) for line, one, two in found)
    if shard.kind == "json":
        return json_lines(shard)
    if shard.kind == "csv":
        return csv_rows(shard, sides, numbered=all(name.isdecimal() for name in sides))
    return parquet_rows(shard, sides)


def _lines(shard: InputFile, other: str) -> Iterator[Record]:
    """Line by line; a line ends with \\n or \\r\\n, whatever else may look like one."""
    counts = [0, 0]
    with open_binary(shard.name) as sources, open_binary(other) as targets:
        for line, both in enumerate(zip_longest(sources, targets), start=1):
            counts = [count + (one is not None) for count, one in zip(counts, both, strict=True)]
            if counts[0] == counts[1]:
                one, two = (text.rstrip(b"\r\n") for text in both)
                if line == 1:
                    one, two = one.removeprefix(BOM), two.removeprefix(BOM)
                yield Record(shard.name, shard.group, line, (one, two))
    if counts[0] != counts[1]:
        uneven = f"{shard.name} has {counts[0]} lines and {other} has {counts[1]}"
        raise UserError(f"{uneven}, so that they are not each other's translation: give files line by line")


def pair_of(record: Record, sides: Sides) -> tuple[str, str] | Broken:
    """The two texts of a raw pair, or why there are none."""
    raw = record.raw
    if isinstance(raw, Broken):
        return raw
    try:
        if isinstance(raw, bytes):
            raw = parse_json(raw, sides)
        assert isinstance(raw, tuple)
        texts = [_text(value, name) for value, name in zip(raw, sides, strict=True)]
        return texts[0], texts[1]
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        return Broken(record.file, record.line, f"no valid text in UTF-8: {reason}")
    except (ValueError, RecursionError) as error:
        return Broken(record.file, record.line, str(error))


def _text(value: object, name: str) -> str:
    text = value.decode() if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise ValueError(f"{name!r} is {type(text).__name__}, not a string")
    text.encode()  # lone surrogates are no text
    return text


def _side(name: Path, sides: Sides) -> int | None:
    """Whether a text file is one of sources (0) or of targets (1), by its suffix."""
    plain = name.with_suffix("") if compression(name) else name
    return next((side for side, own in enumerate(sides) if plain.name.endswith(f".{own}")), None)


def _partner(name: Path, own: str, other: str) -> str:
    """The file that goes with a text file, compressed alike or otherwise; empty for none."""
    packed = name.suffix if compression(name) else ""
    stem = name.name.removesuffix(packed).removesuffix(f".{own}")
    for suffix in dict.fromkeys((packed, "", *DECODERS)):
        path = name.with_name(f"{stem}.{other}{suffix}")
        if path.is_file():
            return str(path)
    return ""
