"""Two starts never work in one run directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.rundir.lock import HeldFolder, InUseError, UnwritableError, check_free, owned
from pretrain.rundir.state import (
    Owner,
    StaleStartError,
    check_owner,
    claim,
    read_state,
    record_failure,
    write_state,
)


def test_the_second_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    check_free(run_dir)
    with owned(run_dir, 0):
        with pytest.raises(InUseError) as refused, owned(run_dir, 0):
            pass
        assert str(refused.value).startswith(f"{run_dir} is in use by process {os.getpid()} on ")
        assert "\n" not in str(refused.value)
        with pytest.raises(InUseError):
            check_free(run_dir)
        with owned(run_dir, 1):  # other ranks leave it to rank 0
            pass
    check_free(run_dir)
    with owned(run_dir, 0):
        pass


def test_a_place_that_cannot_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UnwritableError, match=r"runs_dir: .*/file/run cannot be written \(Not a directory\)"),
        owned(tmp_path / "file" / "run", 0),
    ):
        pass


HOLD = """
import sys, time
from pathlib import Path
from pretrain.rundir.lock import owned
with owned(Path(sys.argv[1]), 0):
    print(1, flush=True)
    time.sleep(600)
"""


@contextmanager
def held_by_another_process(run_dir: Path, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the run directory while the block runs."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, env=dict(os.environ, **env)
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path) as holder:
        with pytest.raises(InUseError, match=f"process {holder.pid} on "):
            check_free(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        check_free(tmp_path)
        with owned(tmp_path, 0):
            pass


def test_a_removed_lock_lets_nobody_in(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path) as holder:
        (tmp_path / ".lock").unlink()
        before = (tmp_path / "state.json").read_text()
        with pytest.raises(InUseError, match=f"in use by process {holder.pid} on "), owned(tmp_path, 0):
            pass
        assert (tmp_path / "state.json").read_text() == before


def test_a_process_that_has_taken_over_the_number_is_another_one(tmp_path: Path) -> None:
    with held_by_another_process(tmp_path):
        state = read_state(tmp_path)
    (tmp_path / "state.json").write_text(json.dumps({**state, "pid": os.getppid()}))
    with owned(tmp_path, 0):
        pass


def test_where_locks_are_missing_the_older_start_is_fenced_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Lustre without flock, from another host."""

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with owned(tmp_path, 0):
        first = Owner.from_environment()
        check_owner(tmp_path, first)
        with owned(tmp_path, 0):
            second = Owner.from_environment()
            assert (first.label, first.start == second.start) == ("local.0", False)
            with pytest.raises(
                StaleStartError, match="belongs to another start now, process .* leaves it alone"
            ):
                check_owner(tmp_path, first)
            check_owner(tmp_path, second)
            with pytest.raises(StaleStartError):
                write_state(tmp_path, first, state="finished")
    assert Owner.from_environment().start == ""


def test_a_second_start_in_the_same_slurm_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in salloc, srun --pty, or a notebook."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with held_by_another_process(tmp_path) as holder:
        before = (tmp_path / "state.json").read_text()
        for _ in range(2):
            with pytest.raises(InUseError, match=f"process {holder.pid} on "), owned(tmp_path, 0):
                pass
            (tmp_path / ".lock").unlink()
        assert (tmp_path / "state.json").read_text() == before


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    (tmp_path / "precious").write_text("words")
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(lock)
    with pytest.raises(UnwritableError, match=r"\.lock is .*: remove it"), owned(tmp_path / "run", 0):
        pass
    assert (tmp_path / "precious").read_text() == "words"


def test_words_of_a_rank_that_is_late_make_no_folder(tmp_path: Path) -> None:
    record_failure(tmp_path / "gone", 1, 2, "wrong")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    with pytest.raises(UserError), owned(tmp_path, 0):
        raise UserError("wrong")
    assert (tmp_path / "state.json").is_file()


def test_a_held_folder_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    folder = HeldFolder(tmp_path / "a")
    assert not folder.lost()
    (tmp_path / "a").rename(tmp_path / "b")
    assert (folder.lost(), folder.whereabouts()) == (True, tmp_path / "b")
    (tmp_path / "a").mkdir()
    assert folder.lost(), "another one stands at its place"
    (tmp_path / "b").rmdir()
    assert folder.whereabouts() is None
    folder.close()


def test_the_lock_of_a_lost_node_does_not_hold_up_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an earlier job, or of an earlier start of this one, whether the batch script has claimed the run for it or not."""
    with held_by_another_process(tmp_path, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="0"):
        state = read_state(tmp_path)
        (tmp_path / "state.json").write_text(json.dumps({**state, "state": "running", "host": "lost"}))
        monkeypatch.setenv("SLURM_JOB_ID", "12")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with owned(tmp_path, 0):
            assert (read_state(tmp_path)["restart_count"], read_state(tmp_path)["state"]) == (1, "running")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        with pytest.raises(StaleStartError), owned(tmp_path, 0):
            pass
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        claim(tmp_path, Owner("13", 0), state="starting")
        with owned(tmp_path, 0):
            assert read_state(tmp_path)["supervised"]
