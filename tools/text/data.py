"""`fathom data`: prepare data sets for training, and look into them."""

from __future__ import annotations

import json
import os
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tools.measured_on import SplitName
from tools.text.summary import print_summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pretrain.data.manifest import Manifest
    from pretrain.data.prepare import CommonOptions, PrepareOptions, PrepareProgress
    from pretrain.data.prepare_pairs import PairOptions
    from pretrain.data.speech.prepare import SpeechOptions

TEXT_KEY = "Key or column that holds the text; meta.text is the key text inside of meta."
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters of a document that a terminal would obey."""
app = typer.Typer(help="Data sets of texts, pairs of texts, images or recordings.", no_args_is_help=True)


class Normalise(str, Enum):
    """Over which frames filters are normalised."""

    utterance = "utterance"
    train = "global"


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
            "NAME:CONFIG:SPLIT. With --pairs also files X.SOURCE beside X.TARGET, .po and .mo files. "
            "With --images folders of images in one sub-folder for each class, folders that the datasets "
            "library saved, .parquet files and names, with columns of images and classes.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Data set folder to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="SentencePiece model, Hugging Face tokenizer.json, a folder with either, or hf://NAME of "
            "the Hub; texts and pairs need one."
        ),
    ] = None,
    text_key: Annotated[str, typer.Option(help=TEXT_KEY)] = "text",
    split: Annotated[
        str | None,
        typer.Option(
            help="Shares of train, validation and test; 0.98,0.01,0.01 if not given, without those of "
            "--validation and --test.",
            show_default=False,
        ),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE,TARGET",
            help="Prepare pairs for translation: two keys or columns (or their numbers, 1,2, in tables "
            "without a header), and the suffixes of parallel text files.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=2, max=10**9, help="With --pairs or --speech, leave out longer texts; 250 if not given."
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="ROWSxCOLUMNS",
            help="Prepare images for classification, scaled to cover this size, of which the middle is kept; "
            "one number for squares.",
        ),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(help="With --images, 1 for grey, 3 for colours, 4 with alpha; 3 if not given."),
    ] = None,
    speech: Annotated[
        str | None,
        typer.Option(
            metavar="AUDIO,TEXT",
            help="Prepare recordings with what is said, or its translation: two keys or columns of INPUT, "
            "the path of a WAV or FLAC file beside it and the text.",
        ),
    ] = None,
    filters: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="With --speech, filters of a frame; 80 if not given."),
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0.1, max=1e4, help="With --speech, leave out longer clips; 30 if not given."),
    ] = None,
    normalise: Annotated[
        Normalise | None,
        typer.Option(
            help="With --speech, over which frames each filter gets mean 0 and variance 1: those of the "
            "utterance, as if not given, or of all of train."
        ),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT",
            help="With --pairs or --speech: what the validation split is, and all it is; may be given "
            "several times.",
        ),
    ] = None,
    test: Annotated[
        list[str] | None,
        typer.Option(
            metavar="INPUT",
            help="With --pairs or --speech: the same of the test split. Pairs elsewhere with a source of "
            "either are left out.",
        ),
    ] = None,
    split_by: Annotated[
        SplitBy,
        typer.Option(help="Assign single documents, or whole files, to a split."),
    ] = SplitBy.document,
    begin_mark: Annotated[
        bool | None,
        typer.Option(
            "--begin-mark/--no-begin-mark",
            help="Begin every document with the tokenizer's cls token; "
            "without a choice, where the tokenizer has a mask token.",
        ),
    ] = None,
    special_in_text: Annotated[
        bool,
        typer.Option(
            "--special-in-text",
            help="Names of special tokens in the texts, such as <|endoftext|>, stand for those tokens; "
            "without it they are text like any other.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the assignment to splits.")] = 1234,
    workers: Annotated[
        int,
        typer.Option(
            min=0, max=1024, help="Processes; 0: one for each core. The result does not depend on it."
        ),
    ] = 0,
    streaming: Annotated[
        bool,
        typer.Option(help="Read a hub data set without downloading it whole."),
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, max=10**18, help="Read this many records at most.")
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="End with an error at the first broken record."),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace a data set that is there already."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make a data set folder for training of text, of pairs of texts, of images, or of speech."""
    from pretrain.data.images.prepare import ImageOptions
    from pretrain.data.prepare import CommonOptions

    common = CommonOptions(
        inputs=inputs,
        out=out,
        tokenizer=tokenizer or "",
        split=_shares(split, validation, test),
        split_by=split_by.value,
        seed=seed,
        workers=workers,
        streaming=streaming,
        limit=limit,
        strict=strict,
        overwrite=overwrite,
        marked=special_in_text,
    )
    held = {"validation": tuple(validation or ()), "test": tuple(test or ())}
    of_pairs = {"max_tokens": max_tokens, **held}
    of_speech = {"filters": filters, "max_seconds": max_seconds, "normalise": normalise and normalise.value}
    if speech is None:
        shown = {f"--{name.replace('_', '-')} {value}": value for name, value in of_speech.items()}
        _refuse(shown, "without --speech")
    if images is None:
        _refuse({f"--channels {channels}": channels is not None}, "without --images")
    if images is None and not tokenizer:
        _missing_tokenizer()
    options: CommonOptions
    if speech is not None:
        _refuse({f"--pairs {pairs}": pairs, f"--images {images}": images}, "with --speech")
        chosen = {name: value for name, value in {**of_pairs, **of_speech}.items() if value}
        options = _of_speech(common, speech, chosen, text_key, begin_mark)
    elif images is None:
        options = _options(common, pairs, of_pairs, text_key, begin_mark)
    else:
        useless: dict[str, object] = {
            f"--{name.replace('_', '-')}": value for name, value in of_pairs.items()
        }
        useless |= {f"--pairs {pairs}": pairs, "--begin-mark": begin_mark is not None}
        _refuse({**useless, **_of_texts(common, text_key, tokenizer)}, "with --images")
        options = ImageOptions(**_given(common), size=_size(images), channels=channels or 3)
    manifest = _prepared(options, quiet=quiet, bar=not (quiet or as_json))
    if as_json:
        typer.echo(manifest.text(), nl=False)
    elif not quiet:
        print_summary(out, manifest)


