"""What the batch script asks: may this start go on, and what follows after it. `python -m pretrain.cluster.supervise start|on-term|after-exit RUN_DIR`.

Uses the standard library only: it runs on the node of the batch script, possibly outside of the container that the tasks run in.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from parallel.launch import slurm_client
from parallel.launch.exit_codes import RESTARTABLE, ExitCode, as_exit_code
from parallel.launch.slurm_client import Job
from pretrain.rundir import state as states
from pretrain.rundir.state import PREFLIGHT_FILE, Failure, Owner

MAX_RESTARTS = 3
NOTHING_TO_DO = 100
"""Exit code of `start` for a run that is finished, or that an earlier job of its chain gave up."""

TOO_LATE = 1000
"""In place of srun's code: the time limit came before the ranks had saved and left."""


@dataclass(frozen=True)
class Decision:
    """What happens after a start has ended. state and reason go into state.json, exit_code is that of the batch script; exclude: nodes that failed their
    check before the first step."""

    requeue: bool
    reason: str
    state: str
    exit_code: int
    step: int | None = None
    stalled: int = 0
    by_slurm: bool = False
    exclude: tuple[str, ...] = ()


def decide(
    run_dir: Path | str,
    exit_code: int,
    job: Job | None = None,
    owner: Owner | None = None,
    max_restarts: int = MAX_RESTARTS,
) -> Decision:
    """Whether a start that ended is followed by another one, and why.

    exit_code: of srun, which with --kill-on-bad-exit is often that of a victim; what the ranks wrote themselves counts for more. job: what Slurm says
    about the job now, None where it does not answer. At most `max_restarts` restarts in a row may leave no new checkpoint.
    Raises StaleStartError when a newer start owns the run directory.
    """
    owner = owner or Owner.from_environment()
    states.check_owner(run_dir, owner)
    state = states.read_state(run_dir)
    step = states.latest_step(run_dir)
    stalled = count_stalled(state, step)
    code, words = _what_happened(run_dir, exit_code, state, owner)
    if code == ExitCode.FINISHED and (state.get("exit_code") is not None or not cancelled(job, owner)):
        return Decision(False, words or "all steps are done", states.FINISHED, 0, step)
    if cancelled(job, owner):
        return Decision(False, "cancelled with scancel", states.CANCELLED, 1, step, stalled)
    if code == ExitCode.STOPPED_BY_USER:
        return Decision(False, words or "stopped on request", states.STOPPED, 0, step)
    if job is not None and job.restarts > owner.restart_count:
        return Decision(
            True,
            "Slurm starts the job again (preemption, node failure, or scontrol requeue)",
            states.REQUEUED,
            0,
            step,
            0,
            by_slurm=True,
        )
    if code not in RESTARTABLE:
        return Decision(False, words, states.FAILED, int(code), step, stalled)
    if states.asked_to_stop(run_dir, owner) == "USR2":
        return Decision(
            False,
            f"asked to stop for good, but it did not end in order: {words}",
            states.FAILED,
            _nonzero(code),
            step,
            stalled,
        )
    following = states.next_in_chain(run_dir, owner)
    if code == ExitCode.STOPPED and following is not None:
        return Decision(
            False, f"{words}; job {following} of the chain continues", states.REQUEUED, 0, step, stalled
        )
    preempted = code == ExitCode.STOPPED and job is not None and job.preempted
    if stalled > max_restarts and not preempted:
        return Decision(
            False,
            f"{words}; no new checkpoint in {stalled} starts in a row (the newest is {_named(step)}): not started again",
            states.FAILED,
            _nonzero(code),
            step,
            stalled,
        )
    bad = (
        {
            failure.host
            for failure in states.read_failures(run_dir, owner)
            if failure.exit_code == ExitCode.BAD_NODE
        }
        if code == ExitCode.BAD_NODE
        else ()
    )
    return Decision(
        True, words, states.REQUEUED, 0, step, 0 if preempted else stalled, exclude=tuple(sorted(bad))
    )


