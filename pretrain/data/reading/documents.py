"""Reading documents, in two halves.

`records` walks an input in order and yields raw records, cheaply.
`resolve` turns one raw record into text, or says what is wrong with it, in the worker processes.
Nothing here imports torch or Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.reading.compressed import open_binary
from pretrain.data.reading.file_kinds import HEAD, looks_like
from pretrain.data.reading.inputs import InputFile
from pretrain.data.reading.raw_record import Broken, Record, broken, value_of
from pretrain.data.reading.tables import csv_rows, hub_rows, parquet_rows, single

__all__ = ["Broken", "Record", "records", "text_of"]

ARRAY = "a JSON array, not one object on each line: convert it, for example `jq -c '.[]' IN > OUT.jsonl`"
PRETTY = "a JSON object over several lines: convert it, for example `jq -c . IN > OUT.jsonl`"


def records(shard: InputFile, text_key: str = "text", streaming: bool = False) -> Iterator[Record]:
    """Yields the raw records of a shard in order.

    A file that turns unreadable half-way ends with a broken record that says so.
    Raises UserError for a hub data set that cannot be loaded or has no column `text_key`.
    """
    if shard.problem:
        yield broken(shard, 0, shard.problem)
    elif shard.kind == "text":
        yield Record(shard.name, shard.group, 0, Path(shard.name))
    elif shard.kind == "hub":
        yield from single(hub_rows(shard, (text_key,), streaming))
    else:
        line = 0
        try:
            for record in _rows(shard, text_key):
                line = record.line
                yield record
        except (OSError, ValueError) as error:
            yield broken(shard, line + 1 if line else 0, f"unreadable from here on: {error}")


def _rows(shard: InputFile, text_key: str) -> Iterator[Record]:
    if shard.kind == "json":
        return json_lines(shard)
    return single((csv_rows if shard.kind == "csv" else parquet_rows)(shard, (text_key,)))


def text_of(record: Record, text_key: str = "text") -> tuple[str, bytes] | Broken:
    """Returns a record's text, as a string and in UTF-8, or why there is none."""
    raw = record.raw
    if isinstance(raw, Broken):
        return raw
    try:
        if isinstance(raw, Path):
            raw = _whole_file(raw)
        elif isinstance(raw, bytes):
            (raw,) = parse_json(raw, (text_key,))
        if not isinstance(raw, str):
            raise ValueError(f"{text_key!r} is {type(raw).__name__}, not a string")
        return raw, raw.encode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
    except UnicodeEncodeError as error:
        reason = f"not valid Unicode: {error.reason} at character {error.start}"
    except OSError as error:
        reason = f"unreadable: {error}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    return Broken(record.file, record.line, reason)


def _whole_file(path: Path) -> str:
    """The text of a file. Raises ValueError for one that is none, OSError as `open_binary`."""
    with open_binary(path) as file:
        data = file.read()
    if reason := looks_like(data[:HEAD]):
        raise ValueError(f"not text: {reason}")
    if (place := data.find(0)) >= 0:
        raise ValueError(f"not text: there is a zero byte at {place}")
    return data.decode("utf-8-sig")


def json_lines(shard: InputFile) -> Iterator[Record]:
    """The lines of a file of JSON objects. Raises OSError as `open_binary` does."""
    with open_binary(shard.name) as file:
        first = True
        for line, raw in enumerate(file, start=1):
            if raw.isspace():
                continue
            if first and (reason := looks_like(raw[:HEAD]) or _over_several_lines(raw)):
                yield broken(shard, 0, reason)
                return
            first = False
            yield Record(shard.name, shard.group, line, raw)


def _over_several_lines(first: bytes) -> str:
    """What is wrong where a JSON file's first line begins an array or object that others end."""
    first = first.removeprefix(b"\xef\xbb\xbf").strip()
    if first not in (b"[", b"{") and not first.startswith(b"["):
        return ""
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return ARRAY if first.startswith(b"[") else PRETTY
    return ""  # an array on one line is judged like any other line


def parse_json(raw: bytes, keys: Sequence[str]) -> tuple[object, ...]:
    """The values of some keys of a JSON object. Raises ValueError for what lacks one."""
    try:
        entry = json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"bad JSON: {error.msg} at column {error.colno}") from error
    if isinstance(entry, list):
        raise ValueError(f"not a JSON object but list: {ARRAY}")
    if not isinstance(entry, dict):
        raise ValueError(f"not a JSON object but {type(entry).__name__}")
    return tuple(value_of(entry, key) for key in keys)
