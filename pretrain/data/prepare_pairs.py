"""`fathom data prepare --pairs`: pairs of texts in, a data set folder with two sides out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from model.errors import UserError
from model.folders import whole_folder
from model.words import printable
from pretrain.data.manifest import MANIFEST, SPLITS, Manifest, PairFacts, SplitName
from pretrain.data.prepare import (
    DATA_SET,
    CommonOptions,
    PrepareProgress,
    check_options,
    manifest_fields,
    nothing,
    tokenizer_notes,
    write_all,
)
from pretrain.data.reading.inputs import Source, find_sources
from pretrain.data.reading.pairs import PairFile, Sides, pair_files, pair_records
from pretrain.data.reading.raw_record import Broken, Record
from pretrain.data.tokens.encode_pairs import HeldOut, PairJob
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.writer import NAME, PairOutput, correlation

MAX_TOKENS = 250
"""Of a side with its end mark, where nothing else is asked for; what is longer is seldom a pair."""

SIDES = Sides("source", "target")


@dataclass(frozen=True)
class PairOptions(CommonOptions):
    """The choices of `fathom data prepare --pairs`."""

    sides: Sides = SIDES
    max_tokens: int = MAX_TOKENS
    """Of a side with its end mark."""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    """Inputs that are these splits by themselves."""

    @property
    def held(self) -> dict[int, tuple[str, ...]]:
        """Inputs of splits that have their own, by the split's number."""
        given = {1: self.validation, 2: self.test}
        return {split: inputs for split, inputs in given.items() if inputs}

    @property
    def own_splits(self) -> tuple[SplitName, ...]:
        """Names of the splits that have inputs of their own."""
        return tuple(SPLITS[split] for split in self.held)


def prepare_pairs(
    options: PairOptions,
    on_progress: Callable[[PrepareProgress], None] = nothing,
    on_note: Callable[[str], None] = nothing,
) -> Manifest:
    """Writes the data set folder and returns its manifest, as `prepare` does for texts.

    A pair's split follows from a hash of its source, or from its input where a split has its own.
    A pair whose source such an input has is left out elsewhere.
    Raises UserError as `prepare` does, for files that are not parallel, for a file that is to be in
    two splits, and for a share of a split with inputs of its own.
    """
    split = check_options(options)
    check_shares(options)
    if options.max_tokens < 2:
        raise UserError(f"--max-tokens {options.max_tokens}: must be at least 2, a token and the end mark")
    sources, files = sources_and_files(options)
    held = held_out(options, files)
    tokenizer = Tokenizer(options.tokenizer)
    for note in tokenizer_notes(tokenizer):
        on_note(note)
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        copy = tokenizer.copy_to(folder)
        job = PairJob(str(copy), options.sides, options.max_tokens, split, options.seed, held, options.marked)
        output = PairOutput(folder, tokenizer, options.strict)
        guessed = any(file.file.compressed or file.file.kind == "hub" for file in files)
        total = None if guessed or options.limit is not None else sum(file.size for file in files)
        write_all(sized_pairs(files, options), job, output, options, (total, on_progress))
        output.check_own(options.own_splits)
        facts = output.finish()
        pairs = PairFacts(
            **pair_fields(options, output), source_token_correlation=correlation(output.source_counts)
        )
        manifest = Manifest(**manifest_fields(options, sources, tokenizer), **facts, pairs=pairs)
        (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


def sources_and_files(options: PairOptions) -> tuple[list[Source], list[PairFile]]:
    """All inputs, those of splits of their own first, and the files of pairs in them."""
    names = [*(name for inputs in options.held.values() for name in inputs), *options.inputs]
    sources = find_sources(names)
    return sources, [file for source in sources for file in pair_files(source.shards, options.sides)]


def pair_fields(options: PairOptions, output: PairOutput) -> dict[str, Any]:
    """What a manifest says of pairs, whatever their sources are."""
    return {
        "source": options.sides.source,
        "target": options.sides.target,
        "max_tokens": options.max_tokens,
        "one_side": output.one_side.facts(),
        "too_long": output.too_long.facts(),
        "validation": named(options.validation),
        "test": named(options.test),
        "held_out": output.held_out,
    }


def check_shares(options: PairOptions) -> None:
    """Raises UserError for a share of a split that has inputs of its own."""
    for number in options.held:
        if options.split[number]:
            name, given = SPLITS[number], ",".join(f"{share:g}" for share in options.split)
            raise UserError(
                f"--split {given}: with --{name} the {name} split is that input alone: give it no share"
            )


def held_out(options: PairOptions, files: list[PairFile], job: type[PairJob] = PairJob) -> HeldOut:
    """Which files are a split of their own, and what they say.

    job: knows what a pair and a source is.
    A file of INPUT may be one of them, and is then no other split's.
    """
    own: dict[str, int] = {}
    for number, inputs in options.held.items():
        for source in find_sources(list(inputs)):
            for shard in source.shards:
                if own.setdefault(shard.name, number) != number:
                    raise UserError(f"{shard.name} is named for --validation and --test: leave one out")
    for number in options.held:
        if not any(own.get(file.file.name) == number for file in files):
            raise UserError(f"--{SPLITS[number]}: there is no file of sources in it: name those")
    found: set[bytes] = set()
    for file in files:
        if file.file.name in own:
            for record in pair_records(file, options.sides, options.streaming):
                pair = job.pair(record, options.sides)
                if not isinstance(pair, Broken):
                    found.add(job.source(record, pair[0]))
    return HeldOut(own, frozenset(found))


def named(inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Inputs as a manifest names them."""
    return tuple(printable(name, NAME) for name in inputs)


def sized_pairs(files: list[PairFile], options: PairOptions) -> Iterator[tuple[Record, int]]:
    """Raw pairs with the bytes of input that each stands for."""
    for file in files:
        for record in pair_records(file, options.sides, options.streaming):
            yield record, _size(record.raw)


def _size(raw: object) -> int:
    if isinstance(raw, tuple):
        return sum(_size(side) for side in raw)
    return len(raw) if isinstance(raw, bytes | str) else 0
