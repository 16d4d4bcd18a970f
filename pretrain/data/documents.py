"""Reading documents, in two halves.

`records` walks an input in order and yields raw records, cheaply; `resolve` turns one raw record into text, or says what is wrong with it, and runs in
the worker processes. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from model.errors import UserError
from pretrain.data.inputs import COMPRESSIONS, Shard

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


class Broken(NamedTuple):
    """A record that gave no document, and why. line is 1-based (a row of a table); 0: the whole file."""

    file: str
    line: int
    reason: str

    @property
    def place(self) -> str:
        """The whole complaint in one line."""
        return f"{self.file}:{self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class Record(NamedTuple):
    """One document as found. raw: a path whose content is the document, a JSON line, a value of a table's text column, or what is broken about it."""

    file: str
    group: str
    line: int
    raw: Path | bytes | Broken | Any


def records(shard: Shard, text_key: str = "text", streaming: bool = False) -> Iterator[Record]:
    """Yields the raw records of a shard in order. A file that turns unreadable half-way ends with a broken record that says so.

    Raises UserError for a hub data set that cannot be loaded or has no column `text_key`.
    """
    if shard.kind == "text":
        yield Record(shard.name, shard.group, 0, Path(shard.name))
    elif shard.kind == "hub":
        yield from _hub_records(shard, text_key, streaming)
    else:
        reader = {"json": _json_records, "csv": _csv_records, "parquet": _parquet_records}[shard.kind]
        line = 0
        try:
            for record in reader(shard, text_key):
                line = record.line
                yield record
        except (*UNREADABLE, ValueError) as error:
            yield _broken(shard, line + 1 if line else 0, f"unreadable from here on: {error}")


def resolve(record: Record, text_key: str = "text") -> tuple[str, bytes] | Broken:
    """Returns a record's text, as a string and in UTF-8, or why there is none."""
    raw = record.raw
    if isinstance(raw, Broken):
        return raw
    try:
        if isinstance(raw, Path):
            with open_binary(raw) as file:
                raw = file.read().decode("utf-8-sig")
        elif isinstance(raw, bytes):
            raw = _parse_json(raw, text_key)
        if not isinstance(raw, str):
            raise ValueError(f"{text_key!r} is {type(raw).__name__}, not a string")
        return raw, raw.encode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
    except UnicodeEncodeError as error:
        reason = f"not valid Unicode: {error.reason} at character {error.start}"
    except UNREADABLE as error:
        reason = f"unreadable: {error}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    return Broken(record.file, record.line, reason)


def open_binary(path: str | Path) -> IO[bytes]:
    """Opens a local file for reading, decompressed according to its name. Raises OSError as the file system does."""
    import fsspec  # type: ignore[import-untyped]

    return cast(
        "IO[bytes]", fsspec.open(str(path), "rb", compression=COMPRESSIONS.get(Path(path).suffix)).open()
    )


def _broken(shard: Shard, line: int, reason: str) -> Record:
    return Record(shard.name, shard.group, line, Broken(shard.name, line, reason))


def _json_records(shard: Shard, text_key: str) -> Iterator[Record]:
    with open_binary(shard.name) as file:
        for line, raw in enumerate(file, start=1):
            if not raw.isspace():
                yield Record(shard.name, shard.group, line, raw)


def _parse_json(raw: bytes, text_key: str) -> Any:
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object but {type(entry).__name__}")
    if text_key not in entry:
        raise ValueError(
            f"no key {text_key!r}; the keys are {', '.join(map(repr, list(entry)[:8])) or 'none'}"
        )
    return entry[text_key]


def _csv_records(shard: Shard, text_key: str) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    suffixes = Path(shard.name).suffixes
    with (
        open_binary(shard.name) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        reader = csv.reader(lines, delimiter="\t" if ".tsv" in suffixes else ",")
        header = next(reader, [])
        if text_key not in header:
            yield _broken(shard, 1, _no_column(text_key, header))
            return
        column = header.index(text_key)
        line = reader.line_num + 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _broken(shard, line, f"bad CSV: {error}")
            else:
                if row and len(row) != len(header):
                    yield _broken(
                        shard, line, f"bad CSV: {len(row)} fields where the header has {len(header)}"
                    )
                elif row:
                    yield Record(shard.name, shard.group, line, row[column])
            line = reader.line_num + 1


def _parquet_records(shard: Shard, text_key: str) -> Iterator[Record]:
    import datasets

    table = datasets.load_dataset(
        "parquet", data_files=glob.escape(shard.name), split="train", streaming=True
    )
    if text_key not in table.features:
        yield _broken(shard, 0, _no_column(text_key, list(table.features)))
        return
    row = 0
    for batch in table.select_columns([text_key]).with_format("arrow").iter(batch_size=1000):
        for value in batch.column(0).to_pylist():
            row += 1
            yield Record(shard.name, shard.group, row, value)


def _hub_records(shard: Shard, text_key: str, streaming: bool) -> Iterator[Record]:
    import datasets

    name, _, rest = shard.name.partition(":")
    config, _, split = rest.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"INPUT {shard.name}: no such file or folder, and the datasets library cannot load a data set of that name: {error}"
        ) from error
    if table.features is not None:
        if text_key not in table.features:
            raise UserError(
                f"INPUT {shard.name}: {_no_column(text_key, list(table.features))}; choose one with --text-key"
            )
        table = table.select_columns([text_key])
    for row, entry in enumerate(table, start=1):
        if text_key in entry:
            yield Record(shard.group, shard.group, row, entry[text_key])
        else:
            yield Record(
                shard.group, shard.group, row, Broken(shard.group, row, _no_column(text_key, list(entry)))
            )


def _no_column(text_key: str, columns: list[str]) -> str:
    return f"no column {text_key!r}; the columns are {', '.join(map(repr, columns[:20])) or 'none'}"
