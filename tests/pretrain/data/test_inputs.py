from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.errors import UserError
from pretrain.data.documents import Broken, records, resolve
from pretrain.data.inputs import find_sources, standard_library_files

TEXTS = ["first document\n\twith a tab", "  zweites Dokument: äöü 中文 \r\n", 'third, "quoted"', "x"]


def read(
    *inputs: str | Path, text_key: str = "text", streaming: bool = False
) -> tuple[list[str], list[Broken]]:
    texts, broken = [], []
    for source in find_sources([str(given) for given in inputs]):
        for shard in source.shards:
            for record in records(shard, text_key, streaming):
                found = resolve(record, text_key)
                broken.append(found) if isinstance(found, Broken) else texts.append(found[0])
    return texts, broken


def json_lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(texts)
    ).encode()


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_json_lines_and_text_files_plain_and_compressed(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(json_lines(TEXTS) + b"\n"))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(TEXTS[1].encode("utf-8-sig")))
    assert read(tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}") == ([*TEXTS, TEXTS[1]], [])


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


def test_every_broken_json_line_is_reported_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = {
        b'{"text": "good"}': None,
        b'{"text": "cut': "bad JSON",
        b'{"body": 1}': "no key 'text'; the keys are 'body'",
        b'{"text": 7}': "int, not a string",
        b'["text"]': "not a JSON object but list",
        b'{"text": "\xff"}': "not UTF-8",
        rb'{"text": "\ud800"}': "not valid Unicode",
        b"[" * 200_000: "recursion",
        b'{"text": "end"}': None,
    }
    path.write_bytes(b"\n".join(lines))
    texts, broken = read(path)
    assert texts == ["good", "end"]
    assert [(entry.file, entry.line) for entry in broken] == [(str(path), line) for line in range(2, 9)]
    for entry, expected in zip(broken, filter(None, lines.values()), strict=True):
        assert expected in entry.reason
    assert broken[0].place.startswith(f"{path}:2: bad JSON")


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


def test_files_that_turn_unreadable(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(
        gzip.compress(json_lines([os.urandom(500).hex() for _ in range(200)]))[:-2000]
    )
    texts, broken = read(tmp_path / "cut.jsonl.gz")
    assert 0 < len(texts) < 200
    assert [entry.line for entry in broken] == [len(texts) + 1]
    assert "unreadable from here on" in broken[0].reason
    (tmp_path / "a.txt").write_bytes(b"\x80abc")
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 junk")
    texts, broken = read(tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.parquet")
    assert texts == []
    assert [Path(entry.file).name for entry in broken] == ["a.txt", "b.txt.gz", "c.parquet"]


def test_order_groups_and_duplicates(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.txt", "c.txt", ".hidden/x.txt", "__pycache__/x.pyc"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    assert read(tmp_path / "in") == (["a.txt", "b/z.txt", "c.txt"], [])
    assert read(tmp_path / "in" / "c.txt", tmp_path / "in" / "**" / "*.txt")[0] == [
        "c.txt",
        "a.txt",
        "b/z.txt",
    ]
    by_folder, by_glob = (
        find_sources([str(tmp_path / "in")])[0],
        find_sources([str(tmp_path / "in" / "**" / "*.txt")])[0],
    )
    assert (
        [shard.group for shard in by_folder.shards]
        == [shard.group for shard in by_glob.shards]
        == ["a.txt", "b/z.txt", "c.txt"]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("absent.txt", "no such file"),
        ("./absent", "no such file"),
        ("no/such/place", "no such file"),
        ("*.none", "no file matches"),
        ("empty", "the folder holds no files"),
    ],
)
def test_inputs_that_match_nothing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        find_sources([given])
    assert given in str(caught.value)


def test_no_input_and_unknown_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to read"):
        find_sources([])
    with pytest.raises(UserError, match="cannot load a data set of that name"):
        read(f"hf://{tmp_path / 'absent'}")


def test_the_standard_library_is_there() -> None:
    files = standard_library_files()
    assert files == sorted(files)
    assert len(files) > 300
    assert {"argparse.py", "inspect.py"} <= {path.name for path in files}
    assert not any("site-packages" in path.parts for path in files)
    assert all(stat.S_ISREG(path.stat().st_mode) for path in files)
    assert not read(*files)[1]
