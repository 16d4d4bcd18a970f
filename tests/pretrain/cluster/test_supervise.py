"""Who starts a run again, and when not: every way a start can end, without Slurm."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from parallel.launch.exit_codes import ExitCode
from parallel.launch.slurm_client import Job
from pretrain.cluster.decision import decide
from pretrain.cluster.supervise import NOTHING_TO_DO, main, on_term, start, usable_nodes
from pretrain.rundir import state as states
from pretrain.rundir.lock import owned
from pretrain.rundir.state import (
    Owner,
    StaleStartError,
    asked_to_stop,
    check_owner,
    claim,
    latest_step,
    read_failures,
    read_state,
    record_failure,
    stop_file,
    write_state,
)
from pretrain.train.stop_signals import StopRequest, task_exit_code
from tests.pretrain.cluster.starts import OWNER, RUNNING, checkpoint, left


def test_each_start_has_a_secret_of_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its ranks look for it."""
    monkeypatch.delenv("FATHOM_SECRET", raising=False)
    file = run / "control" / "secret"
    first = file.read_text()
    assert (len(first), stat.S_IMODE(file.stat().st_mode)) == (64, 0o600)
    assert start(run, Owner("12", 1), RUNNING) is None
    assert file.read_text() != first


def test_a_folder_of_requests_that_is_a_link_is_not_cleared(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / "control").rename(elsewhere)
    (elsewhere / "thesis.tex").touch()
    (run / "control").symlink_to(elsewhere)
    with pytest.raises(UserError, match="control is a link"):
        start(run, Owner("12", 1), RUNNING)
    assert (elsewhere / "thesis.tex").exists()


def test_finished(run: Path) -> None:
    left(run, states.FINISHED, ExitCode.FINISHED)
    decision = decide(run, 0, RUNNING, OWNER)
    assert (decision.requeue, decision.state, decision.exit_code) == (False, "finished", 0)
    # A library that crashes while Python shuts down, or a scancel a moment later, changes nothing.
    assert decide(run, 139, Job("COMPLETING"), OWNER).state == "finished"


def test_stopped_on_request(run: Path) -> None:
    left(run, states.STOPPED, ExitCode.STOPPED)
    checkpoint(run, 120)
    stop_file(run, OWNER).write_text("USR1\n")
    for srun in (0, 143):  # what srun returns is the code of a victim
        decision = decide(run, srun, RUNNING, OWNER)
        assert (decision.requeue, decision.state, decision.reason, decision.step, decision.stalled) == (
            True,
            "requeued",
            "why",
            120,
            0,
        )


def test_ranks_that_left_because_another_failed(run: Path) -> None:
    """srun --kill-on-bad-exit sends TERM to the others, which may leave in order: still a crash."""
    left(run, states.STOPPED, ExitCode.STOPPED)
    decision = decide(run, 137, RUNNING, OWNER)
    assert (decision.requeue, decision.stalled) == (True, 1)
    assert (
        decision.reason == "a rank was killed by SIGKILL (srun returned 137); the other ranks saved and left"
    )


def test_stopped_for_good(run: Path) -> None:
    left(run, states.STOPPED, ExitCode.STOPPED_BY_USER)
    assert (decide(run, 0, RUNNING, OWNER).requeue, decide(run, 0, RUNNING, OWNER).state) == (
        False,
        "stopped",
    )


def test_tasks_that_leave_without_a_word(run: Path) -> None:
    """0 from srun is no proof that all steps are done."""
    decision = decide(run, 0, RUNNING, OWNER)
    assert (decision.requeue, decision.state, decision.stalled) == (True, "requeued", 1)
    assert "rank 0 did not write how" in decision.reason


@pytest.mark.parametrize(
    ("code", "again"),
    [(1, True), (78, True), (79, True), (137, True), (167, True), (2, False), (77, False), (80, False)],
)
def test_codes_of_srun(run: Path, code: int, again: bool) -> None:
    decision = decide(run, code, RUNNING, OWNER)
    assert (decision.requeue, decision.state) == (again, "requeued" if again else "failed")
    assert str(code) in decision.reason
    assert decision.exit_code == (0 if again else code)