def _prepared(options: CommonOptions, *, quiet: bool, bar: bool) -> Manifest:
    from pretrain.data.images.prepare import ImageOptions, prepare_images
    from pretrain.data.prepare import PrepareOptions
    from pretrain.data.prepare import prepare as prepare_texts
    from pretrain.data.prepare_pairs import PairOptions, prepare_pairs
    from pretrain.data.speech.prepare import SpeechOptions, prepare_speech

    if quiet:
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

    def say(note: str) -> None:
        if not quiet:
            typer.echo(f"note: {note}", err=True)

    with _ProgressBar(visible=bar) as shown:
        if isinstance(options, SpeechOptions):
            return prepare_speech(options, shown.show, say)
        if isinstance(options, PairOptions):
            return prepare_pairs(options, shown.show, say)
        if isinstance(options, ImageOptions):
            return prepare_images(options, shown.show)
        assert isinstance(options, PrepareOptions)
        return prepare_texts(options, shown.show, say)


def _shares(split: str | None, validation: list[str] | None, test: list[str] | None) -> tuple[float, ...]:
    from model.errors import UserError

    if split is None:
        return 0.98, 0.0 if validation else 0.01, 0.0 if test else 0.01
    try:
        return tuple(float(share) for share in split.split(","))
    except ValueError as error:
        wanted = "give three numbers separated by commas, such as 0.98,0.01,0.01"
        raise UserError(f"--split {split}: {wanted}") from error


def _missing_tokenizer() -> NoReturn:
    from model.errors import UserError

    raise UserError("--tokenizer is missing: name a SentencePiece model or a tokenizer.json")


def _options(
    common: CommonOptions,
    pairs: str | None,
    of_pairs: dict[str, Any],
    text_key: str,
    begin_mark: bool | None,
) -> PrepareOptions | PairOptions:
    """The options of pairs, or of texts. Raises UserError for one that has no effect."""
    from model.errors import UserError
    from pretrain.data.prepare import PrepareOptions
    from pretrain.data.prepare_pairs import PairOptions
    from pretrain.data.reading.pairs import Sides

    given = _given(common)
    chosen = {name: value for name, value in of_pairs.items() if value}
    if pairs is None:
        for name, value in chosen.items():
            shown = value if isinstance(value, int) else " ".join(value)
            raise UserError(f"--{name.replace('_', '-')} {shown} has no effect without --pairs: leave it out")
        return PrepareOptions(**given, text_key=text_key, begin_mark=begin_mark)
    _refuse(_of_plain_texts(common, text_key, begin_mark), "with --pairs")
    return PairOptions(**given, sides=Sides.of(pairs), **chosen)


def _of_plain_texts(common: CommonOptions, text_key: str, begin_mark: bool | None) -> dict[str, bool]:
    """Options that pairs do not read, and whether they were given."""
    return {
        f"--text-key {text_key}": text_key != "text",
        f"--split-by {common.split_by}": common.split_by != "document",
        "--begin-mark": begin_mark is not None,
    }


