"""A duel's page and its JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.files import atomic_write_text
from model.records import finite
from model.words import duration, quantity
from pretrain.config.schema import RunConfig
from pretrain.duel import transfer
from pretrain.duel.charts import charts
from pretrain.duel.grid import Grid
from pretrain.duel.results import STATUS_WORDS, Best, Outcome, best_settings, statements
from pretrain.report.page import Page, Section, Table, render_page

PAGE, DATA = "duel.html", "duel.json"


@dataclass(frozen=True)
class Duel:
    """Everything a page needs. base: the configuration that cells were made from; command: as it
    was typed.
    """

    base: RunConfig
    grid: Grid
    outcomes: Sequence[Outcome]
    unigram: float
    command: str
    transfer: bool = False
    """Whether every scheme was trained with and without `model.transfer`."""


def write(duel: Duel, folder: Path) -> tuple[Path, Path]:
    """Writes the page and the JSON into the duel's folder and returns their paths."""
    page, data = folder / PAGE, folder / DATA
    atomic_write_text(data, json.dumps(as_json(duel), indent=1, allow_nan=False) + "\n")
    atomic_write_text(page, render(duel))
    return page, data


def as_json(duel: Duel) -> dict[str, object]:
    """steps, tokens_per_step, unigram_entropy, equal; `statements`: sentences; `best`: own best
    setting of every scheme and depth; `cells`: all.
    """
    base = duel.base
    return {
        "command": duel.command,
        "steps": base.train.steps,
        "tokens_per_step": base.train.global_batch_size * base.data.seq_length,
        "seq_length": base.data.seq_length,
        "unigram_entropy": finite(duel.unigram),
        "equal": duel.grid.equal,
        "statements": statements(duel.outcomes, duel.unigram),
        "best": [
            {
                "scheme": one.variant,
                "layers": one.layers,
                "lr": one.lr,
                "warmup": one.warmup,
                "validation_loss": finite(one.validation),
                "seeds": len(one.outcomes),
                "half_range": finite(one.spread),
                "settings_tried": one.tried,
                "edge": one.edge,
            }
            for one in best_settings(duel.outcomes)
        ],
        "transfer": [
            {
                "scheme": one.variant,
                "layers": one.layers,
                "best_lr": finite(one.rate),
                "validation_loss": finite(one.loss),
                "edge": one.edge,
                "points": [list(point) for point in one.points],
            }
            for one in (transfer.optima(duel.outcomes) if duel.transfer else [])
        ],
        "cells": [
            {
                "name": one.cell.name,
                "scheme": one.cell.variant.text,
                "layers": one.cell.layers,
                "lr": one.cell.lr,
                "warmup": one.cell.warmup,
                "seed": one.cell.seed,
                "status": one.status,
                "validation_loss": finite(one.validation),
                "train_loss": finite(one.train),
                "spikes": one.spikes,
                "gradient_bursts": one.bursts,
                "step_seconds": finite(one.step_seconds),
                "seconds": finite(one.seconds),
                "parameters": one.parameters,
                "flops_per_token": one.flops,
                "hidden_size": one.hidden_size,
            }
            for one in duel.outcomes
        ],
    }


def render(duel: Duel) -> str:
    """The page."""
    base, grid = duel.base, duel.grid
    open_cells = [one for one in duel.outcomes if one.status == "unfinished"]
    said = statements(duel.outcomes, duel.unigram)
    model = base.model
    facts = [
        ("Schemes", str(len(grid.variants))),
        ("Layers", ", ".join(str(layers) for layers in grid.layers)),
        (
            "Model",
            (
                f"width {model.hidden_size}, {model.num_attention_heads} heads, "
                f"{model.activation}, vocabulary {model.vocab_size:,}"
            ),
        ),
        ("Equal over depth", "tokens and width" if grid.equal == "tokens" else "tokens and parameters"),
        ("Tokens a step", f"{base.train.global_batch_size} × {base.data.seq_length}"),
        (
            "Steps",
            (
                f"{base.train.steps:,} "
                f"({quantity(base.batch_sizes.before(base.train.steps) * base.data.seq_length)} tokens)"
            ),
        ),
        ("Rates", ", ".join(f"{lr:g}" for lr in grid.lrs)),
        ("Warm-ups", ", ".join(f"{warmup:.0%}" for warmup in grid.warmups)),
        ("Data", ", ".join(corpus.path for corpus in base.data.corpora)),
        ("Seeds", ", ".join(str(seed) for seed in grid.seeds)),
    ]
    sections = [
        Section("What it shows", said),
        Section("", charts=charts(duel.outcomes, duel.unigram)),
        Section("Every scheme at its own best setting", tables=[best_table(best_settings(duel.outcomes))]),
        *_transfer_sections(duel),
        Section("Every cell", tables=[cell_table(duel.outcomes)], folded=f"{len(duel.outcomes)} cells"),
        Section("How to reproduce", preformatted=duel.command),
    ]
    status = (
        ("open", f"{len(open_cells)} of {len(duel.outcomes)} cells are not finished")
        if open_cells
        else ("good", f"{len(duel.outcomes)} cells finished")
    )
    return render_page(Page("Depth duel", "depth duel", status, said[0] if said else "", facts, sections))


