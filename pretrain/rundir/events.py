"""What a run tells of itself, as typed events: the lines of metrics.jsonl."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pretrain.rundir.lines import open_regular
from pretrain.rundir.outcome import code_of_reason

LATEST = 253402300800.0
"""Seconds since 1970 of the year 10000, which no calendar here reaches."""


@dataclass(frozen=True)
class Start:
    """A process began or resumed the run after `step` finished steps."""

    step: int
    time: float = math.nan
    """Seconds since 1970, as in all events; nan where the line has none."""
    parameters: int | None = None
    world_size: int | None = None
    layout: Mapping[str, object] = field(default_factory=dict)
    precision: str | None = None
    unigram_entropy: float = math.nan
    padding: float = math.nan
    """Share of the places of training samples that held no token; nan where it is not known."""


@dataclass(frozen=True)
class Train:
    """One optimizer step (1-based). A number that was not finite is nan."""

    step: int
    loss: float
    """Nats per token."""
    time: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    """Of that step."""
    tokens: float = math.nan
    """Consumed in total; of an encoder-decoder, those of the targets."""
    tokens_per_s: float = math.nan
    step_time_s: float = math.nan
    data_wait_share: float = math.nan
    skipped: bool = False
    batch_size: float = math.nan
    """Samples of the step, where that grows."""
    seq_length: float = math.nan
    """Tokens of its sequences, where that grows."""


@dataclass(frozen=True)
class Eval:
    """Loss of one split in nats per token after `step` steps."""

    step: int
    loss: float
    time: float = math.nan
    split: str = "validation"
    samples: int | None = None
    tokens: int | None = None
    accuracy: float = math.nan
    """Share of the tokens that were the model's likeliest; nan where the task does not ask."""
    top5: float = math.nan
    """Share of the labels that were among the five likeliest; nan where the task does not ask."""


@dataclass(frozen=True)
class Place:
    """A line of a file."""

    path: Path
    offset: int
    """Bytes before it."""
    size: int
    """Its bytes."""


@dataclass(frozen=True)
class Signal:
    """Per-layer measurements.

    Those of a deep run are most of its file: they stay there and are read when asked for.
    """

    step: int
    time: float
    place: Place

    @property
    def layers(self) -> tuple[Mapping[str, float], ...]:
        """One mapping a layer, with `layer` (1-based) and whatever was measured; none where the
        line is damaged.
        """
        return _layers_at(self.place)

    def profile(self, key: str) -> tuple[list[int], list[float]]:
        """Layer numbers and values of one measurement, for the layers that have a finite one."""
        finite = (layer for layer in self.layers if math.isfinite(layer.get(key, math.nan)))
        pairs = sorted((int(layer["layer"]), float(layer[key])) for layer in finite)
        return [number for number, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Checkpoint:
    """A saved state."""

    step: int
    time: float = math.nan
    seconds: float = math.nan
    """Until it was the newest."""
    stall_seconds: float = math.nan
    """Of these, how long training stood still."""
    bytes: float = math.nan
    """Of all processes."""


@dataclass(frozen=True)
class Warn:
    """Something the run survived."""

    step: int
    message: str
    time: float = math.nan


@dataclass(frozen=True)
class End:
    """The process left the loop."""

    step: int
    reason: str = ""
    time: float = math.nan
    exit_code: int = 0
    """Of the process. Lines of earlier versions have none; theirs follows from the reason."""


Event = Start | Train | Eval | Signal | Checkpoint | Warn | End
EVENT_KINDS: dict[str, type[Event]] = {
    "start": Start,
    "train": Train,
    "eval": Eval,
    "signal": Signal,
    "checkpoint": Checkpoint,
    "warning": Warn,
    "end": End,
}

SIGNAL_LINE = re.compile(
    rb'\{"event": "signal", "time": ([0-9.e+]{1,30}), "step": ([0-9]{1,18}), "layers": \['
)
"""How a line of measurements begins, which need not be read whole to know when they were made."""


def event_of(line: bytes, place: Place) -> Event | None:
    """The event of a line.

    None for one of an unknown name. Raises ValueError or TypeError where it does not fit.
    """
    begin = SIGNAL_LINE.match(line)
    if begin is not None and line.endswith(b"}"):
        return Signal(int(begin[2]), _float("time", float(begin[1])), place)
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("event"), str):
        raise TypeError("no JSON object with an `event` name")
    kind = EVENT_KINDS.get(record["event"])
    if kind is None:
        return None
    if kind is Signal:
        _layers(record.get("layers"))
        return Signal(_whole("step", record.get("step")), _float("time", record.get("time")), place)
    fields = kind.__dataclass_fields__
    known = {key: _typed(key, value, str(fields[key].type)) for key, value in record.items() if key in fields}
    if kind is End and "exit_code" not in known:
        known["exit_code"] = int(code_of_reason(known.get("reason", "")))
    try:
        return kind(**known)
    except (
        TypeError
    ) as error:  # a required key is missing: "... missing 1 required positional argument: 'loss'"
        lacking = str(error).rsplit(": ", 1)[-1]
        raise ValueError(f"event {record['event']} lacks a key ({lacking})") from None


def _typed(key: str, value: object, wanted: str) -> Any:
    """A value of a line as a field has it, by the field's type."""
    if wanted == "float":
        return _float(key, value)
    if wanted.endswith("| None") and value is None:
        return None
    if wanted.startswith("int"):
        return _whole(key, value)
    kinds: dict[str, type] = {"str": str, "bool": bool}
    kind = kinds.get(wanted.removesuffix(" | None"), dict)
    if not isinstance(value, kind):
        raise TypeError(f"`{key}` must be {kind.__name__}, not {value!r:.50}")
    return value


def _whole(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise TypeError(f"`{key}` must be a whole number, not {value!r:.50}")
    return value


def _float(key: str, value: object) -> float:
    if value is None:
        return math.nan
    if key == "time" and isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 2**1023:
        raise TypeError(f"`{key}` must be a number or null, not {value!r:.50}")
    if key == "time" and not 0 <= value < LATEST:
        raise TypeError(f"`time` must be seconds since 1970, not {value!r:.50}")
    return float(value)


@functools.lru_cache(maxsize=8)
def _layers_at(place: Place) -> tuple[Mapping[str, float], ...]:
    try:
        with open_regular(place.path) as file:
            file.seek(place.offset)
            return _layers(json.loads(file.read(place.size))["layers"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()


def _layers(value: object) -> tuple[Mapping[str, float], ...]:
    """Layers as mappings from names to numbers. Raises TypeError where they are none."""
    if not isinstance(value, list) or not all(isinstance(layer, dict) for layer in value):
        raise TypeError("`layers` must be a list of objects with a `layer` number")
    found = []
    for layer in value:
        _whole("layer", layer.get("layer"))
        found.append(
            {
                key: _float(key, number)
                for key, number in layer.items()
                if not isinstance(number, str | list | dict)
            }
        )
    return tuple(found)
