"""Ends a run whose step or collective does not end, with exit code 78 everywhere.

It leaves the stacks of every rank and names the late one.

Each rank watches its own progress, in memory.
So a run in order costs two assignments a step and one look at a file every few seconds.
The first rank that has waited too long leaves a mark beside state.json.
Every rank that can still run then dumps its stacks and says where it is.
A rank that is stopped, or whose node is gone, is known by saying nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from model.files import atomic_write_text
from parallel.launch.exit_codes import ExitCode
from pretrain.rundir.outcome import write_end
from pretrain.rundir.state import CONTROL, Owner, record_failure
from pretrain.train.callbacks.base import Callback, EvalRecord, RunView, SaveRecord, StepRecord

UNMEASURED_SECONDS = 3600.0
"""For what has no usual length.

That is the first step with its compilation, reading data, evaluation and checkpoints.
"""
MEASURED_STEPS = 100
BETWEEN, BACKWARD, UPDATE = 0, 1, 2
PHASES = (
    "before its forward pass (data, evaluation, checkpoint, callbacks)",
    "forward or backward pass",
    "norm, optimizer, gathering of weights",
)
NAMED_RANKS = 4


@dataclass(frozen=True)
class Report:
    """Where a rank is."""

    rank: int
    host: str
    step: int
    """Being taken, or to be taken next."""
    phase: int
    """Index into PHASES."""
    waiting: bool
    """Inside of a collective."""
    where: str
    """Innermost line of code."""


class Watchdog(Callback):
    """One for each rank, and the first of its callbacks, so that what the others do counts as time
    between two steps.

    hosts: node of each rank, empty where it is not known.
    step_minutes: limit of a step, None for one that follows from the steps, 0 for none.
    collective_minutes: of the process group.
    leave: ends the process, given the exit code.
    """

    order = -2

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        hosts: Sequence[str],
        step_minutes: float | None,
        collective_minutes: float,
        owner: Owner | None = None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.run_dir, self.rank, self.hosts, self.leave = run_dir, rank, list(hosts), leave
        self.owner = owner or Owner.from_environment()
        self.folder = run_dir / CONTROL
        self.step_seconds = None if step_minutes is None else 60 * step_minutes
        self.collective_seconds = 60 * collective_minutes
        self._recent: deque[float] = deque(maxlen=MEASURED_STEPS)
        self._compiled = False  # a start's first step says nothing about the others
        self._mark = (0, BETWEEN, time.monotonic())
        self._stop, self._ending = threading.Event(), threading.Lock()
        self._main = threading.main_thread()
        shortest = self.step_seconds if self.step_seconds else self.collective_seconds / 2
        self.poll_seconds = min(10.0, max(0.2, shortest / 10))
        self._thread: threading.Thread | None = None

    @property
    def on(self) -> bool:
        """Whether steps are watched."""
        return self.step_seconds != 0

    # -- moments of a run

    def on_start(self, trainer: RunView) -> None:
        """Starts watching."""
        self._mark = (trainer.step + 1, BETWEEN, time.monotonic())
        self.start()

    def before_step(self, trainer: RunView) -> None:
        """A step begins."""
        self._mark = (trainer.step, BACKWARD, time.monotonic())

    def on_gradients(self, trainer: RunView) -> None:
        """Gradients are reduced; the clock of the step goes on."""
        step, _, begin = self._mark
        self._mark = (step, UPDATE, begin)

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """The step is done."""
        if self._compiled:
            self._recent.append(float(record["step_time_s"]))
        self._compiled = True
        self._between(trainer)

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """An evaluation is progress."""
        self._between(trainer)

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        """So is a checkpoint."""
        self._between(trainer)

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """Stops watching."""
        self.stop()

    def _between(self, trainer: RunView) -> None:
        self._mark = (trainer.step + 1, BETWEEN, time.monotonic())

    # -- watching

    def start(self) -> None:
        """Begins to watch, in a thread of its own."""
        if self.on and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends watching."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=60)
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(OSError):
                if not self.stacks_file(self.rank).stat().st_size:
                    self.stacks_file(self.rank).unlink()

    def limit(self, phase: int) -> float:
        """Seconds after the last progress at which a rank in this phase counts as hung."""
        explicit = self.step_seconds or 0.0
        if phase == BETWEEN or not self._recent:
            return max(UNMEASURED_SECONDS, explicit)
        if self.step_seconds:
            return self.step_seconds
        slowest = max(self._recent)
        # Before the collectives' own limit, which ends processes without a word.
        # But a step may take twice what one took a moment ago.
        return max(self.collective_seconds / 2, min(10 * slowest, 0.9 * self.collective_seconds), 2 * slowest)

    def _watch(self) -> None:
        stacks = self._open_stacks()
        looked = time.monotonic()
        while not self._stop.wait(self.poll_seconds):
            now = time.monotonic()
            step, phase, since = self._mark
            asleep = now - looked - self.poll_seconds
            if (
                asleep > 5 * self.poll_seconds
            ):  # this process was itself stopped, or starved: no time of its own has passed
                since += asleep
                if self._mark[:2] == (step, phase):
                    self._mark = (step, phase, since)
            looked = now
            if stacks is not None and len(self.hosts) > 1:
                # A thread in C, for a rank that computes without ever giving Python a turn.
                # It dumps, and ends the process with code 1.
                faulthandler.dump_traceback_later(2 * self.limit(phase) + 60, exit=True, file=stacks)
            if now - since > self.limit(phase) or self.trigger.exists():
                self.end(f"step {step} did not end within {self.limit(phase):.0f} s")
                return

    @property
    def trigger(self) -> Path:
        """Its existence asks every rank of this start to report and leave.

        It holds what went wrong.
        """
        return self.folder / f"{self.owner.label}.hang"

    def stacks_file(self, rank: int) -> Path:
        """Where a rank's stacks are."""
        return self.folder / f"{self.owner.label}.rank{rank:05d}.stacks"

    def _open_stacks(self) -> TextIO | None:
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            return self.stacks_file(self.rank).open("w")
        return None

    # -- the end

    def end(self, what: str) -> None:
        """Dumps stacks, waits for the other ranks' words, names the late one, leaves with code 78.

        Does not return (unless `leave` does).
        """
        if not self._ending.acquire(blocking=False):
            time.sleep(600)  # the other thread of this rank is at it, and ends the process
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            if not self.trigger.exists():
                atomic_write_text(self.trigger, what)
            with self.stacks_file(self.rank).open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            atomic_write_text(self._report_file(self.rank), json.dumps(asdict(self.report())))
            what = self.trigger.read_text() or what
        reports = self._collect()
        late = late_ranks(reports, self.hosts)
        reason = f"{what}: {late.words}; stacks in {self.folder}"
        record_failure(self.run_dir, self.rank, ExitCode.HUNG, reason, self.owner, at_fault=late.host)
        if self.rank == min((report.rank for report in reports), default=self.rank):
            print(f"fathom: hung: {reason}", file=sys.stderr, flush=True)
            with contextlib.suppress(Exception):
                write_end(self.run_dir, ExitCode.HUNG, reason)
        self.leave(int(ExitCode.HUNG))

    def report(self) -> Report:
        """Where this rank is."""
        step, phase, _ = self._mark
        waiting, where = stack_of(self._main.ident)
        return Report(self.rank, self.hosts[self.rank], step, phase, waiting, where)

    def _report_file(self, rank: int) -> Path:
        return self.folder / f"{self.owner.label}.hang.{rank:05d}.json"

    def _collect(self) -> list[Report]:
        """The reports of all ranks, or of those that came in time.

        The time is that in which every living one must have seen the mark.
        """
        end = time.monotonic() + max(5.0, 3 * self.poll_seconds)
        while True:
            reports = []
            for path in sorted(self.folder.glob(f"{self.owner.label}.hang.*.json")):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    reports.append(Report(**json.loads(path.read_text(encoding="utf-8"))))
            if len(reports) >= len(self.hosts) or time.monotonic() > end:
                return reports
            time.sleep(0.2 if len(self.hosts) <= 32 else 2.0)


