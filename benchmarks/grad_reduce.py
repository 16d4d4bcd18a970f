"""`python -m benchmarks.grad_reduce`: what gradients sent in bf16 do to the loss.

One model is trained on the docstrings of Python's library by four data-parallel processes, with
`parallel.grad_reduce` fp32 and bf16, from several seeds. The difference of the two formats stands
beside that of two seeds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
import yaml

from benchmarks.documents import MODEL, prepared
from benchmarks.results import write_results

SEQ, FORMS = 64, ("fp32", "bf16")


def validation_loss(data: Path, folder: Path, steps: int, form: str, seed: int) -> float:
    """Nats per token after a training of this form and seed."""
    from pretrain.rundir.metrics import read_metrics

    name = f"{form}-{seed}"
    config = {
        "name": name,
        "runs_dir": str(folder / "runs"),
        "model": MODEL | {"max_position_embeddings": SEQ},
        "data": {"corpora": [{"path": str(data)}], "seq_length": SEQ},
        "parallel": {"processes": 4, "zero": 2, "grad_reduce": form, "preflight": False},
        "optimizer": {"lr": 8e-3, "factors": {"embedding": {"rate": "sqrt(hidden)"}}},
        "schedule": {"warmup_steps": 40},
        "train": {
            "steps": steps,
            "global_batch_size": 16,
            "micro_batch_size": 4,
            "eval_samples": 512,
            "precision": "fp32",
            "seed": seed,
        },
        "log": {"signal_interval": 0, "progress": "none", "tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-W", "ignore", "-m", "tools.cli", "pretrain", str(path)], check=True)
    loss = read_metrics(folder / "runs" / name / "metrics.jsonl").eval[-1].loss
    typer.echo(f"{name}: {loss:.6f}", err=True)
    return loss


def main(
    steps: int = typer.Option(300, min=50, help="Steps of each run."),
    seeds: int = typer.Option(3, min=2, help="Runs of each format."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Train, print and write."""
    with tempfile.TemporaryDirectory(prefix="fathom-reduce-") as name:
        folder = Path(name)
        data = prepared(folder)
        losses = {
            form: [validation_loss(data, folder, steps, form, seed) for seed in range(1, seeds + 1)]
            for form in FORMS
        }
    wide, narrow = (losses[form] for form in FORMS)
    report = {
        "steps": steps,
        "validation_loss": losses,
        "bf16_minus_fp32": [b - a for a, b in zip(wide, narrow, strict=True)],
        "deviation_of_seeds": statistics.stdev(wide),
    }
    print(json.dumps(report, indent=1))
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
