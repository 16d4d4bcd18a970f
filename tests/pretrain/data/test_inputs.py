from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

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


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), *PACK.items(), (".GZ", gzip.compress)])
def test_json_lines_and_text_files_plain_and_compressed(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(json_lines(TEXTS) + b"\n"))
    (tmp_path / f"b.txt{suffix}").write_bytes(pack(TEXTS[1].encode("utf-8-sig")))
    assert read(tmp_path / f"a.jsonl{suffix}", tmp_path / f"b.txt{suffix}") == ([*TEXTS, TEXTS[1]], [])
    # Several frames, as parallel compressors and `cat` write them, with a line across the border.
    half = len(json_lines(TEXTS)) // 2
    parts = pack(json_lines(TEXTS)[:half]), pack(b""), pack(json_lines(TEXTS)[half:])
    (tmp_path / f"c.jsonl{suffix}").write_bytes(b"".join(parts))
    assert read(tmp_path / f"c.jsonl{suffix}") == (TEXTS, [])


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_that_are_cut_or_damaged(tmp_path: Path, suffix: str) -> None:
    """What can be read is, and the rest is one broken record, wherever the file ends."""
    texts = [os.urandom(500).hex() for _ in range(200)]
    frame = PACK[suffix](json_lines(texts))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in (0, 1, 10, len(frame) // 2, len(frame) - 1):
        path.write_bytes(frame[:cut])
        found, broken = read(path)
        assert found == texts[: len(found)]
        assert [entry.line for entry in broken] == [len(found) + 1 if found else 0]
        assert "unreadable from here on: cut off" in broken[0].reason
    # A whole frame is read, whatever follows it: half a frame, a damaged one, or no frame at all.
    for rest in (frame[:20], b"\xff\xff\xff\xff" + frame[4:], b"plain text"):
        path.write_bytes(frame + rest)
        found, broken = read(path)
        assert found == texts
        assert [entry.line for entry in broken] == [201]
    path.write_bytes(frame[: len(frame) // 2] + b"\0" * 64 + frame[len(frame) // 2 + 64 :])
    assert len(read(path)[1]) >= 1
    (tmp_path / f"b.txt{suffix}").write_bytes(b"plain text")
    assert f"no {suffix} data, or damaged" in read(tmp_path / f"b.txt{suffix}")[1][0].reason


def test_names_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_bytes(json_lines(TEXTS))
    (tmp_path / "B.CSV").write_text("id,text\n1,one\n")
    (tmp_path / "C.Tsv.GZ").write_bytes(gzip.compress(b"id\ttext\n1,2\ttwo\n"))
    assert read(tmp_path) == ([*TEXTS, "one", "two"], [])


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


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (json.dumps([{"text": "a"}, {"text": "b"}]), r"jq -c '.\[\]'"),
        (json.dumps([{"text": "a"}, {"text": "b"}], indent=1), r"jq -c '.\[\]'"),
        ('[{"text": "a"},\n{"text": "b"}]', r"jq -c '.\[\]'"),
        (json.dumps({"text": "a"}, indent=1), "jq -c . "),
    ],
)
def test_json_that_is_not_in_lines_is_one_hint(tmp_path: Path, content: str, hint: str) -> None:
    (tmp_path / "a.json").write_text(content)
    texts, broken = read(tmp_path / "a.json")
    assert (texts, len(broken)) == ([], 1)
    assert re.search(hint, broken[0].reason)


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
        ("absent.JSONL.GZ", "no such file"),
        ("data [v1]/*.txt", r"no file matches this pattern; a \[ that stands for itself is written \[\[\]"),
        ("n" * 5000, "File name too long"),
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
    assert given[:200] in str(caught.value)


def test_no_input_and_unknown_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to read"):
        find_sources([])
    with pytest.raises(UserError, match="cannot load a data set of that name"):
        read(f"hf://{tmp_path / 'absent'}")


NO_TEXT = {
    "a.zip": "an archive: unpack it first",
    "b.tar.gz": "an archive",
    "c.PNG": "no text but an image",
    "d.jsonl.lz4": "compressed in a way that is not read here",
    "e.pdf": "take the text out first",
    "f.npy": "no text but numbers",
    "gone": "a link to something that is not there",
    "pipe": "no regular file",
    # These have no name that gives them away.
    "archive": "not text: there is a zero byte at",
    "packed": "not text: looks like gzip data: name it .gz",
    "packed.jsonl": "looks like gzip data: name it .gz",
    "wide.txt": "UTF-16, not UTF-8: convert it",
}


def test_what_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    for name in [*list(NO_TEXT)[:6], "good.txt"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "gone").symlink_to(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    with tarfile.open(tmp_path / "archive", "w") as archive:
        archive.add(tmp_path / "good.txt")
    (tmp_path / "packed").write_bytes(gzip.compress(b"text"))
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(json_lines(TEXTS)))
    (tmp_path / "wide.txt").write_text("text", encoding="utf-16")
    texts, broken = read(tmp_path)
    reasons = {Path(entry.file).name: entry.reason for entry in broken}
    assert texts == ["x"]
    assert {name for name, reason in NO_TEXT.items() if reason in reasons[name]} == set(NO_TEXT)
    assert len(broken) == len(NO_TEXT)
    for name in ("a.zip", "b.tar.gz", "c.PNG", "pipe"):
        with pytest.raises(UserError, match=f"INPUT .*{name}: {NO_TEXT[name]}"):
            read(tmp_path / name)


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    for name in ("in/real/a.txt", "far/b.txt", "far/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in" / "real")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(tmp_path / "in")
    source = find_sources([str(tmp_path / "in")])[0]
    assert [shard.group for shard in source.shards] == ["link/b.txt", "link/deep/c.txt", "real/a.txt"]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "only").symlink_to(tmp_path / "far" / "deep")
    assert read(tmp_path / "links") == (["far/deep/c.txt"], [])


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        ("README.md LICENSE dataset_info.json data/a.parquet", "LICENSE README.md dataset_info.json"),
        ("red/README.md red/a.jsonl.gz blue/README blue/b.csv", "blue/README red/README.md"),
        ("README.md train.json", "README.md"),
        ("README.md package.json main.py", ""),
        ("README.md data.txt", ""),
        ("code/README.md code/main.py tables/a.csv", ""),
    ],
)
def test_what_only_describes_the_data_is_left_out_and_named(
    tmp_path: Path, files: str, left_out: str
) -> None:
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    source = find_sources([str(tmp_path)])[0]
    assert source.left_out == tuple(str(tmp_path / name) for name in left_out.split())
    assert {shard.group for shard in source.shards} == set(files.split()) - set(left_out.split())
    named = tmp_path / files.split(maxsplit=1)[0]
    assert len(find_sources([str(named)])[0].shards) == 1, "a file that is named is read"


def test_the_standard_library_is_there() -> None:
    files = standard_library_files()
    assert files == sorted(files)
    assert len(files) > 300
    assert {"argparse.py", "inspect.py"} <= {path.name for path in files}
    assert not any("site-packages" in path.parts for path in files)
    assert all(stat.S_ISREG(path.stat().st_mode) for path in files)
    assert not read(*files)[1]
