"""`fathom depth-use`: does a trained model use its layers?"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from model.errors import UserError
from model.files import atomic_write_text, check_outputs
from model.words import printable
from tools.measured_on import STDOUT, BatchSize, Data, Split, SplitName, Text, TextKey


def command(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders, checkpoints folders or step folders; several are drawn into one picture.",
        ),
    ],
    data: Data = None,
    split: Split = None,
    text: Text = None,
    text_key: TextKey = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Windows to measure on, from the first on; default: 32, or all of fewer."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Layers from one that is skipped alone to the next; default: so that about 100 are.",
        ),
    ] = None,
    batch_size: BatchSize = None,
    precision: Annotated[
        str,
        typer.Option(help="fp32, bf16 or auto. In fp32, small changes of the loss are no rounding."),
    ] = "fp32",
    json_: Annotated[
        Path,
        typer.Option("--json", help="File for all numbers; - prints them as JSON, and nothing else."),
    ] = Path("depth_use.json"),
    plot: Annotated[Path, typer.Option(help="File for the picture (.png, .svg, .pdf).")] = Path(
        "depth_use.png"
    ),
) -> None:
    """Measure what each layer of a trained model is worth.

    Runs on one process, and on a GPU if there is one.
    The loss with layers skipped, one at a time and in eight blocks; what each layer adds to the
    stream; and how the prediction changes with the depth.
    Says in one line a model where its depth is used.
    Without --data and --text on the validation split of the run.
    """
    # Megatron-core's remarks on packages that this does not need.
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from pretrain.depth_use.report import check_picture, json_text, write_picture
    from pretrain.depth_use.runs import measure_runs, open_runs
    from pretrain.depth_use.verdict import facts, table, verdict
    from pretrain.trained.measures.windows import Asked

    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"--precision {printable(precision, 60)} is not known: choose auto, fp32 or bf16")
    if split is not None and text:
        raise UserError(f"--split {split.value} has no effect with --text: remove one of them")
    check_picture(plot)
    check_outputs({"--json": None if json_ == STDOUT else json_, "--plot": plot})
    asked = Asked(
        data, (split or SplitName.VALIDATION).value, text or (), text_key, samples, batch_size=batch_size
    )
    opened = open_runs(runs, asked, every)
    live = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        print(f"\r{done}/{total} skips", end="\n" if done == total else "", file=sys.stderr)

    found = []
    for use in measure_runs(
        opened, precision, say=lambda line: typer.echo(line, err=True), progress=progress if live else None
    ):
        if json_ != STDOUT:
            typer.echo(f"{facts(use)}\n{table(use)}\n{verdict(use)}\n")
        found.append(use)
    # Numbers before the picture, which may fail.
    if json_ == STDOUT:
        typer.echo(json_text(found), nl=False)
        write_picture(found, plot)
        return
    atomic_write_text(json_, json_text(found))
    write_picture(found, plot)
    typer.echo(f"json: {json_}\nplot: {plot}")
