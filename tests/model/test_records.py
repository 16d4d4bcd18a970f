from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from model.errors import UserError
from model.files import atomic_write_text, check_output, inside
from model.records import Record, read_record


class Facts(Record):
    tokens: int
    rate: float = 1.0
    splits: dict[str, tuple[int, int]] | None = None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "damaged"),
        ("[]", "the whole"),
        ("null", "the whole"),
        ('{"tokens": "3"}', "tokens"),
        ('{"tokens": 3, "rate": NaN}', "rate"),
        ('{"tokens": 3, "splits": {"train": [1]}}', "splits.train"),
        ("[" * 100_000, "damaged"),
        ("\udcff", "damaged"),
    ],
)
def test_damaged_json_is_one_line_that_names_the_key(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=named) as error:
        read_record(path, Facts, "make it anew")
    assert "make it anew" in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_sound_json_is_read_and_unknown_keys_are_left(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"tokens": 3, "splits": {"train": [1, 2]}, "later": 1}))
    assert read_record(path, Facts, "") == Facts(tokens=3, splits={"train": (1, 2)})


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        read_record(tmp_path / "pipe", Facts, "")


@pytest.mark.parametrize("name", ["", "../x", "/etc/passwd", "a/../../x", "link/x", "a\0b"])
def test_names_that_lead_out_of_a_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="leads out"):
        inside(folder, name)
    assert inside(folder, "a/b") == folder / "a" / "b"


def test_whether_a_file_can_be_written_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for fine in ("old.json", "new.json", "a/b/new.json"):
        check_output(tmp_path / fine, "--json")
    for wrong, reason in (
        ("/dev/full", "--json /dev/full is no regular file: name a file"),
        (tmp_path, "is no regular file"),
        (tmp_path / "old.json/x", "old.json/x: cannot write to .*old.json: Not a directory; name another"),
        ("/proc/x/y.json", "--json /proc/x/y.json: cannot write to /proc: "),
        (tmp_path / ("n" * 250), "File name too long"),
        (tmp_path / ("n" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=reason):
            check_output(wrong, "--json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.json", "old")]


def test_new_files_have_the_modes_that_the_umask_leaves(tmp_path: Path) -> None:
    for mask, mode in ((0o077, 0o600), (0o002, 0o664), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            atomic_write_text(tmp_path / "file", "x")
        finally:
            os.umask(before)
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_devices_pipes_and_folders_are_not_replaced_by_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link", "."):
        with pytest.raises(UserError, match="no regular file"):
            atomic_write_text(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
