"""Documents in the rows of tables: CSV, Parquet, and data sets of the `datasets` library."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from model.errors import UserError
from pretrain.data.reading.compressed import open_binary
from pretrain.data.reading.file_kinds import HEAD, inner_suffix, looks_like
from pretrain.data.reading.inputs import InputFile
from pretrain.data.reading.raw_record import Broken, Record, broken, value_of

if TYPE_CHECKING:
    import pyarrow


def csv_records(shard: InputFile, text_key: str) -> Iterator[Record]:
    """The rows of a CSV or TSV file with a header. Raises OSError as `open_binary` does."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if inner_suffix(shard.name) == ".tsv" else ","
    with (
        open_binary(shard.name) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines,
    ):
        reader = csv.reader(lines, delimiter=delimiter)
        header = next(reader, [])
        if text_key not in header:
            head = ",".join(header).encode(errors="surrogateescape")[:HEAD]
            yield broken(shard, 1, looks_like(head) or _no_column(text_key, header))
            return
        column = header.index(text_key)
        line = reader.line_num + 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield broken(shard, line, f"bad CSV: {error}")
            else:
                if row and len(row) != len(header):
                    reason = f"bad CSV: {len(row)} fields where the header has {len(header)}"
                    yield broken(shard, line, reason)
                elif row:
                    yield Record(shard.name, shard.group, line, row[column])
            line = reader.line_num + 1


def parquet_records(shard: InputFile, text_key: str) -> Iterator[Record]:
    """The rows of a Parquet file. Raises OSError or ValueError for one that cannot be read."""
    import pyarrow

    try:
        yield from _parquet_rows(shard, text_key)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _parquet_rows(shard: InputFile, text_key: str) -> Iterator[Record]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(shard.name) as file:
        columns = file.schema_arrow.names
        column = _column_of(text_key, columns)
        if column is None:
            yield broken(shard, 0, _no_column(text_key, columns))
            return
        row = 0
        for batch in file.iter_batches(columns=[column], batch_size=1000):
            for value in _values(batch.column(column)):
                row += 1
                if isinstance(value, str) and column == text_key:
                    yield Record(shard.name, shard.group, row, value)
                else:
                    yield _cell(shard.name, shard.group, row, {column: value}, text_key)


def _values(array: pyarrow.Array) -> list[object]:
    """The values of an Arrow array. Text that is not UTF-8 is given as its bytes."""
    import pyarrow

    try:
        values: list[object] = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(pyarrow.large_binary()).to_pylist()
    return values


def hub_records(shard: InputFile, text_key: str, streaming: bool) -> Iterator[Record]:
    """The rows of a data set of the `datasets` library. Raises UserError where it has none."""
    import datasets

    name, _, rest = shard.name.partition(":")
    config, _, split = rest.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train", streaming=streaming)
    except (OSError, ValueError, ImportError) as error:
        neither = "no such file or folder, and the datasets library cannot load a data set of that name"
        raise UserError(f"INPUT {shard.name}: {neither}: {error}") from error
    if table.features is not None:
        columns = list(table.features)
        column = _column_of(text_key, columns)
        if column is None:
            reason = _no_column(text_key, columns)
            raise UserError(f"INPUT {shard.name}: {reason}; choose one with --text-key")
        table = table.select_columns([column])
    for row, entry in enumerate(table, start=1):
        yield _cell(shard.group, shard.group, row, entry, text_key)


def _cell(file: str, group: str, row: int, entry: Mapping[str, object], text_key: str) -> Record:
    """The text of one row. A binary column holds its UTF-8."""
    try:
        value = value_of(entry, text_key)
        return Record(file, group, row, value.decode() if isinstance(value, bytes) else value)
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