def _of_speech(
    common: CommonOptions, speech: str, chosen: dict[str, Any], text_key: str, begin_mark: bool | None
) -> SpeechOptions:
    """The options of recordings. Raises UserError for one that has no effect."""
    from pretrain.data.reading.pairs import Sides
    from pretrain.data.speech.prepare import SpeechOptions

    _refuse(_of_plain_texts(common, text_key, begin_mark), "with --speech")
    return SpeechOptions(**_given(common), sides=Sides.of(speech, "--speech"), **chosen)


def _given(common: CommonOptions) -> dict[str, Any]:
    from dataclasses import fields

    return {field.name: getattr(common, field.name) for field in fields(common)}


def _refuse(useless: Mapping[str, object], where: str) -> None:
    """Raises UserError for the first option that was given and has no effect."""
    from model.errors import UserError

    for option in (option for option, given in useless.items() if given):
        raise UserError(f"{option} has no effect {where}: leave it out")


def _of_texts(common: CommonOptions, text_key: str, tokenizer: str | None) -> dict[str, bool]:
    """Options that images do not read, and whether they were given."""
    return {
        f"--tokenizer {tokenizer}": tokenizer is not None,
        f"--text-key {text_key}": text_key != "text",
        f"--split-by {common.split_by}": common.split_by != "document",
        "--streaming": common.streaming,
        "--special-in-text": common.marked,
    }


def _size(given: str) -> tuple[int, int]:
    """Rows and columns. Raises UserError for anything but one or two numbers."""
    from model.errors import UserError

    numbers = given.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() and 0 < int(number) <= 1 << 16 for number in numbers):
        raise UserError(f"--images {given}: give rows and columns such as 224x224, or one number for squares")
    return int(numbers[0]), int(numbers[-1])


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Data set folder.")],
    documents: Annotated[int, typer.Option(min=0, max=1000, help="Documents to show.")] = 1,
    split: Annotated[SplitName, typer.Option(help="Split to show documents of.")] = SplitName.TRAIN,
    as_json: Annotated[bool, typer.Option("--json", help="Print manifest and documents as JSON.")] = False,
) -> None:
    """Show what a data set folder holds, and its first documents as text."""
    from rich.console import Console
    from rich.rule import Rule

    from pretrain.data.dataset_admin import inspect_dataset

    manifest, texts = inspect_dataset(folder, split.value, documents)
    if as_json:
        content = {"manifest": manifest.model_dump(mode="json"), "documents": texts}
        typer.echo(json.dumps(content, indent=1, ensure_ascii=False))
        return
    print_summary(folder, manifest)
    console = Console()
    for number, text in enumerate(texts, start=1):
        console.print(Rule(f"{split.value} document {number}"))
        console.out(CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text), highlight=False)


@app.command()
def verify(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Data set folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Read data sets whole and compare them with their checksums; leave with 2 if one differs."""
    from dataclasses import asdict

    from rich.console import Console

    from model.errors import UserError
    from pretrain.data.dataset_admin import verify_data as run

    whole: list[dict[str, object]] = []
    damaged: list[UserError] = []
    for folder in folders:
        try:
            with Console(stderr=True, quiet=quiet or as_json).status(f"reading {folder}"):
                found = run(folder)
        except UserError as error:
            damaged.append(error)
            continue
        whole.append(asdict(found))
        if not quiet and not as_json:
            typer.echo(f"{folder}: {found.files} files and {found.tokens:,} tokens are whole")
    if as_json:
        typer.echo(json.dumps({"whole": whole, "damaged": list(map(str, damaged))}, indent=1))
    for one in damaged[:-1]:
        typer.echo(f"fathom: error: {one}", err=True)
    if damaged:
        raise damaged[-1]


class _ProgressBar:
    """A live line of documents, tokens and speed on standard error."""

    def __init__(self, visible: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.fields[documents]:,} documents"),
            TextColumn("{task.fields[tokens]:,} tokens"),
            BarColumn(),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # Elsewhere a bar would leave an empty line, also beside a mistake.
            disable=not visible or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, documents=0, tokens=0, speed=0.0)

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: PrepareProgress) -> None:
        elapsed = self._bar.tasks[0].elapsed or 0.0
        self._bar.update(
            self._task,
            total=progress.total,
            completed=progress.bytes,
            documents=progress.documents,
            tokens=progress.tokens,
            speed=progress.tokens / elapsed if elapsed else 0.0,
        )
