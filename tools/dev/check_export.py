"""Checks an export in a process of its own.

`python -m tools.dev.check_export RUN [--exported RUN/hf]`.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from tools.dev import run


def main(
    folder: Path = typer.Argument(metavar="RUN", help="Run folder."),
    exported: Path = typer.Option(None, help="Exported model; default: `hf` in the run folder."),
    prompt: str = typer.Option(
        None, help="Text to continue, or of an encoder with places to fill, written as its mask token."
    ),
) -> None:
    """Load with transformers, compare loss and logits with the run's, print a sample.

    Exit code 1 where the losses differ by more than 0.2 %.
    Code in the folder is run only where it is this version's own.
    """
    from pretrain.trained.folders.verify_export import verify_export

    place = exported or folder / "hf"
    result = verify_export(folder, place, prompt)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"loaded {place} as {result.model_class}")
    console.print(
        f"validation loss on {result.samples} samples: trainer {result.trained_loss:.5f}, "
        f"transformers {result.exported_loss:.5f} "
        f"({abs(result.exported_loss / result.trained_loss - 1):.1e} apart)"
    )
    console.print(
        f"largest logit difference from ours: {result.logit_difference:.1e} of a standard deviation"
    )
    for line in result.shown:
        console.print(line, markup=False)
    if not result.agrees:
        console.print("[red]the losses differ by more than 0.2 %[/red]")
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
