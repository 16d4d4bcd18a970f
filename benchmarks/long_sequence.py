"""`python -m benchmarks.long_sequence`: memory of each process where one long sequence is cut.

The processes are real ones, in fp32 on a CPU. The same model takes one step on the same sequence,
whole on one process and cut over more; loss and gradient norm are printed beside the memory.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from benchmarks.memory import resident, warm_up
from benchmarks.turns import allocator

if TYPE_CHECKING:  # each process loads it itself, when its memory is looked at
    from pretrain.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 512


def run_config(length: int, ranks: int) -> RunConfig:
    """A decoder of two narrow layers over one sequence of this length, cut over `ranks`."""
    from pretrain.config.schema import RunConfig

    model = {
        "scheme": "pre_ln",
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 1,
        "position": "rotary",
        "vocab_size": VOCAB,
    }
    return RunConfig.model_validate(
        {
            "name": "long",
            "model": model,
            "data": {"corpora": [{"path": "none"}], "seq_length": length},
            "parallel": {"context": ranks},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
        }
    )


def rank_main(length: int, ranks: int, rank: int, port: int, out: Path) -> None:
    """One process: build, one step, growth of the resident memory."""
    import torch

    torch.set_num_threads(1)
    from parallel.launch.process_group import init_process_group, open_store
    from parallel.launch.ranks import RankInfo
    from parallel.topology import Topology
    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.build import build_engine
    from pretrain.train.checks.feasibility import fit_processes
    from pretrain.train.steps import own_tokens, training_step

    config = run_config(length, ranks)
    info = RankInfo(rank, ranks, rank, "127.0.0.1", port, local_world_size=ranks)
    init_process_group(info, 10, open_store(info, 10, secret=str(out.parent)))
    topology = Topology(fit_processes(config, ranks))
    allocator(keeps=False, large=1 << 16)  # freed memory goes back, so that what is resident is in use
    warm_up()
    engine = build_engine(config, topology)
    engine.set_lr(1e-3)
    tokens = torch.randint(0, VOCAB, (1, length + 1), generator=torch.Generator().manual_seed(0))
    batch = own_tokens(next_tokens(tokens), topology)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step = engine.train_step(training_step(CAUSAL_LM), lambda: iter([batch]), 1)
    found = {"growth": resident("VmHWM") - before, "loss": step.loss, "norm": step.grad_norm}
    out.write_text(json.dumps(found))


def predicted(length: int, ranks: int) -> float:
    """The plan's activations and buffers of a process, in bytes."""
    from model.cost.activations import Activations
    from parallel.topology import check_layout
    from pretrain.plan.memory import peak_memory

    config = run_config(length, ranks)
    layout = check_layout(config.parallel, config.model, ranks)
    memory = peak_memory(config.model, layout, Activations(config.model, 1, length, context=ranks), 1)
    return memory.activations + memory.buffers


def measure(length: int, ranks: int) -> list[dict[str, float]]:
    """What every process found."""
    from parallel.launch.local import reserve_port

    with tempfile.TemporaryDirectory(prefix="fathom-long-") as folder, reserve_port() as holder:
        port, outs = str(holder.getsockname()[1]), [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.long_sequence", "--port", port]
        command += ["--length", str(length), "--ranks", str(ranks)]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank), "--out", str(out)], cwd=ROOT, env=quiet)
            for rank, out in enumerate(outs)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"{ranks} processes: one ended with {max(codes)}")
        return [json.loads(out.read_text()) for out in outs]


def main(
    length: int = typer.Option(32768, help="Tokens of the sequence."),
    ranks: int = typer.Option(4, help="Context-parallel processes, beside one alone."),
    rank: int = typer.Option(-1, hidden=True),
    port: int = typer.Option(0, hidden=True),
    out: Path = typer.Option(Path(), hidden=True),
) -> None:
    """Measure and print as a table."""
    if rank >= 0:
        rank_main(length, ranks, rank, port, out)
        return
    print(
        "| context | processes | MiB a process, least and most | planned | loss | gradient norm |\n"
        "|---|---|---|---|---|---|"
    )
    for count in (1, ranks):
        found = measure(length, count)
        low, high = (pick(one["growth"] for one in found) / 2**20 for pick in (min, max))
        print(
            f"| {count} | {count} | {low:.0f}, {high:.0f} | {predicted(length, count) / 2**20:.0f} "
            f"| {found[0]['loss']:.7f} | {found[0]['norm']:.7f} |",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
