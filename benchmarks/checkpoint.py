"""`python -m benchmarks.checkpoint`: a deep model's checkpoint against plain PyTorch, as ratios.

The baseline is one torch.save and one torch.load of the same bytes.
Depth must not hurt: a thousand narrow layers are 12,000 parameters,
and neither saving nor loading may cost by the parameter.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import typer

from model.config import ModelConfig
from parallel.checkpoint.background import Saver
from parallel.checkpoint.folders import step_folder
from parallel.checkpoint.fragments import flat_state
from parallel.checkpoint.loader import load
from parallel.checkpoint.reader import open_checkpoint
from parallel.checkpoint.writer import prune, save
from parallel.engine.engine import Engine
from parallel.launch.one_process import single_process
from pretrain.config.schema import RunConfig
from pretrain.train.build import build_engine


def engine_of(layers: int, hidden: int) -> Engine:
    """A one-process engine whose moments are set as after a step."""
    config = RunConfig.model_validate(
        {
            "name": "bench",
            "model": ModelConfig(
                scheme="pre_ln",
                num_layers=layers,
                hidden_size=hidden,
                num_attention_heads=4,
                vocab_size=512,
                max_position_embeddings=64,
            ),
            "data": {"corpora": [{"path": "none"}], "seq_length": 64},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
        }
    )
    engine = build_engine(config, single_process())
    for group in range(len(engine.groups)):
        for kind, values in flat_state(engine, group, create=True).items():
            if kind != "master":
                values.uniform_()
    return engine


def measure(layers: int, hidden: int, rounds: int, folder: Path) -> dict[str, object]:
    """Seconds of saving and loading in each round, by turns with the baseline.

    stall: for how long an asynchronous save holds training up.
    folder: where to write; emptied by the caller.
    """
    engine = engine_of(layers, hidden)
    tensors = [
        {kind: value.clone() for kind, value in flat_state(engine, group).items()}
        for group in range(len(engine.groups))
    ]
    size = sum(value.numel() * 4 for group in tensors for value in group.values())
    files = 0
    seconds: dict[str, list[float]] = {
        "save": [],
        "stall": [],
        "torch.save": [],
        "load": [],
        "torch.load": [],
    }
    saver = Saver(folder / "background")
    for step in range(rounds + 1):
        took, files = one_round(engine, tensors, saver, folder, step)
        if step:  # the first round warms up
            for name, value in took.items():
                seconds[name].append(value)
    saver.close()
    return {
        "parameters": len(engine.parameters),
        "bytes": size,
        "files": files,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "save_ratio": median_ratio(seconds["save"], seconds["torch.save"]),
        "stall_ratio": median_ratio(seconds["stall"], seconds["save"]),
        "load_ratio": median_ratio(seconds["load"], seconds["torch.load"]),
    }


def one_round(
    engine: Engine, tensors: list[dict[str, torch.Tensor]], saver: Saver, folder: Path, step: int
) -> tuple[dict[str, float], int]:
    """(seconds by what was done, files of a checkpoint) of one round.

    tensors: what the baseline saves and loads.
    """
    checkpoints = folder / "checkpoints"
    begin = time.perf_counter()
    with (folder / "baseline.pt").open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    middle = time.perf_counter()
    save(engine, checkpoints, step, progress={"optimizer_step": 1}, config={}, versions={}, extra={})
    between = time.perf_counter()
    saver.save(
        engine, step, asynchronous=True, progress={"optimizer_step": 1}, config={}, versions={}, extra={}
    )
    copied = time.perf_counter()
    saver.wait()
    shutil.rmtree(saver.folder)
    saved = time.perf_counter()
    torch.load(folder / "baseline.pt", weights_only=True)
    baseline = time.perf_counter()
    load(engine, open_checkpoint(checkpoints))
    loaded = time.perf_counter()
    files = len(list((checkpoints / step_folder(step)).iterdir()))
    prune(checkpoints, keep_last=1, keep_every=0)
    took = {
        "torch.save": middle - begin,
        "save": between - middle,
        "torch.load": baseline - saved,
        "load": loaded - baseline,
        "stall": copied - between,
    }
    return took, files


def median_ratio(own: list[float], base: list[float]) -> float:
    """Median over the rounds of one time over another."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def main(
    layers: int = typer.Option(1000, min=1, help="Layers of the model."),
    hidden: int = typer.Option(64, min=4, help="Its width."),
    rounds: int = typer.Option(5, min=1, help="Counted rounds; medians are printed."),
) -> None:
    """Measure and print as JSON."""
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        print(json.dumps(measure(layers, hidden, rounds, Path(folder)), indent=1))


if __name__ == "__main__":
    typer.run(main)
