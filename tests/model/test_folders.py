from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from model import folders
from model.errors import UserError
from model.folders import FolderKind, check_target, whole_folder

LETTERS = FolderKind(what="a letter", marker="letter.txt", advice="burn it first", option="--to")
ONCE = FolderKind(what="a vow", marker=None, advice="it stands")


def nothing() -> None:
    pass


def write(
    out: Path,
    text: str,
    kind: FolderKind = LETTERS,
    replace: bool = False,
    meanwhile: Callable[[], object] = nothing,
) -> None:
    with whole_folder(out, kind, replace) as folder:
        (folder / "letter.txt").write_text(text)
        meanwhile()


def fail(error: BaseException) -> None:
    raise error


def contents(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_a_folder_appears_at_once_and_replaces_its_like_on_request(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a"
    with whole_folder(out, LETTERS) as folder:
        (folder / "letter.txt").write_text("first")
        assert folder.parent == out.parent
        assert not out.exists()
    with pytest.raises(UserError, match=f"--to {out}: a letter is there already; burn it first"):
        write(out, "second")
    write(out, "third", replace=True)
    assert contents(tmp_path) == {"new/a/letter.txt": "third"}
    assert os.listdir(tmp_path / "new") == ["a"]


def test_whether_a_folder_can_be_written_is_tried_before_the_work(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / ("n" * 250), LETTERS)
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "a", Path("/proc/a")):
        with pytest.raises(UserError, match=f"--to {out}: cannot write to {out.parent}: "):
            check_target(out, LETTERS)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("kind", [LETTERS, ONCE])
@pytest.mark.parametrize("before", [False, True])
def test_what_is_no_such_folder_is_never_replaced(
    tmp_path: Path,
    kind: FolderKind,
    replace: bool,
    before: bool,
) -> None:
    """Whether it was there before, or came while the folder was written."""
    for occupied in (tmp_path / "folder" / "thesis.tex", tmp_path / "file"):
        out = tmp_path / occupied.relative_to(tmp_path).parts[0]

        def occupy(path: Path = occupied) -> None:
            assert not path.exists(), "not refused before the work began"
            path.parent.mkdir(exist_ok=True)
            path.write_text("years of work")

        if before:
            occupy()
        with pytest.raises(UserError, match=str(out)):
            write(out, "x", kind, replace, occupy)
    assert contents(tmp_path) == {"folder/thesis.tex": "years of work", "file": "years of work"}
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_of_two_at_once_the_first_stays(tmp_path: Path) -> None:
    def another() -> None:
        thread = threading.Thread(target=write, args=(tmp_path / "a", "quick"))
        thread.start()
        thread.join()

    with pytest.raises(UserError, match="a letter is there already"):
        write(tmp_path / "a", "slow", meanwhile=another)
    assert contents(tmp_path) == {"a/letter.txt": "quick"}


def test_a_folder_exchanged_in_the_last_moment_is_put_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the look at the old folder and its removal."""
    write(tmp_path / "a", "old")
    beside = folders._beside

    def exchange(out: Path, suffix: str, name: str) -> Path:
        if suffix == "old":
            (out / "letter.txt").rename(out / "thesis.tex")
        return beside(out, suffix, name)

    monkeypatch.setattr(folders, "_beside", exchange)
    with pytest.raises(UserError, match="something else wrote there meanwhile"):
        write(tmp_path / "a", "new", replace=True)
    assert contents(tmp_path) == {"a/thesis.tex": "old"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written: No space left"),
        (Exception("No space left on device (os error 28)"), "cannot be written: No space left"),
        (KeyError("bug"), "bug"),
        (KeyboardInterrupt("key"), "key"),
    ],
)
def test_a_failure_leaves_nothing_and_a_full_disk_is_one_line(
    tmp_path: Path,
    error: BaseException,
    message: str,
) -> None:
    kind = UserError if "cannot" in message else type(error)
    with pytest.raises(kind, match=message):
        write(tmp_path / "new" / "a", "half", meanwhile=lambda: fail(error))
    assert os.listdir(tmp_path) == []


def test_links_lead_to_the_folder_and_impossible_places_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big disk")
    write(tmp_path / "link", "first")
    write(tmp_path / "link", "second", replace=True)
    assert contents(tmp_path / "big disk") == {"letter.txt": "second"}
    assert (tmp_path / "link").is_symlink()
    for out in (tmp_path / ("n" * 5000), Path("/proc/none/a"), tmp_path / "big disk" / "letter.txt" / "a"):
        with pytest.raises(UserError, match="--to .*: cannot"):
            write(out, "x")


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "a", LETTERS) as folder:
            (folder / "sub").mkdir(mode=0o700)
            for name, mode in (("private", 0o600), ("sub/program", 0o755), ("readonly", 0o400)):
                (folder / name).write_text("x")
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"a": 0o750, "sub": 0o750, "private": 0o640, "readonly": 0o640, "program": 0o750}
