"""metrics.jsonl: the history of a run, one JSON object a line, written step by step and read back as typed events.

A run that was killed may end in half a line, and one that was resumed from an older checkpoint does some steps twice; both are normal here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from model.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

TORN = " <torn>"
"""Ends a line that an interruption cut off, so that a reader can tell it from a damaged file."""


@dataclass(frozen=True)
class Start:
    """A process began or resumed the run after `step` finished steps. Time: seconds since 1970, as in all events (nan where the line has none)."""

    step: int
    time: float = math.nan
    parameters: int | None = None
    world_size: int | None = None
    layout: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    unigram_entropy: float = math.nan


@dataclass(frozen=True)
class Train:
    """One optimizer step (1-based). loss: nats per token; lr of that step; tokens: consumed in total; a number that was not finite is nan."""

    step: int
    loss: float
    time: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    tokens: float = math.nan
    tokens_per_s: float = math.nan
    step_time_s: float = math.nan
    data_wait_share: float = math.nan
    skipped: bool = False


@dataclass(frozen=True)
class Eval:
    """Loss of one split in nats per token after `step` steps."""

    step: int
    loss: float
    time: float = math.nan
    split: str = "validation"
    samples: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Signal:
    """Per-layer measurements: one mapping a layer, with `layer` (1-based) and whatever was measured."""

    step: int
    layers: tuple[Mapping[str, float], ...]
    time: float = math.nan

    def profile(self, key: str) -> tuple[list[int], list[float]]:
        """Layer numbers and values of one measurement, for the layers that have a finite one."""
        pairs = sorted(
            (int(layer["layer"]), float(layer[key]))
            for layer in self.layers
            if math.isfinite(layer.get(key, math.nan))
        )
        return [number for number, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Checkpoint:
    """A saved state. seconds: until it was the newest; stall_seconds: of these, how long training stood still; bytes: of all processes."""

    step: int
    time: float = math.nan
    seconds: float = math.nan
    stall_seconds: float = math.nan
    bytes: float = math.nan


@dataclass(frozen=True)
class Warn:
    """Something the run survived."""

    step: int
    message: str
    time: float = math.nan


@dataclass(frozen=True)
class End:
    """The process left the loop in order."""

    step: int
    reason: str = ""
    time: float = math.nan


Event = Start | Train | Eval | Signal | Checkpoint | Warn | End
KINDS: dict[str, type[Event]] = {
    "start": Start,
    "train": Train,
    "eval": Eval,
    "signal": Signal,
    "checkpoint": Checkpoint,
    "warning": Warn,
    "end": End,
}
_T = TypeVar("_T", Start, Train, Eval, Signal, Checkpoint, Warn, End)


@dataclass(frozen=True)
class Metrics:
    """Events by kind, sorted by step; of several lines for one (event, step) the last. `starts` keeps all, in file order.

    Evaluations of different splits and different warnings at one step are different events.
    step: the step the newest process has reached. finished: how it left the loop; None while it runs, or when it was killed.
    busy_seconds: time between the first and last line of each process, summed (the idle time between processes is left out).
    torn: lines that an interruption cut off.
    """

    starts: tuple[Start, ...] = ()
    train: tuple[Train, ...] = ()
    eval: tuple[Eval, ...] = ()
    signal: tuple[Signal, ...] = ()
    checkpoint: tuple[Checkpoint, ...] = ()
    warning: tuple[Warn, ...] = ()
    end: tuple[End, ...] = ()
    step: int = 0
    finished: End | None = None
    busy_seconds: float = 0.0
    torn: int = 0

    @property
    def resumes(self) -> tuple[Start, ...]:
        """Every start but the first, where steps followed it: a finished run that is started again takes none."""
        reached = self.train[-1].step if self.train else 0
        return tuple(start for start in self.starts[1:] if start.step < reached)

    def settled(self) -> Metrics:
        """Without the steps beyond `step`, which an interrupted process had done and the one after it has not redone yet."""

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


class MetricsWriter:
    """Appends events to a metrics.jsonl, which need not exist yet; one write call a line, so that lines of a killed run are whole but the last.

    A last line that an interruption left without its newline is closed on opening: as it is where it is complete, else marked as torn.
    Usable as a context manager. Raises OSError as the file system does.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        repair = _repair(self.path)
        self._file = self.path.open("ab", buffering=0)
        if repair:
            self._put(repair)

    def write(self, event: str, step: int, **fields: Any) -> None:
        """One event, stamped with the current time unless `time` is given.

        Floats that are not finite become null (JSON has no NaN) and are named in `nonfinite`: `loss`, or `layers[2].residual_rms` inside lists.
        Raises ValueError for an unknown event name.
        """
        if event not in KINDS:
            raise ValueError(f"event {event!r} is none of {', '.join(KINDS)}")
        lost: list[str] = []
        record = {
            "event": event,
            "time": round(time.time(), 3),
            "step": step,
            **{key: _clean(value, key, lost) for key, value in fields.items()},
        }
        if lost:
            record["nonfinite"] = lost
        self._put(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Closes the file; further writes raise ValueError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _put(self, text: str) -> None:
        data = text.encode()
        try:
            while data:  # an unbuffered write may take less than all of it, on a nearly full disk for example
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._file.name)) from None


