"""What became of a duel's cells, and what may be said about it: numbers from metrics.jsonl,
sentences that also name what speaks against a scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from model.cost.flops import flops_per_token
from model.errors import UserError
from model.parameters.size import parameter_count
from pretrain.config.schema import RunConfig
from pretrain.duel.grid import Cell, finished
from pretrain.rundir.metrics import Metrics, read_metrics

Status = Literal["learned", "stuck", "above", "diverged", "unfinished", "failed"]
STATUS_WORDS: dict[Status, str] = {
    "learned": "learned",
    "stuck": "at token frequencies",
    "above": "not yet at token frequencies",
    "diverged": "diverged",
    "unfinished": "not finished",
    "failed": "failed",
}
MARGIN = 0.1
"""Nats from the unigram entropy within which a model counts as knowing how frequent tokens are and
no more; below it has learned more, above less.

The entropy is of the train split: on a few validation samples, knowing its frequencies may cost
some hundredths more or less than that.
"""
CLIMB = 1.0
"""Nats by which the training loss may end above its lowest level and not count as diverged."""
BEFORE = 20
"""Steps a loss is compared with."""
SPIKE = 0.5
"""Nats above the median of those steps that make a spike, if they are six robust standard
deviations too.
"""
BURST = 10.0
"""Times the median gradient norm of those steps that make a burst."""
NOISE = 0.03
"""Nats that two seeds of small runs easily differ by; used where a duel has one seed."""


@dataclass(frozen=True)
class Outcome:
    """One cell's result. validation: final loss in nats per token, nan where there is none; train:
    mean of the last twentieth; spikes, bursts: of loss and gradient norm; step_seconds: median;
    seconds: of the whole cell; curve: (step, training loss).
    """

    cell: Cell
    status: Status
    validation: float
    train: float
    spikes: int
    bursts: int
    step_seconds: float
    seconds: float
    parameters: int
    flops: float
    hidden_size: int
    steps: int
    """That the cell trains in all."""
    curve: list[tuple[int, float]] = field(default_factory=list, repr=False)
    evaluations: list[tuple[int, float]] = field(default_factory=list, repr=False)


def outcome(cell: Cell, config: RunConfig, unigram: float) -> Outcome:
    """Reads a cell's folder."""
    folder = Path(config.runs_dir) / config.name
    try:
        metrics = read_metrics(folder / "metrics.jsonl")
    except UserError:
        metrics = Metrics()
    losses = np.array([event.loss for event in metrics.train], dtype=np.float64)
    norms = np.array([event.grad_norm for event in metrics.train], dtype=np.float64)
    evaluations = [(event.step, event.loss) for event in metrics.eval if event.split == "validation"]
    result = finished(folder)
    complete = result is not None and bool(evaluations) and evaluations[-1][0] == config.train.steps
    validation = evaluations[-1][1] if complete else math.nan
    tail = losses[-max(1, len(losses) // 20) :]
    times = [event.step_time_s for event in metrics.train if math.isfinite(event.step_time_s)]
    return Outcome(
        cell,
        _status(result is not None, validation, losses, unigram),
        validation,
        float(tail.mean()) if len(tail) else math.nan,
        count_spikes(losses),
        count_bursts(norms),
        median(times) if times else math.nan,
        result.seconds if result else math.nan,
        parameter_count(config.model)["total"],
        flops_per_token(
            config.model,
            config.data.seq_length,
            targets=config.target_share,
            source_length=config.data.source_length,
        ).model,
        config.model.hidden_size,
        config.train.steps,
        [(event.step, event.loss) for event in metrics.train],
        evaluations,
    )


def _status(complete: bool, validation: float, losses: np.ndarray, unigram: float) -> Status:
    if not complete:
        return "unfinished"
    if not math.isfinite(validation):
        return "diverged"
    window = max(1, len(losses) // 20)
    levels = np.convolve(losses, np.ones(window) / window, mode="valid")
    if len(levels) and levels[-1] > levels.min() + CLIMB:
        return "diverged"
    if validation < unigram - MARGIN:
        return "learned"
    return "above" if validation > unigram + MARGIN else "stuck"


def count_spikes(losses: np.ndarray) -> int:
    """Separate rises of the training loss above what the BEFORE steps before them say."""
    return _separate(
        losses,
        lambda value, past: (
            value - np.median(past)
            > max(SPIKE, 6 * 1.4826 * float(np.median(np.abs(past - np.median(past)))))
        ),
    )


def count_bursts(norms: np.ndarray) -> int:
    """Separate gradient norms of BURST times the median of the BEFORE steps before them."""
    return _separate(norms, lambda value, past: value > BURST * float(np.median(past)))


def _separate(values: np.ndarray, high: object) -> int:
    count, before = 0, False
    for index in range(BEFORE, len(values)):
        now = bool(high(values[index], values[index - BEFORE : index]))  # type: ignore[operator]
        count += now and not before
        before = now
    return count


@dataclass(frozen=True)
class Best:
    """A scheme at a depth at its own best setting. outcomes: one a seed; edge: which end of the
    grid the setting lies at, e.g. 'the lowest rate'.
    """

    variant: str
    layers: int
    lr: float
    warmup: float
    outcomes: list[Outcome]
    tried: int
    edge: str

    @property
    def validation(self) -> float:
        """Mean over seeds."""
        return sum(one.validation for one in self.outcomes) / len(self.outcomes)

    @property
    def spread(self) -> float:
        """Half of the distance of the lowest and the highest seed; nan for one seed."""
        values = [one.validation for one in self.outcomes]
        return (max(values) - min(values)) / 2 if len(values) > 1 else math.nan


def best_settings(outcomes: Sequence[Outcome]) -> list[Best]:
    """The best setting of every scheme at every depth, lowest loss first within a depth.

    Schemes without a finished cell are left out.
    """
    groups: dict[tuple[int, str], dict[tuple[float, float], list[Outcome]]] = {}
    for one in outcomes:
        if math.isfinite(one.validation):
            groups.setdefault((one.cell.layers, one.cell.variant.text), {}).setdefault(
                (one.cell.lr, one.cell.warmup), []
            ).append(one)
    found = []
    for (layers, variant), settings in groups.items():
        # Of settings with fewer seeds than others the mean is not comparable.
        seeds = max(len(group) for group in settings.values())
        full = {setting: group for setting, group in settings.items() if len(group) == seeds}
        (lr, warmup), group = min(
            full.items(), key=lambda item: sum(one.validation for one in item[1]) / len(item[1])
        )
        found.append(Best(variant, layers, lr, warmup, group, len(settings), _edge(lr, warmup, list(full))))
    return sorted(found, key=lambda best: (best.layers, best.validation))


def _edge(lr: float, warmup: float, settings: list[tuple[float, float]]) -> str:
    rates, warmups = sorted({one[0] for one in settings}), sorted({one[1] for one in settings})
    parts = []
    if len(rates) > 1 and lr in (rates[0], rates[-1]):
        parts.append("lowest rate" if lr == rates[0] else "highest rate")
    if len(warmups) > 1 and warmup == warmups[-1]:
        parts.append("longest warm-up")
    return " and ".join(parts)


def statements(outcomes: Sequence[Outcome], unigram: float) -> list[str]:
    """What the duel shows, depth by depth, in sentences; also what speaks against schemes, and how
    far it may be trusted.
    """
    said = []
    best = best_settings(outcomes)
    for layers in sorted({one.layers for one in best}):
        ranked = [one for one in best if one.layers == layers]
        said += _of_depth(ranked, layers, unigram)
    for status in ("diverged", "failed", "unfinished"):
        names = [one.cell.words for one in outcomes if one.status == status]
        if names:
            said.append(
                f"{len(names)} cell{'s' if len(names) > 1 else ''} {STATUS_WORDS[status]}: "
                f"{'; '.join(names[:6])}{' and others' if len(names) > 6 else ''}."
            )
    said.append(_trust(outcomes))
    return said


def _of_depth(ranked: list[Best], layers: int, unigram: float) -> list[str]:
    noise = max([NOISE] + [2 * one.spread for one in ranked if math.isfinite(one.spread)])
    first = ranked[0]
    level = [one.variant for one in ranked[1:] if one.validation - first.validation < noise]
    said = [
        (
            f"{layers} layers: {first.variant} ends lowest, "
            f"at {first.validation:.3f} (lr {first.lr:g}, warm-up {first.warmup:.0%})"
        )
        + (f"; within {noise:.2f} nats of it, which is noise here: {', '.join(level)}." if level else ".")
    ]
    behind = [
        f"{one.variant} by {one.validation - first.validation:.2f}"
        for one in ranked[1:]
        if one.variant not in level
    ]
    if behind:
        said.append(f"{layers} layers, behind it each at its own best setting: {', '.join(behind)}.")
    stuck = [one.variant for one in ranked if abs(one.validation - unigram) <= MARGIN]
    if stuck:
        said.append(
            f"{layers} layers: {', '.join(stuck)} learned no more than how "
            f"frequent tokens are (entropy {unigram:.3f}) at any setting tried."
        )
    above = [f"{one.variant} ({one.validation:.3f})" for one in ranked if one.validation > unigram + MARGIN]
    if above:
        said.append(
            f"{layers} layers: not yet at token frequencies (entropy "
            f"{unigram:.3f}) at any setting tried: {', '.join(above)}."
        )
    edges = [f"{one.variant} ({one.edge})" for one in ranked if one.edge]
    if edges:
        said.append(
            f"{layers} layers: best at the edge of the grid, "
            f"so that a better setting may lie outside: {', '.join(edges)}."
        )
    return said


def _trust(outcomes: Sequence[Outcome]) -> str:
    seeds = len({one.cell.seed for one in outcomes})
    steps = max(one.steps for one in outcomes)
    many = (
        f"{seeds} seeds" if seeds > 1 else f"one seed, so differences below about {NOISE} nats mean nothing"
    )
    return (
        f"{len(outcomes)} cell{'s' if len(outcomes) > 1 else ''} of {steps} steps, {many}. "
        "A short duel ranks how well schemes start, not where they end."
    )
