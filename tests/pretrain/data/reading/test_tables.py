"""Documents in tables."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from tests.pretrain.data.reading.files import TEXTS, read


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_csv(tmp_path: Path, name: str, delimiter: str) -> None:
    with (gzip.open if name.endswith("gz") else open)(
        tmp_path / name, "wt", newline="", encoding="utf-8"
    ) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text"], *([number, text] for number, text in enumerate(TEXTS))])
    assert read(tmp_path / name) == (TEXTS, [])


def test_parquet_and_a_data_set_folder_read_by_the_datasets_library(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": range(4), "text": TEXTS}), tmp_path / "part [1].parquet")
    assert read(tmp_path / "part [1].parquet") == (TEXTS, [])
    assert read(f"hf://{tmp_path}", streaming=True) == (TEXTS, [])
    assert read(f"hf://{tmp_path}:default:train", streaming=True) == (TEXTS, [])
    with pytest.raises(
        UserError, match=r"no column 'body'; the columns are 'id', 'text'; choose one with --text-key"
    ):
        read(f"hf://{tmp_path}", text_key="body", streaming=True)


def test_columns_of_bytes_and_structs_and_tables_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    invalid = pa.array([b"one", b"\xff", b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), path)
    assert [(len(read(path)[0]), [entry.line for entry in read(path)[1]])] == [(2, [2])]
    pq.write_table(pa.table({"text": [b'{"text": 1}', "ö".encode(), b"\xff", None]}), path)
    texts, broken = read(path)
    assert texts == ['{"text": 1}', "ö"]
    assert [(entry.line, entry.reason.split(":")[0]) for entry in broken] == [
        (3, "not UTF-8"),
        (4, "'text' is NoneType, not a string"),
    ]
    pq.write_table(pa.table({"meta": [{"text": "deep"}, {"text": None}], "meta.x": ["flat", "flat"]}), path)
    assert read(path, text_key="meta.text")[0] == ["deep"]
    assert read(path, text_key="meta.x")[0] == ["flat", "flat"]
    assert read(f"hf://{tmp_path}", text_key="meta.text", streaming=True)[0] == ["deep"]
    (tmp_path / "a.jsonl").write_text('{"meta": {"text": "deep"}}\n{"meta": "text"}\n{"meta.text": "flat"}\n')
    texts, broken = read(tmp_path / "a.jsonl", text_key="meta.text")
    assert (texts, [entry.reason for entry in broken]) == (
        ["deep", "flat"],
        ["no key 'meta.text'; the keys are 'meta'"],
    )
    for table in (
        pa.table({"text": pa.array([], pa.string())}),
        pa.table({"body": pa.array([], pa.string())}),
    ):
        pq.write_table(table, path)
        texts, broken = read(path)
        assert texts == []
        assert len(broken) == ("body" in table.column_names)
    for name in ("empty.parquet", "empty.csv"):
        (tmp_path / name).write_bytes(b"")
        assert len(read(tmp_path / name)[1]) == 1


def test_broken_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'id,text\n1,good\n2\n3,"two\nlines"\n4,a,b\n5,bad \xff\n6,end\n')
    texts, broken = read(tmp_path / "a.csv")
    assert texts == ["good", "two\nlines", "end"]
    assert [entry.line for entry in broken] == [3, 6, 7]
    (tmp_path / "b.csv").write_text("id,body\n1,x\n")
    assert [entry.reason for entry in read(tmp_path / "b.csv")[1]] == [
        "no column 'text'; the columns are 'id', 'body'"
    ]
    pq.write_table(pa.table({"text": ["good", None]}), tmp_path / "a.parquet")
    texts, broken = read(tmp_path / "a.parquet")
    assert (texts, [entry.line for entry in broken]) == (["good"], [2])
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    assert "no column 'text'" in read(tmp_path / "b.parquet")[1][0].reason
