"""`python -m benchmarks.startup`: from the start of a process to the end of the first step.

The model is deep. Time is taken by parts, each depth in a fresh process.
The parts are those of `fathom pretrain`, in its order and with its garbage collection,
on a small data set of the standard library's source text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import typer

from benchmarks.results import write_results

if TYPE_CHECKING:  # what the child imports is part of what is timed
    from model.config import ModelConfig
    from model.network.language_model import LanguageModel
    from parallel.engine.engine import Engine
    from parallel.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("imports", "processes", "data", "layers", "weights", "engine", "first step")
SEQ, BATCH = 32, 2
VOCABULARY, TEXT_BYTES = 512, 200_000


def parts(layers: int, hidden: int, data: Path) -> dict[str, dict[str, float]]:
    """Seconds of each part in this process, by the clock and of the processor.

    data: a prepared data set.
    """
    marks = [(0.0, 0.0)]
    begin = time.perf_counter(), time.process_time()

    def mark() -> None:
        marks.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))

    import torch

    torch.set_num_threads(1)
    from parallel.launch.startup import collector_at_rest, load_libraries

    load_libraries()
    import pretrain.train.build as build
    from model.layers.transformer_config import transformer_config
    from model.network.language_model import LanguageModel
    from parallel.launch.one_process import single_process
    from pretrain.config.schema import Corpus
    from pretrain.data.blend import open_blend
    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.steps import training_step

    mark()
    with collector_at_rest():
        topology = single_process()
        mark()
        blend = open_blend([Corpus(path=str(data))], "train", SEQ, 0, None)
        batches = [next_tokens(blend.batch(range(BATCH)))]
        mark()
        model = model_of(layers, hidden)
        config = transformer_config(model, dtype=torch.float32, on_cpu=True, **topology.core_fields())
        chunk = LanguageModel(model, config, seq_length=SEQ)
        mark()
        named = build.named_parameters(chunk, 0, 1)
        build.initialize_(((one.name, one.parameter, one.shard) for one in named), model, SEQ, 1)
        mark()
        engine = engine_of(chunk, topology)
    mark()
    engine.train_step(training_step(CAUSAL_LM), lambda: iter(batches), 1)
    mark()
    return {
        name: {"seconds": b[0] - a[0], "cpu": b[1] - a[1]}
        for name, (a, b) in zip(PARTS, pairwise(marks), strict=True)
    }


def model_of(layers: int, hidden: int) -> ModelConfig:
    """The model that is started."""
    from model.config import ModelConfig

    return ModelConfig(
        scheme="pre_ln",
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=SEQ,
    )


def engine_of(chunk: LanguageModel, topology: Topology) -> Engine:
    """The engine of a whole model."""
    import torch

    import pretrain.train.build as build
    from parallel.engine.engine import Engine, EngineOptions
    from pretrain.config.schema import OptimizerConfig

    optimizer = OptimizerConfig(lr=1e-3)
    return Engine(
        [chunk],
        topology,
        make_optimizer=lambda groups: build.adamw(optimizer, groups),
        options=EngineOptions(
            dtype=torch.float32,
            micro_batch_size=BATCH,
            seq_length=SEQ,
            clip=1.0,
            tied=True,
            decay_embeddings=False,
        ),
    )


def data_set(folder: Path) -> Path:
    """A small prepared data set."""
    from benchmarks.data import corpus
    from pretrain.data.prepare import PrepareOptions, prepare
    from pretrain.data.tokens.train import train_tokenizer

    text, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
    corpus(text, TEXT_BYTES)
    train_tokenizer([str(text)], tokenizer, vocab_size=VOCABULARY)
    prepare(PrepareOptions([str(text)], folder / "data", tokenizer, workers=1))
    return folder / "data"


class Report(TypedDict):
    """What was measured."""

    hidden: int
    depths: dict[str, dict[str, dict[str, float]]]
    """Seconds of the clock and of the processor, by depth and part."""


def measure(depths: list[int], hidden: int) -> Report:
    """Every depth in a process of its own."""
    found = {}
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="fathom-startup-") as name:
        data = str(data_set(Path(name)))
        for layers in depths:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.startup",
                "--child",
                str(layers),
                "--hidden",
                str(hidden),
                "--data",
                data,
            ]
            result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env=env)
            found[str(layers)] = json.loads(result.stdout.splitlines()[-1])
    return {"hidden": hidden, "depths": found}


def main(
    depths: str = typer.Option("24,192,1000", help="Layers."),
    hidden: int = typer.Option(64, help="Width."),
    child: int = typer.Option(0, hidden=True),
    data: Path = typer.Option(Path(), hidden=True),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print as a table.

    Times are seconds, and in brackets seconds of the processor,
    which other work on the machine prolongs less.
    """
    if child:
        print(json.dumps(parts(child, hidden, data)))
        return
    report = measure([int(depth) for depth in depths.split(",")], hidden)
    print("| layers | " + " | ".join(PARTS) + " | beyond imports |\n|" + "---|" * (len(PARTS) + 2))
    for layers, row in report["depths"].items():
        beyond = {unit: sum(row[part][unit] for part in PARTS[1:]) for unit in ("seconds", "cpu")}
        print(
            f"| {layers} | "
            + " | ".join(
                f"{one['seconds']:.2f} ({one['cpu']:.2f})" for one in [*(row[part] for part in PARTS), beyond]
            )
            + " |"
        )
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
