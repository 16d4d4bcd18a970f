"""The secret of a run: who makes it, who may read it, and whose file is not taken."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.errors import UserError
from parallel.launch import secret
from parallel.launch.secret import run_secret


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_SECRET", raising=False)


def test_all_ranks_have_one_secret_that_others_cannot_read(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        with ThreadPoolExecutor(8) as ranks:
            found = set(ranks.map(lambda _: run_secret(tmp_path / "control"), range(8)))
    finally:
        os.umask(previous)
    assert len(found) == 1
    assert len(found.pop()) == 64
    assert stat.S_IMODE((tmp_path / "control" / "secret").stat().st_mode) == 0o600
    assert run_secret(tmp_path / "other") != run_secret(tmp_path / "control")


def test_the_environment_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FATHOM_SECRET", "known")
    assert run_secret(tmp_path / "control") == "known"
    assert not (tmp_path / "control").exists()


def test_what_another_user_has_put_there_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("0" * 64)
    (tmp_path / "secret").symlink_to(elsewhere)
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        run_secret(tmp_path)
    (tmp_path / "secret").unlink()
    os.mkfifo(tmp_path / "secret")
    with pytest.raises(UserError, match="secret was not made by this user"):
        run_secret(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_taken(tmp_path: Path) -> None:
    run_secret(tmp_path)
    os.chown(tmp_path / "secret", 65534, 65534)
    with pytest.raises(UserError, match="secret was not made by this user: remove it, and start again"):
        run_secret(tmp_path)


@pytest.mark.parametrize("content", ["", "0" * 63, "0" * 65])
def test_a_damaged_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(secret, "PATIENCE_SECONDS", 0.0)
    (tmp_path / "secret").write_text(content)
    with pytest.raises(UserError, match="secret is damaged: remove it, and start again"):
        run_secret(tmp_path)