def test_the_first_rank_that_says_something_counts(run: Path) -> None:
    record_failure(run, 3, ExitCode.CRASH, "lost the connection\nto its peer", OWNER)
    record_failure(run, 7, ExitCode.USER_ERROR, "data: no such file", OWNER)
    record_failure(run, 1, ExitCode.CRASH, "of another start", Owner("12", 1))
    assert [failure.rank for failure in read_failures(run, OWNER)] == [3, 7]
    assert read_failures(run, OWNER)[0].reason == "lost the connection to its peer"
    decision = decide(run, 143, RUNNING, OWNER)
    assert not decision.requeue
    assert decision.reason.startswith("rank 7 on ")
    assert decision.reason.endswith(": data: no such file (and 1 more ranks)")


def restart_until_given_up(run: Path, code: int, job: Job, limit: int = 10) -> int:
    """Lets starts end with a code until none follows. Returns the number of starts."""
    for count in range(limit):
        owner = Owner("12", count)
        assert count == 0 or start(run, owner, job) is None
        decision = decide(run, code, Job(job.state, restarts=count, preempted=job.preempted), owner)
        if not decision.requeue:
            return count + 1
        write_state(run, owner, state=decision.state, stalled=decision.stalled)
    return limit


def test_crash_loop(run: Path) -> None:
    """Three restarts without a new checkpoint, then no more."""
    assert restart_until_given_up(run, 1, RUNNING) == 4


def test_time_limit_that_leaves_no_time_for_a_step(run: Path) -> None:
    assert restart_until_given_up(run, 75, RUNNING) == 4


def test_preemption_is_not_the_runs_fault(run: Path) -> None:
    assert restart_until_given_up(run, 75, Job("RUNNING", preempted=True)) == 10


def test_progress_resets_the_count(run: Path) -> None:
    write_state(run, OWNER, stalled=3)
    assert not decide(run, 1, RUNNING, OWNER).requeue
    checkpoint(run, 101)
    assert (decide(run, 1, RUNNING, OWNER).requeue, decide(run, 1, RUNNING, OWNER).stalled) == (True, 0)


def test_first_checkpoint_is_progress(tmp_path: Path) -> None:
    assert start(tmp_path, OWNER, RUNNING) is None
    assert (latest_step(tmp_path), decide(tmp_path, 1, RUNNING, OWNER).stalled) == (None, 1)
    checkpoint(tmp_path, 1)
    assert decide(tmp_path, 1, RUNNING, OWNER).stalled == 0


def test_lost_batch_nodes_count_too(run: Path) -> None:
    """Slurm itself requeues when the batch node dies; nobody decided, so the next start counts."""
    for count in (1, 2, 3):
        assert start(run, Owner("12", count), RUNNING) is None
        assert (read_state(run)["stalled"], read_state(run)["restarts"]) == (count, count)
    reason = start(run, Owner("12", 4), RUNNING)
    assert reason == "no new checkpoint in 4 starts in a row (the newest is step 100): not started again"
    assert (read_state(run)["state"], read_state(run)["reason"]) == ("failed", reason)


def test_what_slurm_does_itself(run: Path) -> None:
    """In COMPLETING: a requeue was counted, a time limit has its reason, the rest is scancel."""
    requeued = decide(run, 143, Job("COMPLETING", restarts=1), OWNER)
    assert (requeued.requeue, requeued.by_slurm, requeued.stalled) == (True, True, 0)
    assert decide(run, 143, Job("COMPLETING"), OWNER).state == "cancelled"
    assert decide(run, 143, Job("CANCELLED"), OWNER).state == "cancelled"
    assert decide(run, 143, None, OWNER).state == "requeued"  # slurmctld does not answer


def test_term(run: Path) -> None:
    """What the batch script can say at once; a grace period before preemption says nothing yet."""
    assert on_term(run, OWNER, RUNNING) is None
    late = on_term(run, OWNER, Job("COMPLETING", "TimeLimit"))
    assert late is not None
    assert (late.requeue, late.by_slurm) == (True, False)
    assert "larger signal_margin" in late.reason
    cancelled = on_term(run, OWNER, Job("COMPLETING"))
    assert cancelled is not None
    write_state(run, OWNER, state=cancelled.state)
    left(run, states.STOPPED, ExitCode.STOPPED)  # a rank that was still saving
    assert read_state(run)["state"] == "cancelled"
    assert on_term(run, OWNER, Job("COMPLETING")) is None


