"""`fathom pretrain`."""

from __future__ import annotations

import os
import sys

import typer

from tools.shipped import say_shipped


def command(
    config: str = typer.Argument(help="Configuration file, or the name of a shipped one."),
    overrides: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        help="Settings that replace the file's, e.g. optimizer.lr=1e-3 train.steps=100.",
    ),
    quiet: bool = typer.Option(
        False,
        "--quiet",
        "-q",
        help="No progress; the outcome is in the exit code and in the run's state.json.",
    ),
) -> None:
    """Train a model, or continue a run from its newest checkpoint.

    Starts one local process per GPU (or `parallel.processes`),
    unless torchrun, deepspeed or srun has started this one.
    Ctrl-C saves and stops, as does a file control/exit in the run's folder
    (control/save: save and go on); the same command continues.
    Exit codes: 0 finished, 2 a mistake in the configuration,
    75 and 76 saved and stopped, 77 not finite, 78 a step did not end,
    79 a node failed its check,
    80 another start has the run or its folder is gone, 1 an error.
    """
    # Waiting threads must not burn the cores that other ranks compute on.
    # Read when PyTorch is loaded, so it comes first.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pretrain.train.run import pretrain

    if not quiet:
        say_shipped(config)
    sys.exit(pretrain(config, [*(overrides or []), *(["log.progress=none"] if quiet else [])]))