def cancelled(job: Job | None, owner: Owner) -> bool:
    """Whether the job was ended for good from outside.

    While it is being ended, Slurm shows COMPLETING in place of CANCELLED; a time limit has its reason there, a requeue its count.
    """
    if job is None:
        return False
    return "CANCELLED" in job.state or (
        job.state == "COMPLETING" and job.reason == "" and job.restarts <= owner.restart_count
    )


def count_stalled(state: Mapping[str, Any], step: int | None) -> int:
    """Starts in a row, the one that the state describes included, that left no newer checkpoint than they began with."""
    begun = state.get("start_step")
    return 0 if step is not None and (begun is None or step > begun) else int(state.get("stalled") or 0) + 1


def start(
    run_dir: Path, owner: Owner, job: Job | None = None, max_restarts: int = MAX_RESTARTS
) -> str | None:
    """Claims the run directory for a start of a Slurm job. Returns why there is nothing to do, or None to go on.

    Raises UserError where another job is at this run, and StaleStartError where a newer start of this one is.
    """
    state = states.read_state(run_dir)
    held = states.owner_of(state)
    name, before = state.get("state"), states.latest_step(run_dir)
    if name in (states.FINISHED, states.FAILED, states.CANCELLED):
        return f"the run is {name} ({state.get('reason')}): submit it again to go on"
    if held.job_id not in (None, owner.job_id) and name in (states.STARTING, states.RUNNING):
        other = slurm_client.show_job(str(held.job_id))
        if other is not None and other.state in slurm_client.ACTIVE:
            raise UserError(
                f"job {held.job_id} is running in {run_dir}: cancel one of the two (scancel {held.job_id})"
            )
    # What ended in order was counted when it ended. A start whose batch script died with its node is counted here.
    stalled = (
        count_stalled(state, before)
        if name in (states.STARTING, states.RUNNING)
        else int(state.get("stalled") or 0)
    )
    if stalled > max_restarts:
        reason = f"no new checkpoint in {stalled} starts in a row (the newest is {_named(before)}): not started again"
        states.claim(run_dir, owner, state=states.FAILED, reason=reason, stalled=stalled)
        return reason
    states.claim(
        run_dir,
        owner,
        state=states.STARTING,
        reason="",
        exit_code=None,
        stalled=stalled,
        start_step=before,
        restarts=int(state.get("restarts") or 0) + 1
        if name in (states.STARTING, states.RUNNING, states.REQUEUED)
        else 0,
        ends_at=job.end_time if job else None,
        nodes=job.nodes if job else "",
    )
    for old in (run_dir / states.CONTROL).glob("*"):
        if not old.name.startswith(f"{owner.label}."):
            old.unlink(missing_ok=True)
    return None


def on_term(
    run_dir: Path, owner: Owner, job: Job | None, max_restarts: int = MAX_RESTARTS
) -> Decision | None:
    """Says at once what a TERM meant, as the batch script may be killed before the tasks have ended. None where the job goes on (a grace period)."""
    if job is None or job.state == "RUNNING":
        return None
    state = states.read_state(run_dir)
    if states.owner_of(state) != owner or state.get("state") in states.ENDED | {states.REQUEUED}:
        return None
    return decide(run_dir, TOO_LATE if job.reason == "TimeLimit" else 128 + 15, job, owner, max_restarts)


