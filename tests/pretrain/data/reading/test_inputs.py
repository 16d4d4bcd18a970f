from __future__ import annotations

import gzip
import os
import stat
import tarfile
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.data.reading.inputs import find_sources, standard_library_files
from tests.pretrain.data.reading.files import TEXTS, json_lines, read


def test_names_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_bytes(json_lines(TEXTS))
    (tmp_path / "B.CSV").write_text("id,text\n1,one\n")
    (tmp_path / "C.Tsv.GZ").write_bytes(gzip.compress(b"id\ttext\n1,2\ttwo\n"))
    assert read(tmp_path) == ([*TEXTS, "one", "two"], [])


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