class Late(NamedTuple):
    """Who holds the others up."""

    words: str
    host: str | None
    """The one node that all of them are on, where others are on other nodes."""


def late_ranks(reports: Sequence[Report], hosts: Sequence[str]) -> Late:
    """Who holds the others up.

    hosts: node of each rank.
    A rank without a report is stopped, or its node is gone.
    """
    told = {report.rank for report in reports}
    silent = [rank for rank in range(len(hosts)) if rank not in told]
    if silent:
        return Late(f"{_names(silent, hosts)} gave no sign of life", _one_node(silent, hosts))
    first = min((report.step, report.phase) for report in reports)
    behind = [report for report in reports if (report.step, report.phase) == first]
    if len(behind) == len(reports):
        behind = [report for report in reports if not report.waiting]
    if behind and len(behind) < max(len(reports), 2):
        where, ranks = behind[0], [report.rank for report in behind]
        return Late(
            f"{_names(ranks, hosts)} held up the others, "
            f"in step {where.step}, {PHASES[where.phase]}, at {where.where}",
            _one_node(ranks, hosts),
        )
    where = reports[0]
    return Late(
        f"no rank is behind the others: step {where.step}, "
        f"{PHASES[where.phase]}, rank {where.rank} at {where.where}",
        None,
    )


def _one_node(ranks: Sequence[int], hosts: Sequence[str]) -> str | None:
    """The node of these ranks where it is one, and not the only one."""
    nodes = {hosts[rank] for rank in ranks}
    return nodes.pop() or None if len(nodes) == 1 < len(set(hosts)) else None


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = ", ".join(
        f"rank {rank}" + (f" on {hosts[rank]}" if hosts[rank] else "") for rank in ranks[:NAMED_RANKS]
    )
    return named + (f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else "")


def stack_of(thread: int | None) -> tuple[bool, str]:
    """Whether a thread waits in a collective, and its innermost line as `file.py:12 in name`."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return False, "unknown"
    where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
    waiting = False
    while frame is not None:
        name = frame.f_code.co_filename
        waiting = waiting or "torch/distributed/" in name or name.endswith("p2p_communication.py")
        frame = frame.f_back
    return waiting, where


def timed_out(error: BaseException) -> bool:
    """Whether an error of PyTorch says that a collective took too long."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)
