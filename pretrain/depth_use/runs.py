"""Which models are measured, and on what: runs and checkpoints, opened and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.errors import UserError
from model.words import printable
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.depth_use.measure import Batch, Measured, Plan, Progress, measure
from pretrain.trained.measures.windows import Asked, open_windows
from pretrain.trained.open import Trained, open_trained

SAMPLES = 32
"""Windows that are measured unless asked for others."""


@dataclass(frozen=True)
class Run:
    """A model before it is measured."""

    label: str
    """Its name, or its path where another one has the same name."""
    trained: Trained
    plan: Plan
    data: str
    """What it is measured on, in words."""
    window: int
    """Tokens of a window."""
    batches: tuple[Batch, ...]
    end_mark: int | None = None
    """As `Windows.end_mark`."""


@dataclass(frozen=True)
class DepthUse:
    """A measured model."""

    run: Run
    precision: str
    """And the device, in words."""
    measured: Measured

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.run.plan.num_layers


def open_runs(paths: Sequence[Path], asked: Asked, every: int | None = None) -> list[Run]:
    """Opens run folders or checkpoints, all of which are measured on the same tokens.

    every: as in `Plan.of`.
    Raises UserError for what is no checkpoint or does not fit, before anything is measured.
    """
    if asked.samples is None:
        asked = replace(asked, at_most=SAMPLES)
    runs = [_open(path, asked, every) for path in paths]
    for run, path in zip(runs[1:], paths[1:], strict=True):
        if not _same(runs[0].batches, run.batches):
            raise UserError(
                f"{paths[0]} and {path} would be measured on different tokens "
                f"({runs[0].data}, windows of {runs[0].window}; {run.data}, windows of {run.window}): "
                "name one data set with --data, or measure them one by one"
            )
    names = [run.label for run in runs]
    return [
        replace(run, label=printable(path)) if names.count(run.label) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def measure_runs(
    runs: Sequence[Run],
    precision: str,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress | None = None,
) -> Iterator[DepthUse]:
    """Measures one after the other, each alone in memory.

    precision: auto, fp32 or bf16.
    say, progress: as in `measure`.
    """
    from pretrain.trained.scorer import Scorer

    for run in runs:
        scorer = Scorer(run.trained, precision)
        scorer.end_mark = run.end_mark
        measured = measure(
            scorer,
            run.plan,
            run.batches,
            say=lambda line, label=run.label: say(f"{label}: {line}"),  # type: ignore[misc]
            progress=progress,
        )
        yield DepthUse(run, scorer.label, measured)


def _open(path: Path, asked: Asked, every: int | None) -> Run:
    trained = open_trained(path, "fathom depth-use")
    plan = Plan.of(trained.config.num_layers, every)
    windows = open_windows(trained, Tokenizer(trained.tokenizer) if trained.tokenizer else None, asked)
    batches = tuple(windows.batches)
    return Run(
        printable(trained.name), trained, plan, windows.data, windows.window, batches, windows.end_mark
    )


def _same(ours: Sequence[Batch], theirs: Sequence[Batch]) -> bool:
    """Whether two sequences of batches hold the same windows, in batches of whatever size."""
    rows = [[row for tokens, _ in batches for row in tokens] for batches in (ours, theirs)]
    return len(rows[0]) == len(rows[1]) and all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
