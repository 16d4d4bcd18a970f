"""What follows when a start of a run has ended: another start, or an end for good, and why.

Uses the standard library only, as `supervise.py` does.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.launch.exit_codes import RESTARTABLE, ExitCode, as_exit_code
from parallel.launch.slurm_client import Job
from pretrain.rundir import state as states
from pretrain.rundir.state import PREFLIGHT_FILE, Failure, Owner
from pretrain.rundir.state_file import State

MAX_RESTARTS = 3
TOO_LATE = 1000
"""In place of srun's code: the time limit came before the ranks had saved and left."""


@dataclass(frozen=True)
class Decision:
    """What happens after a start has ended."""

    requeue: bool
    reason: str
    state: str
    exit_code: int
    """Of the batch script."""
    step: int | None = None
    stalled: int = 0
    by_slurm: bool = False
    """Whether Slurm starts the job again by itself."""
    exclude: tuple[str, ...] = ()
    """Nodes that failed their check before the first step, or held up all others."""


@dataclass(frozen=True)
class Ending:
    """How a start has ended: all that decides what follows."""

    code: ExitCode
    words: str
    written: bool
    """Whether rank 0 wrote its exit code: it left in order."""
    step: int | None
    """Of the newest checkpoint."""
    stalled: int
    """Starts in a row that left no newer one, this one included."""
    cancelled: bool
    by_slurm: bool
    for_good: bool
    """Whether somebody asked to save and stop for good."""
    following: str | None
    """The next job of the chain."""
    preempted: bool
    too_often: bool
    """Whether it is one start too many that left no new checkpoint."""


@dataclass(frozen=True)
class Rule:
    """What follows from one way to end."""

    when: Callable[[Ending], bool]
    state: str
    reason: str
    """With names of `Ending` in braces."""
    exit_code: int | None = None
    """None: that of the start, or 1."""
    requeue: bool = False
    counts: bool = True
    """Whether the start counts among those that left no new checkpoint."""


RULES = (
    # A library that crashes while Python shuts down, or a scancel a moment later, changes nothing.
    Rule(
        lambda end: end.code == ExitCode.FINISHED and (end.written or not end.cancelled),
        states.FINISHED,
        "{words}",
        0,
        counts=False,
    ),
    Rule(lambda end: end.cancelled, states.CANCELLED, "cancelled with scancel", 1),
    Rule(lambda end: end.code == ExitCode.STOPPED_BY_USER, states.STOPPED, "{words}", 0, counts=False),
    Rule(
        lambda end: end.by_slurm,
        states.REQUEUED,
        "Slurm starts the job again (preemption, node failure, or scontrol requeue)",
        0,
        requeue=True,
        counts=False,
    ),
    Rule(lambda end: end.code not in RESTARTABLE, states.FAILED, "{words}"),
    Rule(
        lambda end: end.for_good,
        states.FAILED,
        "asked to stop for good, but it did not end in order: {words}",
    ),
    Rule(
        lambda end: end.code == ExitCode.STOPPED and end.following is not None,
        states.REQUEUED,
        "{words}; job {following} of the chain continues",
        0,
    ),
    Rule(lambda end: end.preempted, states.REQUEUED, "{words}", 0, requeue=True, counts=False),
    Rule(
        lambda end: end.too_often,
        states.FAILED,
        "{words}; no new checkpoint in {stalled} starts in a row (the newest is {newest}): not started again",
    ),
    Rule(lambda end: True, states.REQUEUED, "{words}", 0, requeue=True),
)
"""The first that applies decides."""

IN_ORDER = {ExitCode.FINISHED: "all steps are done", ExitCode.STOPPED_BY_USER: "stopped on request"}
"""Words where the run left none."""


def decide(
    run_dir: Path | str,
    exit_code: int,
    job: Job | None = None,
    owner: Owner | None = None,
    max_restarts: int = MAX_RESTARTS,
) -> Decision:
    """Whether a start that ended is followed by another one, and why.

    exit_code: of srun, which with --kill-on-bad-exit is often that of a victim; what the ranks
    wrote themselves counts for more.
    job: what Slurm says about the job now, None where it does not answer.
    max_restarts: that many restarts in a row may leave no new checkpoint.
    Raises StaleStartError when a newer start owns the run directory.
    """
    owner = owner or Owner.from_environment()
    states.check_owner(run_dir, owner)
    end = _ending(run_dir, exit_code, job, owner, max_restarts)
    rule = next(rule for rule in RULES if rule.when(end))
    bad = _bad_nodes(end.code, states.read_failures(run_dir, owner))
    return Decision(
        requeue=rule.requeue,
        reason=rule.reason.format(newest=named(end.step), **vars(end)),
        state=rule.state,
        exit_code=int(end.code) or 1 if rule.exit_code is None else rule.exit_code,
        step=end.step,
        stalled=end.stalled if rule.counts else 0,
        by_slurm=rule.requeue and end.by_slurm,
        exclude=bad if rule.requeue and not end.by_slurm else (),
    )


