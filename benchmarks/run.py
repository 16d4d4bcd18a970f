"""`make bench`: tokens per second of Fathom and its peers, as ratios with their spread.

They are taken in turns in one process.
These machines are noisy, so only ratios within one round count.
Every round lets each contestant take one step, and the ratio of a round is against the bare
loop's step of the same round.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.peers import (
    Contestant,
    Fathom,
    Shape,
    bare,
    bare_keeping,
    huggingface,
    huggingface_deepspeed,
    megatron_core,
)
from benchmarks.results import RESULTS, write_results
from benchmarks.turns import allocator, spread, turns
from model.depth.schemes import SCHEMES

SHAPES = {
    "24x256": Shape(24, 256, 4, 256, 4, 2, 8192),
    "192x128": Shape(192, 128, 4, 128, 4, 2, 8192),
    "1000x64": Shape(1000, 64, 4, 64, 4, 2, 4096),
}
SCHEME_SHAPE = Shape(48, 128, 4, 128, 4, 2, 2048)
"""Where the schemes are compared with pre_ln."""
MAKERS: dict[str, Callable[[Shape], Contestant]] = {
    "bare": bare,
    "bare-keeping": bare_keeping,
    "fathom": Fathom,
    "fathom-compiled": lambda shape: Fathom(shape, compiled=True),
    "megatron": megatron_core,
    "huggingface": huggingface,
    "huggingface-deepspeed": huggingface_deepspeed,
}
USUAL = ("bare", "fathom", "fathom-compiled", "megatron", "huggingface", "huggingface-deepspeed")
"""Contestants where none are named."""
SLOW_START = {"1000x64": "huggingface-deepspeed"}
"""Left out of them, by shape.

DeepSpeed compares every parameter with every other as it starts,
which takes longer at 1000 layers than all counted steps.
"""
SCHEME_MAKERS: dict[str, Callable[[Shape], Contestant]] = {
    f"scheme-{scheme}": functools.partial(Fathom, scheme=scheme) for scheme in SCHEMES
}


class Result(TypedDict):
    """What one contestant took."""

    label: str
    build_s: float
    seconds: list[float]
    """Of each counted round's step."""
    tokens_per_s: float
    ratios: list[float]
    """Step time of the first contestant over its own, round by round."""


def measure(shape: Shape, names: Sequence[str], rounds: int) -> dict[str, Result]:
    """Seconds per step of each contestant, by turns.

    The first round warms up and is not counted.
    """
    built: dict[str, tuple[Contestant, float]] = {}
    for name in names:
        begin = time.perf_counter()
        built[name] = (MAKERS | SCHEME_MAKERS)[name](shape), time.perf_counter() - begin
    tokens = shape.sample()
    actions = {name: functools.partial(contestant.step, tokens) for name, (contestant, _) in built.items()}
    seconds = turns(
        actions,
        rounds,
        {
            name: functools.partial(allocator, keeps=contestant.keeps_memory)
            for name, (contestant, _) in built.items()
        },
    )
    return {
        name: {
            "label": built[name][0].name,
            "build_s": built[name][1],
            "seconds": seconds[name],
            "tokens_per_s": shape.tokens / statistics.median(seconds[name]),
            "ratios": [base / own for base, own in zip(seconds[names[0]], seconds[name], strict=True)],
        }
        for name in names
    }


def table(shape: Shape, results: dict[str, Result]) -> Table:
    """Medians and quartiles of the ratios to the first contestant.

    Beside them stands the ratio of the quickest steps.
    What disturbs a step only makes it slower.
    """
    out = Table(
        title=(
            f"{shape.layers} layers x {shape.hidden}, sequence {shape.seq}, "
            f"{shape.accumulation} x {shape.batch} samples a step"
        )
    )
    for column in ("contestant", "tokens/s", "ratio to first", "quartiles", "of best steps", "build"):
        out.add_column(column, justify="left" if column == "contestant" else "right")
    best = min(next(iter(results.values()))["seconds"])
    for row in results.values():
        ratio = spread(row["ratios"])
        numbers = (
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f} - {ratio['high']:.3f}",
            f"{best / min(row['seconds']):.3f}",
        )
        out.add_row(row["label"], f"{row['tokens_per_s']:,.0f}", *numbers, f"{row['build_s']:.1f} s")
    return out


def main(
    shapes: str = typer.Option(",".join(SHAPES), help="Shapes to measure, by name."),
    contestants: str = typer.Option(
        "", help=f"Contestants of {', '.join(MAKERS)}; the first one is what the others are compared with."
    ),
    rounds: int = typer.Option(5, min=2, help="Counted rounds."),
    schemes: bool = typer.Option(True, help="Compare every scheme with pre_ln."),
    threads: int = typer.Option(1, min=1, help="Threads of every contestant."),
    out: Path = typer.Option(RESULTS, help="Folder for the JSON."),
) -> None:
    """Measure and print."""
    from parallel.launch.one_process import single_process

    torch.set_num_threads(threads)
    single_process()
    torch.set_num_threads(threads)
    console = Console(width=110)
    measured: dict[str, dict[str, Result]] = {}
    report: dict[str, object] = {"threads": threads, "shapes": measured}
    for name in filter(None, shapes.split(",")):
        if name not in SHAPES:
            sys.exit(f"benchmark: unknown shape {name}; known: {', '.join(SHAPES)}")
        if not contestants and name in SLOW_START:
            console.print(
                f"{name}: without {SLOW_START[name]}, which takes minutes to start (--contestants names it)"
            )
        usual = [one for one in USUAL if one != SLOW_START.get(name)]
        results = measure(SHAPES[name], contestants.split(",") if contestants else usual, rounds)
        console.print(table(SHAPES[name], results))
        measured[name] = results
    if schemes:
        order = sorted(SCHEME_MAKERS, key=lambda name: name != "scheme-pre_ln")
        report["schemes"] = results = measure(SCHEME_SHAPE, order, rounds)
        console.print(table(SCHEME_SHAPE, results))
    path = out / f"cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    write_results(path, report)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
