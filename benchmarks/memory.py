"""`python -m benchmarks.memory`: what `fathom plan` predicts against what two processes take.

The processes are real ones, in fp32 on a CPU.
Each measurement starts fresh processes and runs three optimizer steps under data parallelism
and ZeRO-1. It compares the growth of the resident memory from before the build to its peak
with the sum of the parts.
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
from typing import TYPE_CHECKING, TypedDict

import typer
from typing_extensions import NotRequired

from benchmarks.turns import allocator
from model.loss_kernels import LossKernelName

if TYPE_CHECKING:  # each process loads it itself, when its memory is looked at
    from pretrain.config.schema import RunConfig

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2


class Case(TypedDict):
    """A model and its batches."""

    model: dict[str, int]
    seq: int
    micro: int
    loss_chunk: int | None
    loss_kernel: NotRequired[LossKernelName]


class Report(TypedDict):
    """Bytes of one case."""

    case: str
    measured: int
    built: int
    predicted: dict[str, float]
    error: float
    """Of the prediction, as a share of what was measured."""


WORDS: Case = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 131072},
    "seq": 1024,
    "micro": 1,
    "loss_chunk": None,
}
CASES: dict[str, Case] = {
    "24x256": {
        "loss_chunk": None,
        "model": {"num_layers": 24, "hidden_size": 256, "num_attention_heads": 4, "vocab_size": 8192},
        "seq": 256,
        "micro": 2,
    },
    "100x128": {
        "loss_chunk": None,
        "model": {"num_layers": 100, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 4096},
        "seq": 128,
        "micro": 4,
    },
    "8x512": {
        "loss_chunk": None,
        "model": {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 16384},
        "seq": 128,
        "micro": 2,
    },
    "4x64, vocabulary of 131072": WORDS,
    "4x64, vocabulary of 131072, loss_chunk 64": {**WORDS, "loss_chunk": 64},
    "4x64, vocabulary of 131072, losses by torch": {**WORDS, "loss_chunk": 64, "loss_kernel": "torch"},
}


def resident(key: str) -> int:
    """VmRSS or VmHWM (the peak) of this process in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(key))) * 1024


def rank_main(case: Case, rank: int, port: int, out: Path) -> None:
    """One process: build, three steps, growth of the resident memory."""
    import torch

    torch.set_num_threads(1)
    from parallel.launch.process_group import init_process_group, open_store
    from parallel.launch.ranks import RankInfo
    from parallel.topology import Topology
    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.build import build_engine
    from pretrain.train.checks.feasibility import fit_processes
    from pretrain.train.steps import training_step

    config = run_config(case)
    layout = fit_processes(config, WORLD)
    info = RankInfo(rank, WORLD, rank, "127.0.0.1", port, local_world_size=WORLD)
    init_process_group(info, 10, open_store(info, 10, secret=str(out.parent)))
    topology = Topology(layout)
    allocator(keeps=False, large=1 << 16)  # freed memory goes back, so that what is resident is in use
    warm_up()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    engine = build_engine(config, topology)
    engine.set_lr(1e-4)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak starts anew: the build's own, for a moment larger, is none of the plan's
    built = resident("VmRSS")
    vocab = config.model.vocab_size or 0
    for _ in range(3):
        engine.train_step(
            training_step(CAUSAL_LM),
            lambda: iter(
                [next_tokens(torch.randint(0, vocab, (case["micro"], case["seq"] + 1))) for _ in range(2)]
            ),
            2,
        )
    out.write_text(json.dumps({"growth": resident("VmHWM") - before, "built": built - before}))


def warm_up() -> None:
    """Loads what first use would load: the libraries' own memory is not the model's."""
    import deepspeed  # noqa: F401
    import megatron.core.models.gpt  # noqa: F401
    import torch

    layer = torch.nn.Linear(64, 64)
    layer(torch.randn(64, 64)).sum().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def run_config(case: Case) -> RunConfig:
    """The configuration of a case."""
    from pretrain.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "name": "memory",
            "model": {"scheme": "pre_ln", "max_position_embeddings": case["seq"]} | case["model"],
            "data": {"corpora": [{"path": "none"}], "seq_length": case["seq"]},
            "optimizer": {"lr": 1e-3},
            "train": {
                "steps": 1,
                "global_batch_size": 2 * WORLD * case["micro"],
                "micro_batch_size": case["micro"],
                "precision": "fp32",
                "loss_chunk": case["loss_chunk"],
                "loss_kernel": case.get("loss_kernel", "local"),
            },
        }
    )


def predicted(case: Case) -> dict[str, float]:
    """The plan's parts in bytes, and their sum."""
    from dataclasses import asdict

    from model.cost.activations import Activations
    from parallel.topology import check_layout
    from pretrain.plan.memory import peak_memory

    config = run_config(case)
    memory = peak_memory(
        config.model,
        check_layout(config.parallel, config.model, WORLD),
        Activations(
            config.model,
            case["micro"],
            case["seq"],
            loss_chunk=case["loss_chunk"],
            loss_kernel=config.train.loss_kernel,
        ),
        2,
    )
    return asdict(memory) | {"total": memory.total}


def measure(name: str) -> Report:
    """Largest growth of the processes of one case, and the prediction."""
    from parallel.launch.local import reserve_port

    with tempfile.TemporaryDirectory(prefix="fathom-memory-") as folder, reserve_port() as holder:
        port, outs = holder.getsockname()[1], [Path(folder) / f"{rank}.json" for rank in range(WORLD)]
        # One arena: freed memory of one thread is then there for the others, as it is on a GPU.
        quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "benchmarks.memory",
            "--case",
            name,
            "--port",
            str(port),
        ]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank), "--out", str(out)], cwd=ROOT, env=quiet)
            for rank, out in enumerate(outs)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise RuntimeError(f"{name}: a process ended with {max(codes)}")
        found = [json.loads(out.read_text()) for out in outs]
    plan, growth = predicted(CASES[name]), max(one["growth"] for one in found)
    return {
        "case": name,
        "measured": growth,
        "built": max(one["built"] for one in found),
        "predicted": plan,
        "error": plan["total"] / growth - 1,
    }


def main(
    case: str = typer.Option("", help="One case; default: all."),
    rank: int = typer.Option(-1, hidden=True),
    port: int = typer.Option(0, hidden=True),
    out: Path = typer.Option(Path(), hidden=True),
) -> None:
    """Measure and print as a table."""
    if rank >= 0:
        rank_main(CASES[case], rank, port, out)
        return
    print(
        "| layers x width | parameters' part, MiB | activations | buffers | predicted | measured | error |\n"
        "|---|---|---|---|---|---|---|"
    )
    for name in [case] if case else CASES:
        row = measure(name)
        parts = {key: value / 2**20 for key, value in row["predicted"].items()}
        fixed = parts["weights"] + parts["gradients"] + parts["optimizer"]
        measured = row["measured"] / 2**20
        print(
            f"| {name} | {fixed:.0f} | {parts['activations']:.0f} | {parts['buffers']:.0f} "
            f"| {parts['total']:.0f} | {measured:.0f} | {row['error']:+.1%} |"
        )


if __name__ == "__main__":
    typer.run(main)
