"""Two starts never work in one run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.rundir.lock import InUseError, UnwritableError, check_free, owned
from pretrain.rundir.state import Owner, StaleStartError, claim, read_state


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


def test_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from pretrain.rundir.lock import owned\n"
    code += "with owned(Path(sys.argv[1]), 0): print(1, flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(InUseError, match=f"process {holder.pid} on "):
        check_free(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    check_free(tmp_path)


def test_starts_of_slurm_jobs_are_told_apart_by_state_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    claim(tmp_path, Owner("12", 0), state="running")
    with owned(tmp_path, 0), owned(tmp_path, 0):  # a lost node may still hold the lock
        assert read_state(tmp_path)["restart_count"] == 1
        assert read_state(tmp_path)["state"] == "running"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(StaleStartError), owned(tmp_path, 0):
        pass