def carry_out(run_dir: Path, owner: Owner, decision: Decision, exclude_bad_nodes: bool = False) -> int:
    """Writes the state, asks Slurm for another start where decided, and returns the exit code for the batch script."""
    fields: dict[str, Any] = {
        "state": decision.state,
        "reason": decision.reason,
        "step": decision.step,
        "stalled": decision.stalled,
    }
    excluded = (
        sorted({*(states.read_state(run_dir).get("excluded") or []), *decision.exclude})
        if exclude_bad_nodes
        else []
    )
    if excluded:
        fields["excluded"] = excluded
    states.write_state(run_dir, owner, **fields)  # first: after the requeue Slurm ends this process
    if decision.requeue and not decision.by_slurm:
        refusal = (
            slurm_client.requeue(owner.job_id or "")
            if not (exclude_bad_nodes and decision.exclude)
            else requeue_elsewhere(owner.job_id or "", excluded)
        )
        if refusal is not None:
            reason = f"{decision.reason}; it should start again, but: {refusal}. Submit it again to go on"
            states.write_state(run_dir, owner, state=states.FAILED, reason=reason)
            say(f"failed: {reason}")
            return 1
    say(f"{decision.state}: {decision.reason}")
    return decision.exit_code


def requeue_elsewhere(handle: str, excluded: Sequence[str]) -> str | None:
    """Puts the job back into the queue, not to run on some nodes again. Returns Slurm's refusal to requeue it, or None.

    Slurm changes the nodes of waiting jobs only, so the job is held until that is done; where it is refused, the job goes on without.
    """
    refusal = slurm_client.requeue(handle, hold=True)
    if refusal is not None:
        return refusal
    problem = slurm_client.exclude_nodes(handle, excluded)
    say(
        f"nodes {','.join(excluded)} {f'could not be excluded: {problem}' if problem else 'are excluded from now on'}"
    )
    return slurm_client.release(handle)


def usable_nodes(allocated: int, allowed: Sequence[int]) -> int:
    """The largest number of nodes that the layout can use. Raises UserError when the job got fewer than the smallest."""
    fitting = [number for number in allowed if number <= allocated]
    if not fitting:
        raise UserError(f"the job got {allocated} nodes; its layout needs {' or '.join(map(str, allowed))}")
    return max(fitting)


