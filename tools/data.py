"""`fathom data`: prepare data sets for training, and look into them."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pretrain.data.prepare import Progress

TEXT_KEY = "Key or column that holds the text; meta.text is the key text inside of meta."
app = typer.Typer(help="Data sets.", no_args_is_help=True)


class SplitBy(str, Enum):
    """What is assigned to a split as a whole."""

    document = "document"
    file = "file"


@app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Text files (one document each), .jsonl, .csv, .tsv or .parquet files, plain or compressed; "
            "folders; globs; or names for the datasets library: hf://NAME, NAME, NAME:CONFIG or "
            "NAME:CONFIG:SPLIT.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    tokenizer: Annotated[Path, typer.Option(help="SentencePiece model file.")],
    text_key: Annotated[str, typer.Option(help=TEXT_KEY)] = "text",
    split: Annotated[str, typer.Option(help="Shares of train, validation and test.")] = "0.98,0.01,0.01",
    split_by: Annotated[
        SplitBy, typer.Option(help="Assign single documents, or whole files, to a split.")
    ] = SplitBy.document,
    seed: Annotated[int, typer.Option(help="Seed of the assignment to splits.")] = 1234,
    workers: Annotated[
        int, typer.Option(help="Processes; 0: one for each core. The result does not depend on it.")
    ] = 0,
    streaming: Annotated[
        bool, typer.Option(help="Read a hub data set without downloading it whole.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Read this many records at most.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with an error at the first broken record.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a data set that is there already.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Tokenize text into a data set folder for training."""
    from model.errors import UserError
    from pretrain.data.prepare import PrepareOptions
    from pretrain.data.prepare import prepare as run

    try:
        shares = tuple(float(share) for share in split.split(","))
    except ValueError as error:
        raise UserError(
            f"--split {split}: give three numbers separated by commas, such as 0.98,0.01,0.01"
        ) from error
    options = PrepareOptions(
        inputs=inputs,
        out=out,
        tokenizer=tokenizer,
        text_key=text_key,
        split=shares,
        split_by=split_by.value,
        seed=seed,
        workers=workers,
        streaming=streaming,
        limit=limit,
        strict=strict,
        overwrite=overwrite,
    )
    if quiet:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    with _ProgressBar(visible=not (quiet or as_json)) as bar:
        manifest = run(options, bar.show)
    if as_json:
        typer.echo(json.dumps(manifest, indent=1, ensure_ascii=False))
    elif not quiet:
        _print_summary(out, manifest)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set folder.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 1,
    split: Annotated[
        str, typer.Option(help="Split to show documents of: train, validation or test.")
    ] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and documents as JSON.")] = False,
) -> None:
    """Show what a data set folder holds, and its first documents as text."""
    from rich.console import Console
    from rich.rule import Rule

    from pretrain.data.prepare import inspect_dataset

    manifest, texts = inspect_dataset(folder, split, documents)
    if as_json:
        typer.echo(json.dumps({"manifest": manifest, "documents": texts}, indent=1, ensure_ascii=False))
        return
    _print_summary(folder, manifest)
    console = Console()
    for number, text in enumerate(texts, start=1):
        console.print(Rule(f"{split} document {number}"))
        console.out(text, highlight=False)


class _ProgressBar:
    """A live line of documents, tokens and speed on standard error."""

    def __init__(self, visible: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.fields[documents]:,} documents"),
            TextColumn("{task.fields[tokens]:,} tokens"),
            BarColumn(),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not visible,
        )
        self._task = self._bar.add_task("", total=None, documents=0, tokens=0, speed=0.0)

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        elapsed = self._bar.tasks[0].elapsed or 0.0
        self._bar.update(
            self._task,
            total=progress.total,
            completed=progress.bytes,
            documents=progress.documents,
            tokens=progress.tokens,
            speed=progress.tokens / elapsed if elapsed else 0.0,
        )


def _print_summary(folder: Path, manifest: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pretrain.data.documents import Broken

    table = Table(
        "split",
        "documents",
        "tokens",
        "bytes of text",
        "bytes/token",
        title=str(folder),
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest["splits"].items():
        ratio = f"{split['bytes'] / split['tokens']:.2f}" if split["tokens"] else "-"
        table.add_row(name, f"{split['documents']:,}", f"{split['tokens']:,}", f"{split['bytes']:,}", ratio)
    console = Console()
    console.print(table)
    console.out(
        f"vocabulary {manifest['vocab_size']}, unigram entropy {manifest['unigram_entropy_nats']:.3f} nats/token, "
        f"token correlation {manifest['token_correlation']:.5f}, empty documents {manifest['empty_documents']}",
        highlight=False,
    )
    for share, (name, split) in zip(manifest["split"], manifest["splits"].items(), strict=True):
        if share and not split["documents"]:
            console.out(
                f"note: the {name} split is empty; give more documents or a larger share in --split",
                highlight=False,
            )
    left_out = manifest.get("left_out", [])
    if left_out:
        console.out(
            f"note: left out, as it only describes the data: {', '.join(left_out)}; name it to read it",
            highlight=False,
        )
    broken = manifest["broken"]
    if broken["count"]:
        console.out(
            f"left out {broken['count']} broken records, the first {len(broken['examples'])}:",
            highlight=False,
        )
        for example in broken["examples"]:
            console.out(f"  {Broken(**example).place}", highlight=False)