def _bad_nodes(code: ExitCode, failures: Sequence[Failure]) -> tuple[str, ...]:
    """Nodes at fault for an end: all that failed their check; one that hung, where all ranks that
    said so name the same.
    """
    own = [failure for failure in failures if failure.exit_code == code]
    if code == ExitCode.BAD_NODE:
        return tuple(sorted({failure.host for failure in own}))
    named = {failure.at_fault for failure in own} if code == ExitCode.HUNG else set()
    return tuple(host for host in named if host and len(named) == 1)


def _ending(run_dir: Path | str, exit_code: int, job: Job | None, owner: Owner, max_restarts: int) -> Ending:
    state = states.read_state(run_dir)
    step = states.latest_step(run_dir)
    stalled = count_stalled(state, step)
    code, words = _what_happened(run_dir, exit_code, state, owner)
    return Ending(
        code=code,
        words=words or IN_ORDER.get(code, ""),
        written=state.get("exit_code") is not None,
        step=step,
        stalled=stalled,
        cancelled=cancelled(job, owner),
        by_slurm=job is not None and job.restarts > owner.restart_count,
        for_good=states.asked_to_stop(run_dir, owner) == "USR2",
        following=states.next_in_chain(run_dir, owner),
        preempted=code == ExitCode.STOPPED and job is not None and job.preempted,
        too_often=stalled > max_restarts,
    )


def cancelled(job: Job | None, owner: Owner) -> bool:
    """Whether the job was ended for good from outside.

    While it is being ended, Slurm shows COMPLETING in place of CANCELLED; a time limit has its
    reason there, a requeue its count.
    """
    if job is None:
        return False
    return "CANCELLED" in job.state or (
        job.state == "COMPLETING" and job.reason == "" and job.restarts <= owner.restart_count
    )


def count_stalled(state: State, step: int | None) -> int:
    """Starts in a row, the one that the state describes included, that left no newer checkpoint
    than they began with.
    """
    begun = state.get("start_step")
    return 0 if step is not None and (begun is None or step > begun) else int(state.get("stalled") or 0) + 1


def _what_happened(run_dir: Path | str, exit_code: int, state: State, owner: Owner) -> tuple[ExitCode, str]:
    """The exit code that counts, with a sentence.

    In order: what rank 0 wrote when it left in order, what the first failing rank wrote, what srun
    returned.
    """
    written = state.get("exit_code")
    code = None if written is None else as_exit_code(written)
    failures = states.read_failures(run_dir, owner)
    if failures and code in (None, ExitCode.CRASH):
        # A lost collective is what the others see when one rank dies: a code that says more wins
        # over an earlier crash.
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
            (
                "the time limit came before the run had saved and left: "
                "a larger signal_margin in the site file gives it more time"
            ),
        )
    if exit_code == 0 and state.get("state") != states.FINISHED:
        return ExitCode.CRASH, "the tasks ended with 0 but rank 0 did not write how (exit_code in state.json)"
    code = as_exit_code(exit_code)
    return code, "" if code == ExitCode.FINISHED else _words_of(exit_code)


def _lost_a_peer(reason: str) -> bool:
    """Whether a rank ended because another one was gone: true of its victims, and no cause."""
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
    """The few ranks that did not say why they ended, where the others did.

    Empty where those are many, or the ranks are not known.
    """
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
    """What srun returned, in words: 128 + a signal that ended a task, a task's code, or one of
    srun's own.
    """
    with contextlib.suppress(ValueError):
        return f"a rank was killed by {signal.Signals(exit_code - 128).name} (srun returned {exit_code})"
    with contextlib.suppress(ValueError):
        return f"srun returned {exit_code} ({ExitCode(exit_code).name.lower().replace('_', ' ')})"
    return f"srun returned {exit_code}"


def named(step: int | None) -> str:
    """A checkpoint's step, for a sentence."""
    return "none" if step is None else f"step {step}"
