"""metrics.jsonl: the history of a run, one JSON object a line.

Written step by step and read back as typed events.

A run that was killed may end in half a line, and one that was resumed from an older checkpoint does
some steps twice; both are normal here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from model.errors import UserError
from model.files import about
from model.words import printable
from pretrain.rundir.events import Checkpoint, End, Eval, Event, Place, Signal, Start, Train, Warn, event_of
from pretrain.rundir.lines import lines_backwards, open_regular
from pretrain.rundir.metrics_writer import TORN_EVENT, MetricsWriter

__all__ = ["End", "Metrics", "MetricsWriter", "Signal", "Start", "Train", "newest_checkpoint", "read_metrics"]

TORN = b" <torn>"
"""What ended a line that an interruption cut off, in files of earlier versions."""

_T = TypeVar("_T", Start, Train, Eval, Signal, Checkpoint, Warn, End)


@dataclass(frozen=True)
class Metrics:
    """Events by kind, sorted by step.

    Of several lines for one (event, step), the last counts.
    Evaluations of different splits and different warnings at one step are different events.
    """

    starts: tuple[Start, ...] = ()
    """All, in file order."""
    train: tuple[Train, ...] = ()
    eval: tuple[Eval, ...] = ()
    signal: tuple[Signal, ...] = ()
    checkpoint: tuple[Checkpoint, ...] = ()
    warning: tuple[Warn, ...] = ()
    end: tuple[End, ...] = ()
    step: int = 0
    """What the newest process has reached."""
    finished: End | None = None
    """How it left the loop; None while it runs, or when it was killed."""
    busy_seconds: float = 0.0
    """Time between the first and last line of each process, summed, without the idle time between
    processes.
    """
    torn: int = 0
    """Lines that an interruption cut off."""
    damaged: int = 0
    """Other lines that could not be read, and are left out."""
    first_damage: str = ""
    """Which is the first of them, and what is wrong with it."""

    @property
    def resumes(self) -> tuple[Start, ...]:
        """Every start but the first, where steps followed it.

        A finished run that is started again takes none.
        """
        reached = self.train[-1].step if self.train else 0
        return tuple(start for start in self.starts[1:] if start.step < reached)

    def settled(self) -> Metrics:
        """Without the steps beyond `step`.

        An interrupted process had done them, and the one after it has not redone them yet.
        """

        def kept(events: tuple[_T, ...]) -> tuple[_T, ...]:
            return tuple(event for event in events if event.step <= self.step)

        return replace(
            self,
            train=kept(self.train),
            eval=kept(self.eval),
            signal=kept(self.signal),
            checkpoint=kept(self.checkpoint),
            warning=kept(self.warning),
            end=kept(self.end),
        )


def read_metrics(path: Path | str) -> Metrics:
    """Reads a metrics.jsonl, of a finished run or one that is still being written.

    Lines that were cut off, and damaged ones, are left out and counted; events of unknown names are
    left out.
    Raises UserError where the file is missing, or is no regular file.
    """
    path = Path(path)
    events: list[Event] = []
    problems: list[tuple[int, str]] = []
    torn, offset, number, filled = 0, 0, 0, 0
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist: give the folder of a run that "
            "has started (it holds config.yaml and metrics.jsonl)"
        ) from None
    with about(path), file:
        for number, line in enumerate(file, 1):
            place = Place(path, offset, len(line))
            offset += len(line)
            if not line.strip():
                continue
            filled = number
            try:
                event = event_of(line.strip(), place)
            except (ValueError, TypeError, RecursionError) as error:
                problems.append((number, "" if line.strip().endswith(TORN) else printable(error)))
                continue
            torn += event is None and f'"event": "{TORN_EVENT}"'.encode() in line[:40]
            if event is not None:
                events.append(event)
    damaged = [(number, problem) for number, problem in problems if problem and number != filled]
    first = f"line {damaged[0][0]}: {damaged[0][1]}" if damaged else ""
    return replace(
        _gather(events), torn=torn + len(problems) - len(damaged), damaged=len(damaged), first_damage=first
    )


def newest_checkpoint(path: Path) -> int | None:
    """The step of the newest checkpoint that a metrics.jsonl tells of, read from its end.

    None where it tells of none.
    """
    for line in lines_backwards(path):
        if b'"checkpoint"' in line[:40]:
            try:
                event = event_of(line, Place(path, 0, 0))
            except (ValueError, TypeError, RecursionError):
                continue
            if isinstance(event, Checkpoint):
                return event.step
    return None


def _gather(events: list[Event]) -> Metrics:
    last = {_identity(event): event for event in events}
    newest = events[
        max((index for index, event in enumerate(events) if isinstance(event, Start)), default=0) :
    ]

    def of(kind: type[_T]) -> tuple[_T, ...]:
        return tuple(
            sorted(
                (event for event in last.values() if isinstance(event, kind)), key=lambda event: event.step
            )
        )

    return Metrics(
        starts=tuple(event for event in events if isinstance(event, Start)),
        train=of(Train),
        eval=of(Eval),
        signal=of(Signal),
        checkpoint=of(Checkpoint),
        warning=of(Warn),
        end=of(End),
        step=max((event.step for event in newest), default=0),
        finished=next((event for event in reversed(newest) if isinstance(event, End)), None),
        busy_seconds=_busy(events),
    )


def _identity(event: Event) -> tuple[object, ...]:
    part = event.split if isinstance(event, Eval) else event.message if isinstance(event, Warn) else None
    return type(event), event.step, part


def _busy(events: Iterable[Event]) -> float:
    total, begin, latest = 0.0, math.nan, math.nan
    for event in events:
        if isinstance(event, Start) or not math.isfinite(begin):
            total += max(0.0, latest - begin) if math.isfinite(begin) else 0.0
            begin = latest = event.time
        elif math.isfinite(event.time):
            latest = event.time
    return total + (max(0.0, latest - begin) if math.isfinite(begin) else 0.0)
