"""A line about a configuration that is not the user's own."""

from __future__ import annotations

import os

import typer


def say_shipped(config: str) -> None:
    """Says on standard error which shipped file a name stands for.

    Nothing for a file of the user's, and on ranks above 0.
    """
    from parallel.launch.ranks import rank_from_environment
    from pretrain.config.compose import shipped, shown

    if (file := shipped(config)) is None:
        return
    info = rank_from_environment(os.environ)
    if info is None or info.rank == 0:
        typer.echo(f"note: {shown(file)} is the shipped configuration of this name", err=True)
