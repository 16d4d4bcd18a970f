"""What the batch script asks: may this start go on, and what follows after it.

`python -m pretrain.cluster.supervise start|on-term|after-exit RUN_DIR`
Uses the standard library only: it runs on the node of the batch script, possibly outside of the
container that the tasks run in.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from parallel.launch import slurm_client
from parallel.launch.exit_codes import ExitCode
from parallel.launch.secret import run_secret
from parallel.launch.slurm_client import Job
from pretrain.cluster.decision import MAX_RESTARTS, TOO_LATE, Decision, count_stalled, decide, named
from pretrain.rundir import state as states
from pretrain.rundir.state import Owner
from pretrain.rundir.state_file import State

NOTHING_TO_DO = 100
"""Exit code of `start` for a run that is finished, or that an earlier job of its chain gave up."""


def start(
    run_dir: Path, owner: Owner, job: Job | None = None, max_restarts: int = MAX_RESTARTS
) -> str | None:
    """Claims the run directory for a start of a Slurm job.

    Returns why there is nothing to do, or None to go on.

    Raises UserError where another job is at this run, and StaleStartError where a newer start of
    this one is.
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
    # What ended in order was counted when it ended. A start whose batch script died with its node
    # is counted here.
    died = name in (states.STARTING, states.RUNNING)
    stalled = count_stalled(state, before) if died else int(state.get("stalled") or 0)
    if stalled > max_restarts:
        reason = (
            f"no new checkpoint in {stalled} starts in a row "
            f"(the newest is {named(before)}): not started again"
        )
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
        restarts=int(state.get("restarts") or 0) + 1 if died or name == states.REQUEUED else 0,
        ends_at=job.end_time if job else None,
        nodes=job.nodes if job else "",
    )
    control = run_dir / states.CONTROL
    if control.is_symlink():
        raise UserError(f"{control} is a link: what is in it is removed at every start; remove the link")
    for old in control.glob("*"):
        if not old.name.startswith(f"{owner.label}."):
            old.unlink(missing_ok=True)
    run_secret(control)  # a new one for each start, before its ranks look for it
    return None


def on_term(
    run_dir: Path, owner: Owner, job: Job | None, max_restarts: int = MAX_RESTARTS
) -> Decision | None:
    """Says at once what a TERM meant, as the batch script may be killed before the tasks have
    ended.

    None where the job goes on (a grace period).
    """
    if job is None or job.state == "RUNNING":
        return None
    state = states.read_state(run_dir)
    if not owner.is_at(states.owner_of(state)) or state.get("state") in states.ENDED | {states.REQUEUED}:
        return None
    return decide(run_dir, TOO_LATE if job.reason == "TimeLimit" else 128 + 15, job, owner, max_restarts)


def carry_out(run_dir: Path, owner: Owner, decision: Decision, exclude_bad_nodes: bool = False) -> int:
    """Writes the state, and asks Slurm for another start where decided.

    Returns the exit code for the batch script.
    """
    fields: State = {
        "state": decision.state,
        "reason": decision.reason,
        "step": decision.step,
        "stalled": decision.stalled,
    }
    before = states.read_state(run_dir).get("excluded") or []
    excluded = sorted({*before, *decision.exclude}) if exclude_bad_nodes else []
    if excluded:
        fields["excluded"] = excluded
    states.write_state(run_dir, owner, **fields)  # first: after the requeue Slurm ends this process
    if decision.requeue and not decision.by_slurm:
        handle = owner.job_id or ""
        elsewhere = exclude_bad_nodes and decision.exclude
        refusal = requeue_elsewhere(handle, excluded) if elsewhere else slurm_client.requeue(handle)
        if refusal is not None:
            reason = f"{decision.reason}; it should start again, but: {refusal}. Submit it again to go on"
            states.write_state(run_dir, owner, state=states.FAILED, reason=reason)
            say(f"failed: {reason}")
            return 1
    say(f"{decision.state}: {decision.reason}")
    return decision.exit_code


def requeue_elsewhere(handle: str, excluded: Sequence[str]) -> str | None:
    """Puts the job back into the queue, not to run on some nodes again.

    Slurm changes the nodes of waiting jobs only, so the job is held until that is done; where it is
    refused, the job goes on without.
    Returns Slurm's refusal to requeue the job, or None.
    """
    refusal = slurm_client.requeue(handle, hold=True)
    if refusal is not None:
        return refusal
    problem = slurm_client.exclude_nodes(handle, excluded)
    say(
        f"nodes {','.join(excluded)} "
        f"{f'could not be excluded: {problem}' if problem else 'are excluded from now on'}"
    )
    return slurm_client.release(handle)


def usable_nodes(allocated: int, allowed: Sequence[int]) -> int:
    """The largest number of nodes that the layout can use.

    Raises UserError when the job got fewer than the smallest.
    """
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
        "--exclude-bad-nodes",
        action="store_true",
        help="never again use a node that failed its check or hung",
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
        if not run_dir.is_dir():
            raise UserError(f"{run_dir} is gone: was it moved or removed after it was submitted?")
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
            f"start {owner.label} on {os.environ.get('SLURM_JOB_NODELIST')}, "
            f"newest checkpoint: {named(states.latest_step(run_dir))}"
        )
        return 0
    if options.command == "on-term":
        decision = on_term(run_dir, owner, job, options.max_restarts)
        return 0 if decision is None else carry_out(run_dir, owner, decision, options.exclude_bad_nodes)
    state = states.read_state(run_dir)
    if owner.is_at(states.owner_of(state)) and state.get("state") in (states.CANCELLED, states.REQUEUED):
        return 0  # on-term was faster
    decision = decide(run_dir, options.exit_code, job, owner, options.max_restarts)
    return carry_out(run_dir, owner, decision, options.exclude_bad_nodes)


if __name__ == "__main__":
    sys.exit(main())
