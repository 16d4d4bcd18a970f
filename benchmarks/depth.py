"""`python -m benchmarks.depth`: what a layer costs in a model of 1000 layers, over one of 24.

Both models have the same width.
Measured are the optimizer step, a step with every layer's signals watched, and a checkpoint.
A layer's cost is the slope between a model of 4 layers and the model in question,
so that embedding, output and fixed costs do not count.
Memory is the slope of the resident peak of a step.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch
import typer
from rich.console import Console

from benchmarks.checkpoint import engine_of
from benchmarks.memory import resident
from benchmarks.results import write_results
from benchmarks.turns import ratio_table, spread, turns
from parallel.engine.engine import Engine

BASE = 4
SEQ, BATCH = 64, 2


def actions_of(engine: Engine, repeats: int, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed on one model.

    repeats: times of each action, so that shallow models take long enough to be timed.
    """
    from model.layers.layer import DepthLayer
    from parallel.checkpoint.writer import prune, save
    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.callbacks.signal.hooks import LayerHooks
    from pretrain.train.steps import training_step

    batches = [next_tokens(torch.randint(0, 500, (BATCH, SEQ + 1)))]
    layers = [module for module in engine.chunks[0].modules() if isinstance(module, DepthLayer)]
    saved = [0]

    def step() -> None:
        engine.train_step(training_step(CAUSAL_LM), lambda: iter(batches), 1)

    def watched() -> None:
        hooks = LayerHooks()
        for layer in layers:
            hooks.watch(layer, late=True)
        step()
        hooks.remove()

    def checkpoint() -> None:
        saved[0] += 1
        save(engine, folder, saved[0], progress={"optimizer_step": 1}, config={}, versions={}, extra={})
        prune(folder, keep_last=1, keep_every=0)

    def repeated(action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(repeats):
                action()

        return run

    return {"step": repeated(step), "monitored step": repeated(watched), "checkpoint": repeated(checkpoint)}


def peak(action: Callable[[], object]) -> float:
    """Resident bytes at the peak of an action."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return float(resident("VmHWM"))


class Report(TypedDict):
    """What was measured."""

    shallow: int
    deep: int
    hidden: int
    ratios: dict[str, dict[str, float]]
    memory_bytes: dict[int, float]
    """By depth."""
    memory_ratio: float
    seconds: dict[str, list[float]]


def measure(shallow: int, deep: int, hidden: int, rounds: int) -> Report:
    """Ratios of the cost per layer, deep over shallow, by what is measured."""
    depths = {BASE: max(1, deep // 50), shallow: max(1, deep // (4 * shallow)), deep: 1}
    with tempfile.TemporaryDirectory(prefix="fathom-depth-") as name:
        memory: dict[int, float] = {}
        everything: dict[str, Callable[[], object]] = {}
        # What the first engine and step of a process load and keep is none of a layer's.
        actions_of(engine_of(BASE, hidden), 1, Path(name) / "first")["step"]()
        # Memory by what each model adds to the process: built and stepped one after another,
        # none is freed.
        for depth, repeats in depths.items():
            gc.collect()
            before = resident("VmRSS")
            actions = actions_of(engine_of(depth, hidden), repeats, Path(name) / str(depth))
            memory[depth] = peak(actions["step"]) - before
            everything |= {f"{what} {depth}": action for what, action in actions.items()}
        seconds = turns(everything, rounds)

    def slope(what: str, depth: int, turn: int) -> float:
        own, base = (
            seconds[f"{what} {depth}"][turn] / depths[depth],
            seconds[f"{what} {BASE}"][turn] / depths[BASE],
        )
        return (own - base) / (depth - BASE)

    ratios = {
        what: spread([slope(what, deep, t) / slope(what, shallow, t) for t in range(rounds)])
        for what in ("step", "monitored step", "checkpoint")
    }
    memory_ratio = (
        (memory[deep] - memory[BASE])
        / (deep - BASE)
        / max(1.0, (memory[shallow] - memory[BASE]) / (shallow - BASE))
    )
    return {
        "shallow": shallow,
        "deep": deep,
        "hidden": hidden,
        "ratios": ratios,
        "memory_bytes": memory,
        "memory_ratio": memory_ratio,
        "seconds": seconds,
    }


def main(
    shallow: int = typer.Option(24, min=BASE + 1, help="Layers of the shallow model."),
    deep: int = typer.Option(1000, min=BASE + 2, help="Layers of the deep one."),
    hidden: int = typer.Option(64, min=4, help="Width of both."),
    rounds: int = typer.Option(4, min=2, help="Counted rounds."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print."""
    from parallel.launch.one_process import single_process

    torch.set_num_threads(1)
    single_process()
    report = measure(shallow, deep, hidden, rounds)
    Console().print(
        ratio_table(
            f"Cost per layer, {deep} layers over {shallow}, width {hidden}", "ratio", report["ratios"]
        )
    )
    print(f"memory per layer {report['memory_ratio']:.3f}")
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