def test_the_batch_script_speaks_for_the_ranks_that_have_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They have chosen a name for their start, which it does not know."""
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with owned(run, 0):
        claim(run, state=states.RUNNING)
        assert read_state(run)["supervised"]
        late = on_term(run, OWNER, Job("COMPLETING", "TimeLimit"))
        assert late is not None
        assert late.requeue
        write_state(run, OWNER, state=states.REQUEUED)
        assert read_state(run)["start"] == Owner.from_environment().start != ""
    assert main(["after-exit", str(run)]) == 0, "on-term was faster"
    assert read_state(run)["state"] == "requeued"


def test_chain(run: Path) -> None:
    (run / "submitted.json").write_text(json.dumps({"jobs": ["12", "13"]}))
    left(run, states.STOPPED, ExitCode.STOPPED)
    decision = decide(run, 0, RUNNING, OWNER)
    assert (decision.requeue, decision.state, decision.exit_code) == (False, "requeued", 0)
    assert decision.reason == "why; job 13 of the chain continues"
    write_state(run, OWNER, state=decision.state)
    last = Owner("13", 0)
    assert start(run, last, RUNNING) is None
    write_state(run, last, exit_code=75)
    assert decide(run, 0, RUNNING, last).requeue
    late = on_term(run, last, Job("COMPLETING", "TimeLimit"))
    assert late is not None
    assert late.requeue


@pytest.mark.parametrize("state", [states.FINISHED, states.FAILED, states.CANCELLED])
def test_what_has_ended_is_not_started(run: Path, state: str) -> None:
    write_state(run, OWNER, state=state, reason="why")
    assert start(run, Owner("13", 0), RUNNING) == f"the run is {state} (why): submit it again to go on"


def test_stop_for_good_is_kept_when_saving_fails(run: Path) -> None:
    stop_file(run, OWNER).write_text("USR2\n")
    decision = decide(run, 1, RUNNING, OWNER)
    assert (decision.requeue, decision.state) == (False, "failed")


def test_fence(run: Path) -> None:
    """A rank of an earlier start can not write, and can not take the run back."""
    newer = Owner("12", 1)
    assert start(run, newer, RUNNING) is None
    for stale in (OWNER, Owner("11", 0), Owner(None, 0)):
        with pytest.raises(StaleStartError, match=r"belongs to start 12\.1 now"):
            check_owner(run, stale)
        with pytest.raises(StaleStartError):
            write_state(run, stale, state="running")
        with pytest.raises(StaleStartError):
            decide(run, 0, RUNNING, stale)
    with pytest.raises(StaleStartError, match="belongs to restart 1 of job 12; this is restart 0"):
        claim(run, OWNER)
    check_owner(run, newer)
    claim(run, Owner(None, 0), state="running")  # a person who goes on locally
    with pytest.raises(StaleStartError):
        check_owner(run, newer)


def test_old_requests_are_cleared_by_a_new_start(run: Path) -> None:
    stop_file(run, OWNER).write_text("USR2\n")
    stop_file(run, Owner("12", 1)).write_text("USR1\n")
    start(run, Owner("12", 1), RUNNING)
    assert [asked_to_stop(run, Owner("12", count)) for count in (0, 1)] == ["", "USR1"]


def test_damaged_state(run: Path) -> None:
    (run / "state.json").write_text('{"state": ')
    with pytest.raises(
        UserError, match=r"state\.json is damaged .*: remove it; checkpoints and metrics are not affected"
    ):
        read_state(run)


def test_nodes() -> None:
    assert [usable_nodes(number, [2, 4]) for number in (2, 3, 4, 5)] == [2, 2, 4, 4]
    with pytest.raises(UserError, match="the job got 1 nodes; its layout needs 2 or 4"):
        usable_nodes(1, [2, 4])


def test_commands_of_the_batch_script(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert main(["start", str(run)]) == 2
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert main(["start", str(run), "--allowed-nodes=2,4"]) == 0
    assert capsys.readouterr().out == "2\n"
    assert main(["after-exit", str(run), "--exit-code=1"]) == 1
    assert read_state(run)["state"] == "failed"
    assert "it should start again, but: scontrol is missing" in (read_state(run)["reason"] or "")
    assert main(["start", str(run)]) == NOTHING_TO_DO
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert main(["after-exit", str(run)]) == ExitCode.STALE


def test_latest_step_is_a_checkpoint_that_is_there(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    for step in (100, 200, 300):
        checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "latest").write_text("step_00000200\n")
    assert latest_step(tmp_path) == 200, "300 was not confirmed"
    (folder / "step_00000200" / "manifest.json").unlink()
    assert latest_step(tmp_path) == 300
    for pointer in ("", "step_1", "nonsense", "../step_00000100"):
        (folder / "latest").write_text(pointer)
        assert latest_step(tmp_path) == 300
    (folder / "latest").unlink()
    assert latest_step(tmp_path) == 300
    for step in (100, 300):
        (folder / f"step_{step:08d}" / "manifest.json").unlink()
    (folder / "latest").write_text("step_00000300\n")
    assert latest_step(tmp_path) is None


def test_stop_request(run: Path) -> None:
    env = {"SLURM_JOB_ID": "12"}
    previous = {
        number: signal.getsignal(number)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = StopRequest(run, env)
        stop.install()
        assert (stop.code(), stop.reason()) == (0, "")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (stop.code(), stop.reason()) == (75, "the time limit is near, or the job is preempted")
        stop_file(run, OWNER).write_text("USR2\n")  # srun passes USR1 on for it as well
        assert (stop.code(), stop.reason()) == (76, "asked to save and stop for good")
        early = StopRequest(run, env)
        early.install()
        assert early.code() == 76
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        local = StopRequest(run, {})
        local.install()
        os.kill(os.getpid(), signal.SIGINT)
        assert local.code() == 76
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("code", "in_step", "alone"), [(0, 0, 0), (75, 0, 75), (76, 0, 76), (1, 1, 1), (77, 77, 77), (2, 2, 2)]
)
def test_codes_of_tasks(code: int, in_step: int, alone: int) -> None:
    env: dict[str, Any] = {"SLURM_STEP_ID": "0"}
    assert (task_exit_code(ExitCode(code), env), task_exit_code(ExitCode(code), {})) == (in_step, alone)


def test_hung_names_the_late_rank(run: Path) -> None:
    """All ranks left accuse another one; the first of them to say so must not look at fault."""
    for rank in (2, 0, 1):
        record_failure(
            run,
            rank,
            ExitCode.HUNG,
            "step 3 did not end within 60 s: rank 3 on node2 gave no sign of life",
            OWNER,
        )
    decision = decide(run, 137, RUNNING, OWNER)
    assert (decision.requeue, decision.reason) == (
        True,
        "step 3 did not end within 60 s: rank 3 on node2 gave no sign of life",
    )


def test_who_died_without_a_word(run: Path) -> None:
    """Its victims lose the connection and say so; what they say is not the reason."""
    nodes = {f"node{node}": {"ranks": [2 * node - 2, 2 * node - 1]} for node in (1, 2)}
    (run / "preflight.json").write_text(json.dumps({"nodes": nodes}))
    for rank in (0, 1, 3):
        record_failure(
            run, rank, ExitCode.CRASH, "RuntimeError: Connection closed by peer [127.0.0.1]:21924", OWNER
        )
    words = (
        "rank 2 on node2 died without a word (a rank was killed by SIGKILL (srun returned 137)); "
        "the others lost the connection"
    )
    assert (decide(run, 137, RUNNING, OWNER).reason, decide(run, 137, RUNNING, OWNER).requeue) == (
        words,
        True,
    )
    record_failure(run, 1, ExitCode.CRASH, "RuntimeError: CUDA error", OWNER)  # somebody knows more
    assert "rank 2" not in decide(run, 137, RUNNING, OWNER).reason


def test_a_run_that_was_moved_away(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert main(["start", str(run / "elsewhere")]) == 2
    assert "elsewhere is gone: was it moved or removed after it was submitted?" in capsys.readouterr().err


def test_a_python_without_packages_will_do(run: Path) -> None:
    """The batch script runs on the node itself, outside the container that holds the packages."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "SLURM_JOB_ID": "12",
    }
    bare = [sys.executable, "-S", "-s", "-m", "pretrain.cluster.supervise"]
    done = subprocess.run(
        [*bare, "start", str(run)], env=environment, cwd=run, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "newest checkpoint: step 100" in done.stderr
    record_failure(run, 0, ExitCode.USER_ERROR, "why", OWNER)
    done = subprocess.run(
        [*bare, "after-exit", str(run), "--exit-code=2"],
        env=environment,
        cwd=run,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, read_state(run)["state"]) == (2, "failed"), done.stderr
