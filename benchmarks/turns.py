"""Taking turns: the way every benchmark here compares things on a noisy machine.

Only what happened in the same round may be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from rich.table import Table

KEPT = 5 << 29
"""Bytes; the activations of the largest shape that is measured."""


def turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every action in each of `rounds` counted rounds, after one that warms up.

    The order turns about, so that a slow moment of the machine does not always hit the same one.
    before: what is done before an action and not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in actions if turn % 2 else reversed(list(actions)):
            if before is not None:
                before[name]()
            begin = time.perf_counter()
            actions[name]()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def allocator(*, keeps: bool, large: int = 32 << 20) -> None:
    """The C library's memory allocator for what runs next.

    It is Fathom's setting, or glibc's own as it is once it has adapted itself to large tensors.
    Fathom's comes with as much freed memory as its earlier steps would have left.
    large: bytes from which glibc asks the system each time.
    """
    from parallel.launch import cpu

    if keeps:
        cpu.keep_freed_memory()
        torch.ones(KEPT // 4)
    else:
        cpu.mallopt({cpu.M_MMAP_MAX: 65536, cpu.M_MMAP_THRESHOLD: large, cpu.M_TRIM_THRESHOLD: 2 * large})


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; these lie within what was measured, however few rounds there were."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratio_table(title: str, what: str, rows: Mapping[str, Mapping[str, float]]) -> Table:
    """Median and quartiles of ratios, by name."""
    table = Table(title=title, title_justify="left")
    for column in ("", what, "quartiles"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in rows.items():
        table.add_row(name, f"{row['median']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}")
    return table
