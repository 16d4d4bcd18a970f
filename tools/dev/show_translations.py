"""Some held-out pairs and what a model makes of their sources.

`python -m tools.dev.show_translations RUN`.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from tools.dev import run


def main(
    folder: Path = typer.Argument(metavar="RUN", help="Run folder of a model that translates."),
    count: int = typer.Option(10, min=1, help="Pairs to show at most."),
    split: str = typer.Option("test", help="Split of the run's data set that they are taken from."),
) -> None:
    """Translate the first sources of a split by beam search, and show them with what was wanted."""
    from pretrain.trained.beam import Search
    from pretrain.trained.measures.pairs import held_out
    from pretrain.trained.open import BOTH, open_trained
    from pretrain.trained.translate import CheckpointTranslator, translate

    trained = open_trained(folder)
    trained.check_kind(BOTH)
    pairs = held_out(trained, split, count)
    sources = [source for source, _ in pairs]
    found = translate(CheckpointTranslator(trained), sources, Search(), names="pair")
    table = Table("source", "wanted", "translated")
    for (source, wanted), translations in zip(pairs, found, strict=True):
        table.add_row(source, wanted, translations[0].line if translations else "")
    Console(highlight=False, markup=False).print(table)


if __name__ == "__main__":
    run(main)
