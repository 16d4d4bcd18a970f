"""Documents in lines of JSON and in files."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from tests.pretrain.data.reading.files import json_lines, read


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
