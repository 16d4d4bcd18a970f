"""One table says what an exit code means, and every reader of a run takes it from there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from model.errors import UserError
from parallel.checkpoint.errors import SaveError
from parallel.launch.exit_codes import ExitCode
from pretrain.cluster.supervise import start
from pretrain.rundir.outcome import ENDINGS, code_of_reason, ending, exit_code_of, words_of, write_end
from pretrain.rundir.state import Owner, StaleStartError, claim, read_state
from pretrain.train.checks.preflight import BadNodeError
from pretrain.train.stop_signals import FOR_GOOD, REASONS


def test_every_exit_code_has_a_meaning() -> None:
    assert set(ENDINGS) == set(ExitCode)
    assert {code for code, one in ENDINGS.items() if one.state == "finished"} == {ExitCode.FINISHED}
    assert {code for code, one in ENDINGS.items() if one.mark == "good"} == {ExitCode.FINISHED}
    assert ending(137) == ENDINGS[ExitCode.CRASH]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("train.steps:\nwrong"), ExitCode.USER_ERROR, "train.steps: wrong"),
        (StaleStartError("another has it"), ExitCode.STALE, "another has it"),
        (BadNodeError("node1: no GPU", here=True), ExitCode.BAD_NODE, "node1: no GPU"),
        (
            SaveError("checkpoint not saved, rank 1: full"),
            ExitCode.CRASH,
            "checkpoint not saved, rank 1: full",
        ),
        (RuntimeError("gloo"), ExitCode.CRASH, "RuntimeError: gloo"),
        (MemoryError(), ExitCode.CRASH, "MemoryError"),
        (FULL, ExitCode.USER_ERROR, "/run/metrics.jsonl: No space left on device: make room"),
    ],
)
def test_errors(error: Exception, code: ExitCode, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert exit_code_of(error) is code
    assert words_of(error).startswith(words)


def test_a_disk_that_fails_on_slurm_may_be_one_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert exit_code_of(FULL) is ExitCode.CRASH


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("all steps are done", ExitCode.FINISHED),
        ("finished", ExitCode.FINISHED),
        ("loss or gradient is not finite at step 3", ExitCode.DIVERGED),
        ("not_finite", ExitCode.DIVERGED),
        ("ended by an error", ExitCode.CRASH),
        ("train.stop_at_step=3 is reached", ExitCode.STOPPED_BY_USER),
        ("another rank was asked to stop", ExitCode.STOPPED),
        *[
            (REASONS[name], ExitCode.STOPPED_BY_USER if name in FOR_GOOD else ExitCode.STOPPED)
            for name in REASONS
        ],
    ],
)
def test_ends_that_earlier_versions_wrote(reason: str, code: ExitCode) -> None:
    assert code_of_reason(reason) is code


def test_the_batch_script_decides_about_what_another_start_may_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control").mkdir()
    start(tmp_path, Owner("12", 0))
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("FATHOM_START", "abc")
    claim(tmp_path, state="running")
    write_end(tmp_path, ExitCode.CRASH, "out of memory")
    assert (read_state(tmp_path)["state"], read_state(tmp_path)["exit_code"]) == ("running", None)
    write_end(tmp_path, ExitCode.DIVERGED, "not finite")
    assert (read_state(tmp_path)["state"], read_state(tmp_path)["exit_code"]) == ("failed", 77)


def test_without_a_batch_script_the_run_itself_says_that_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside of an interactive job."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    claim(tmp_path, state="running")
    write_end(tmp_path, ExitCode.CRASH, "out of memory")
    assert (read_state(tmp_path)["state"], read_state(tmp_path)["exit_code"]) == ("failed", 1)