def _transfer_sections(duel: Duel) -> list[Section]:
    if not duel.transfer:
        return []
    found = transfer.optima(duel.outcomes)
    said, table, chart = transfer.statements(found), transfer.table(found), transfer.chart(found)
    return [Section("Does the best rate carry over?", said, tables=[table], charts=[chart])]


def best_table(best: Sequence[Best]) -> Table:
    """One row a scheme and depth, lowest loss first; the first of each depth is strong."""
    head = [
        "layers",
        "scheme",
        "final loss",
        "± seeds",
        "lr",
        "warm-up",
        "spikes",
        "gradient bursts",
        "parameters",
        "s / step",
        "settings",
        "remark",
    ]
    rows: list[list[str]] = []
    strong: set[int] = set()
    seen: set[int] = set()
    for one in best:
        if one.layers not in seen:
            strong.add(len(rows))
            seen.add(one.layers)
        outcomes = one.outcomes
        remark = "; ".join(
            part for part in (STATUS_WORDS[outcomes[0].status], one.edge) if part and part != "learned"
        )
        rows.append(
            [
                str(one.layers),
                one.variant,
                f"{one.validation:.3f}",
                "–" if math.isnan(one.spread) else f"{one.spread:.3f}",
                f"{one.lr:g}",
                f"{one.warmup:.0%}",
                str(sum(outcome.spikes for outcome in outcomes)),
                str(sum(outcome.bursts for outcome in outcomes)),
                f"{outcomes[0].parameters:,}",
                f"{outcomes[0].step_seconds:.2f}",
                str(one.tried),
                remark,
            ]
        )
    return Table(head, rows, frozenset(strong))


def cell_table(outcomes: Sequence[Outcome]) -> Table:
    """One row a cell, by depth, scheme and rate."""
    head = [
        "layers",
        "scheme",
        "lr",
        "warm-up",
        "seed",
        "final loss",
        "training loss",
        "status",
        "spikes",
        "bursts",
        "s / step",
        "time",
    ]
    order = sorted(
        outcomes,
        key=lambda one: (
            one.cell.layers,
            one.cell.variant.text,
            -one.cell.lr,
            one.cell.warmup,
            one.cell.seed,
        ),
    )
    rows = [
        [
            str(one.cell.layers),
            one.cell.variant.text,
            f"{one.cell.lr:g}",
            f"{one.cell.warmup:.0%}",
            str(one.cell.seed),
            _words(one.validation),
            _words(one.train),
            STATUS_WORDS[one.status],
            str(one.spikes),
            str(one.bursts),
            _words(one.step_seconds, 2),
            duration(one.seconds) if math.isfinite(one.seconds) else "–",
        ]
        for one in order
    ]
    return Table(head, rows)


def text(duel: Duel) -> str:
    """The best settings and the sentences for a terminal."""
    lines = [
        *_aligned(best_table(best_settings(duel.outcomes))),
        "",
        *statements(duel.outcomes, duel.unigram),
    ]
    if duel.transfer:
        found = transfer.optima(duel.outcomes)
        lines += ["", *_aligned(transfer.table(found)), "", *transfer.statements(found)]
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    cells = [list(table.head), *(list(row) for row in table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _words(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"
