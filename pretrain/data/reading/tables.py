"""Documents in the rows of tables: CSV, Parquet, and data sets of the `datasets` library."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from model.errors import UserError
from pretrain.data.reading.compressed import open_binary
from pretrain.data.reading.file_kinds import HEAD, inner_suffix, looks_like
from pretrain.data.reading.hub import load_named
from pretrain.data.reading.inputs import InputFile
from pretrain.data.reading.raw_record import Broken, Record, broken, value_of

if TYPE_CHECKING:
    import pyarrow

ROWS, ROWS_OF_SOUND = 1000, 16
"""Of Parquet read at once: texts, and what may be a recording of a megabyte in each."""


class _Reader(Protocol):
    """What the csv module reads with."""

    line_num: int

    def __next__(self) -> list[str]: ...


def single(rows: Iterator[Record]) -> Iterator[Record]:
    """Rows of one column as its values."""
    for row in rows:
        yield row._replace(raw=row.raw[0]) if isinstance(row.raw, tuple) and len(row.raw) == 1 else row


def csv_rows(shard: InputFile, keys: Sequence[str], numbered: bool = False) -> Iterator[Record]:
    """The values of some columns in the rows of a CSV or TSV file.

    keys: names in the header.
    numbered: they are numbers from 1 on, of a file without one; quotes in a TSV file are text then.
    Raises OSError as `open_binary` does.
    """
    csv.field_size_limit(sys.maxsize)
    tabs = inner_suffix(shard.name) == ".tsv"
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and numbered else csv.QUOTE_MINIMAL
    with (
        open_binary(shard.name) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        reader = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting)
        if numbered:
            yield from _fields(shard, reader, [int(key) - 1 for key in keys], None)
            return
        header = next(reader, [])
        if missing := next((key for key in keys if key not in header), ""):
            head = ",".join(header).encode(errors="surrogateescape")[:HEAD]
            yield broken(shard, 1, looks_like(head) or _no_column(missing, header))
            return
        yield from _fields(shard, reader, [header.index(key) for key in keys], len(header))


def _fields(shard: InputFile, reader: _Reader, columns: list[int], width: int | None) -> Iterator[Record]:
    """The rows that a reader has not read. width: of each; None: any that has the columns."""
    line = reader.line_num + 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield broken(shard, line, f"bad CSV: {error}")
        else:
            if row and len(row) != width and (width is not None or len(row) <= max(columns)):
                wanted = f"the header has {width}" if width is not None else f"{max(columns) + 1} are needed"
                yield broken(shard, line, f"bad CSV: {len(row)} fields where {wanted}")
            elif row and min(columns) < 0:
                yield broken(shard, line, "columns are counted from 1")
                return
            elif row:
                yield Record(shard.name, shard.group, line, tuple(row[column] for column in columns))
        line = reader.line_num + 1


def parquet_rows(shard: InputFile, keys: Sequence[str]) -> Iterator[Record]:
    """The values of some columns in the rows of a Parquet file.

    Raises OSError or ValueError for a file that cannot be read.
    """
    import pyarrow

    try:
        yield from _parquet_rows(shard, keys)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _parquet_rows(shard: InputFile, keys: Sequence[str]) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_struct

    with ParquetFile(shard.name) as file:
        names = file.schema_arrow.names
        columns = [_column_of(key, names) for key in keys]
        if None in columns:
            yield broken(shard, 0, _no_column(keys[columns.index(None)], names))
            return
        row = 0
        wanted = [column for column in dict.fromkeys(columns) if column is not None]
        nested = any(is_struct(file.schema_arrow.field(column).type) for column in wanted)
        for batch in file.iter_batches(columns=wanted, batch_size=ROWS_OF_SOUND if nested else ROWS):
            for values in zip(*(_values(batch.column(column)) for column in wanted), strict=True):
                row += 1
                yield _cells(shard.name, shard.group, row, dict(zip(wanted, values, strict=True)), keys)


def _values(array: pyarrow.Array) -> list[object]:
    """The values of an Arrow array. Text that is not UTF-8 is given as its bytes."""
    import pyarrow

    try:
        values: list[object] = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pyarrow.large_binary()).to_pylist()
    return values


def hub_rows(shard: InputFile, keys: Sequence[str], streaming: bool) -> Iterator[Record]:
    """The values of some columns in the rows of a data set of the `datasets` library.

    Raises UserError where it has none.
    """
    import datasets

    name, _, rest = shard.name.partition(":")
    config, _, split = rest.partition(":")
    wanted = split or "train"
    table = load_named(shard.name, name, config or None, split=wanted, streaming=streaming)
    if table.features is not None:
        names = list(table.features)
        columns = [_column_of(key, names) for key in keys]
        if None in columns:
            reason = _no_column(keys[columns.index(None)], names)
            option = "--text-key" if len(keys) == 1 else "--pairs or --speech"
            raise UserError(f"INPUT {shard.name}: {reason}; choose one with {option}")
        table = table.select_columns(list(dict.fromkeys(columns)))
        for name, feature in table.features.items():
            if isinstance(feature, datasets.Audio):  # as it is stored: reading it is the workers' part
                table = table.cast_column(name, datasets.Audio(decode=False))
    for row, entry in enumerate(table, start=1):
        yield _cells(shard.group, shard.group, row, entry, keys)


def _cells(file: str, group: str, row: int, entry: Mapping[str, object], keys: Sequence[str]) -> Record:
    """The texts of one row. A binary column holds its UTF-8."""
    try:
        values = [value_of(entry, key) for key in keys]
        texts = (value.decode() if isinstance(value, bytes) else value for value in values)
        return Record(file, group, row, tuple(texts))
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
    except ValueError as error:
        reason = str(error)
    return Record(file, group, row, Broken(file, row, reason))


def _column_of(text_key: str, columns: list[str]) -> str | None:
    """The column in which a key lies: of its own name, or of the first part of a path."""
    first = text_key.partition(".")[0]
    return next((name for name in (text_key, first) if name in columns), None)


def _no_column(text_key: str, columns: list[str]) -> str:
    return f"no column {text_key!r}; the columns are {', '.join(map(repr, columns[:20])) or 'none'}"