def read_metrics(path: Path | str) -> Metrics:
    """Reads a metrics.jsonl, of a finished run or one that is still being written.

    A last line that is no JSON, and any line marked as torn, is skipped; so are events of unknown names. Raises UserError naming file and line
    where another line is no JSON object or lacks what its event needs, and where the file is missing.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} does not exist: give the folder of a run that has started (it holds config.yaml and metrics.jsonl)"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    events: list[Event] = []
    torn = 0
    for number, line in numbered:
        try:
            record = json.loads(line)
        except ValueError as error:
            if line.endswith(TORN) or number == numbered[-1][0]:
                torn += 1
                continue
            raise UserError(f"{path}, line {number} is no JSON ({error}): remove or mend that line") from None
        try:
            event = _parse(record)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: {error}; remove or mend that line") from None
        if event is not None:
            events.append(event)
    return _gather(events, torn)


def _gather(events: list[Event], torn: int) -> Metrics:
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
        torn=torn,
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


def _parse(record: Any) -> Event | None:
    """Raises ValueError or TypeError where the record does not fit its event."""
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise TypeError("no JSON object with an `event` name")
    kind = KINDS.get(record["event"])
    if kind is None:
        return None
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"`step` must be a whole number, not {step!r}")
    known = {
        key: _read(key, value, kind) for key, value in record.items() if key in kind.__dataclass_fields__
    }
    try:
        return kind(**known)
    except (
        TypeError
    ) as error:  # a required key is missing: "... missing 1 required positional argument: 'loss'"
        raise ValueError(f"event {record['event']} lacks a key ({str(error).rsplit(': ', 1)[-1]})") from None


def _read(key: str, value: Any, kind: type[Event]) -> Any:
    wanted = str(kind.__dataclass_fields__[key].type)
    if key == "layers":
        return _layers(value)
    if wanted == "float":
        if key == "time" and isinstance(value, str):
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"`{key}` must be a number or null, not {value!r}")
        return float(value)
    return value


def _layers(value: Any) -> tuple[Mapping[str, float], ...]:
    if not isinstance(value, list) or not all(
        isinstance(layer, dict) and isinstance(layer.get("layer"), int) for layer in value
    ):
        raise TypeError("`layers` must be a list of objects with a `layer` number")
    return tuple(
        {
            key: math.nan if number is None else float(number)
            for key, number in layer.items()
            if number is None or isinstance(number, int | float)
        }
        for layer in value
    )


def _clean(value: Any, name: str, lost: list[str]) -> Any:
    """The value as JSON has it; NumPy and Torch scalars become Python's by their item()."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(name)
        return None
    if isinstance(value, Mapping):
        return {key: _clean(inner, f"{name}.{key}", lost) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner, f"{name}[{index}]", lost) for index, inner in enumerate(value)]
    return value


def _repair(path: Path) -> str:
    """What to append to close an unfinished last line; empty where there is none."""
    data = path.read_bytes() if path.exists() else b""
    if not data or data.endswith(b"\n"):
        return ""
    try:
        json.loads(data.rsplit(b"\n", 1)[-1])
    except ValueError:
        return TORN + "\n"
    return "\n"
