"""Options of commands that measure a trained model: which tokens, how many at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

STDOUT = Path("-")
"""Of an option for a file: print what it would hold, and nothing else."""


class SplitName(str, Enum):
    """`--split`."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


Data = Annotated[
    Path | None,
    typer.Option(help="Data set folder written by `fathom data prepare`; default: the data of the run."),
]
Split = Annotated[SplitName | None, typer.Option(help="Split of the data set; default: validation.")]
Text = Annotated[
    list[str] | None,
    typer.Option(help="Text file, folder or pattern instead of a data set; may be given several times."),
]
TextKey = Annotated[
    str | None, typer.Option(help="Key or column of the text in records of --text; default: text.")
]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Windows at once; default: the run's micro batch.")
]