def say(text: str) -> None:
    """One line for the job's log; standard output is for the batch script."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} fathom: {text}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of the three commands; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.cluster.supervise")
    parser.add_argument("command", choices=("start", "on-term", "after-exit"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--exit-code", type=int, default=0)
    parser.add_argument("--max-restarts", type=int, default=MAX_RESTARTS)
    parser.add_argument(
        "--exclude-bad-nodes", action="store_true", help="never again use a node that failed its check"
    )
    parser.add_argument(
        "--allowed-nodes", default="", help="numbers of nodes the layout can use; prints the one to use"
    )
    options = parser.parse_args(arguments)
    owner = Owner.from_environment()
    if owner.job_id is None:
        say("SLURM_JOB_ID is not set: this is for batch scripts")
        return int(ExitCode.USER_ERROR)
    try:
        return _run(options, owner)
    except states.StaleStartError as error:
        say(str(error))
        return int(ExitCode.STALE)
    except UserError as error:
        say(str(error))
        return int(ExitCode.USER_ERROR)


def _run(options: argparse.Namespace, owner: Owner) -> int:
    assert owner.job_id is not None
    run_dir: Path = options.run_dir
    job = slurm_client.show_job(owner.job_id)
    if options.command == "start":
        (run_dir / states.CONTROL).mkdir(exist_ok=True)
        reason = start(run_dir, owner, job, options.max_restarts)
        if reason is not None:
            say(reason)
            return NOTHING_TO_DO
        nodes = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        print(
            usable_nodes(nodes, [int(number) for number in options.allowed_nodes.split(",")])
            if options.allowed_nodes
            else nodes
        )
        say(
            f"start {owner.label} on {os.environ.get('SLURM_JOB_NODELIST')}, newest checkpoint: {_named(states.latest_step(run_dir))}"
        )
        return 0
    if options.command == "on-term":
        decision = on_term(run_dir, owner, job, options.max_restarts)
        return 0 if decision is None else carry_out(run_dir, owner, decision, options.exclude_bad_nodes)
    state = states.read_state(run_dir)
    if states.owner_of(state) == owner and state.get("state") in (states.CANCELLED, states.REQUEUED):
        return 0  # on-term was faster
    decision = decide(run_dir, options.exit_code, job, owner, options.max_restarts)
    return carry_out(run_dir, owner, decision, options.exclude_bad_nodes)


def _what_happened(
    run_dir: Path | str, exit_code: int, state: Mapping[str, Any], owner: Owner
) -> tuple[ExitCode, str]:
    """The exit code that counts, with a sentence. In order: what rank 0 wrote when it left in order, what the first failing rank wrote, what srun returned."""
    code = None if state.get("exit_code") is None else as_exit_code(int(state["exit_code"]))
    failures = states.read_failures(run_dir, owner)
    if failures and code in (None, ExitCode.CRASH):
        # A lost collective is what the others see when one rank dies: a code that says more wins over an earlier crash.
        first = next((failure for failure in failures if failure.exit_code != ExitCode.CRASH), failures[0])
        if first.exit_code == ExitCode.HUNG:  # all ranks say the same, and it is about another one
            return ExitCode.HUNG, first.reason
        silent = (
            _silent_ranks(run_dir, failures)
            if all(_lost_a_peer(failure.reason) for failure in failures)
            else ""
        )
        if silent:
            return (
                ExitCode.CRASH,
                f"{silent} died without a word ({_words_of(exit_code)}); the others lost the connection",
            )
        more = f" (and {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
        return as_exit_code(first.exit_code), f"rank {first.rank} on {first.host}: {first.reason}{more}"
    if code == ExitCode.STOPPED and 0 < exit_code <= 255 and not states.asked_to_stop(run_dir, owner):
        # Nobody asked this start to stop: srun told the others because one failed.
        return ExitCode.CRASH, f"{_words_of(exit_code)}; the other ranks saved and left"
    if code is not None:
        return code, str(state.get("reason") or "")
    if exit_code == TOO_LATE:
        return (
            ExitCode.STOPPED,
            "the time limit came before the run had saved and left: a larger signal_margin in the site file gives it more time",
        )
    if exit_code == 0 and state.get("state") != states.FINISHED:
        return ExitCode.CRASH, "the tasks ended with 0 but rank 0 did not write how (exit_code in state.json)"
    code = as_exit_code(exit_code)
    return code, "" if code == ExitCode.FINISHED else _words_of(exit_code)


def _lost_a_peer(reason: str) -> bool:
    """Whether a rank ended because another one was gone: true of its victims, and of no use to whoever looks for the cause."""
    return any(
        words in reason.lower()
        for words in (
            "connection closed by peer",
            "connection reset by peer",
            "broken pipe",
            "remote process exited",
        )
    )


def _silent_ranks(run_dir: Path | str, failures: Sequence[Failure]) -> str:
    """The few ranks that did not say why they ended, where the others did; empty where those are many, or the ranks are not known."""
    try:
        nodes = json.loads((Path(run_dir) / PREFLIGHT_FILE).read_text(encoding="utf-8"))["nodes"]
        hosts = {int(rank): host for host, node in nodes.items() for rank in node["ranks"]}
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    silent = sorted(set(hosts) - {failure.rank for failure in failures})
    return (
        ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent)
        if 0 < len(silent) <= min(8, len(hosts) / 2)
        else ""
    )


def _words_of(exit_code: int) -> str:
    """What srun returned, in words: 128 + a signal that ended a task, or the code of a task, or one of srun's own."""
    with contextlib.suppress(ValueError):
        return f"a rank was killed by {signal.Signals(exit_code - 128).name} (srun returned {exit_code})"
    with contextlib.suppress(ValueError):
        return f"srun returned {exit_code} ({ExitCode(exit_code).name.lower().replace('_', ' ')})"
    return f"srun returned {exit_code}"


def _named(step: int | None) -> str:
    return "none" if step is None else f"step {step}"


def _nonzero(code: ExitCode) -> int:
    return int(code) or 1


if __name__ == "__main__":
    sys.exit(main())
