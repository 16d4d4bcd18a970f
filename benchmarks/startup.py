"""`python -m benchmarks.startup`: from the start of a process to the first step of a deep model, by parts, each depth in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import typer

from benchmarks.results import write_results

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("imports", "processes", "layers", "weights", "engine", "first step")


def parts(layers: int, hidden: int) -> dict[str, dict[str, float]]:
    """Seconds of each part in this process, by the clock and of the processor."""
    marks = [(0.0, 0.0)]
    begin = time.perf_counter(), time.process_time()

    def mark() -> None:
        marks.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))

    import torch

    torch.set_num_threads(1)
    import deepspeed  # noqa: F401

    import pretrain.build as build
    from model.config import ModelConfig
    from model.gpt import GPT, transformer_config
    from parallel.engine import Engine
    from parallel.single import single_process
    from pretrain.config import OptimizerConfig
    from pretrain.loop import forward_step

    mark()
    topology = single_process()
    mark()
    model = ModelConfig(scheme="pre_ln", num_layers=layers, hidden_size=hidden, num_attention_heads=4, vocab_size=512, max_position_embeddings=32)
    chunk = GPT(model, transformer_config(model, **topology.core_fields()), seq_length=32)
    mark()
    named = build.named_parameters(chunk, 0, 1)
    build.initialize_(((one.name, one.parameter, one.shard) for one in named), model, 32, 1)
    mark()
    optimizer = OptimizerConfig(lr=1e-3)
    engine = Engine(
        [chunk],
        topology,
        make_optimizer=lambda groups: build.adamw(optimizer, groups),
        dtype=torch.float32,
        micro_batch_size=2,
        seq_length=32,
        clip=1.0,
        tied=True,
        decay_embeddings=False,
    )
    mark()
    engine.train_step(forward_step, lambda: iter([torch.randint(0, 512, (2, 33))]), 1)
    mark()
    return {name: {"seconds": b[0] - a[0], "cpu": b[1] - a[1]} for name, a, b in zip(PARTS, marks, marks[1:], strict=True)}


def measure(depths: list[int], hidden: int) -> dict[str, Any]:
    """Every depth in a process of its own."""
    found = {}
    for layers in depths:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.startup", "--child", str(layers), "--hidden", str(hidden)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found[str(layers)] = json.loads(result.stdout.splitlines()[-1])
    return {"hidden": hidden, "depths": found}


def main(
    depths: str = typer.Option("250,1000", help="Layers."),
    hidden: int = typer.Option(64, help="Width."),
    child: int = typer.Option(0, hidden=True),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print as a table."""
    if child:
        print(json.dumps(parts(child, hidden)))
        return
    report = measure([int(depth) for depth in depths.split(",")], hidden)
    print("| layers | " + " | ".join(PARTS) + " | without imports |\n|" + "---|" * (len(PARTS) + 2))
    for layers, row in report["depths"].items():
        beyond = sum(row[part]["seconds"] for part in PARTS[1:])
        print(f"| {layers} | " + " | ".join(f"{row[part]['seconds']:.2f} s ({row[part]['cpu']:.2f} CPU)" for part in PARTS) + f" | {beyond:.2f} s |")
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
