"""`fathom data prepare --pairs`: pairs of texts in, a data set folder with two sides out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from model.errors import UserError
from model.folders import whole_folder
from pretrain.data.manifest import MANIFEST, Manifest, PairFacts
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
from pretrain.data.reading.inputs import find_sources
from pretrain.data.reading.pairs import PairFile, Sides, pair_files, pair_records
from pretrain.data.reading.raw_record import Record
from pretrain.data.token_files import TOKENIZER
from pretrain.data.tokens.encode_pairs import PairJob
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.writer import PairOutput, correlation

MAX_TOKENS = 250
"""Of a side with its end mark, where nothing else is asked for; what is longer is seldom a pair."""

SIDES = Sides("source", "target")


@dataclass(frozen=True)
class PairOptions(CommonOptions):
    """The choices of `fathom data prepare --pairs`."""

    sides: Sides = SIDES
    max_tokens: int = MAX_TOKENS
    """Of a side with its end mark."""


def prepare_pairs(
    options: PairOptions,
    on_progress: Callable[[PrepareProgress], None] = nothing,
    on_note: Callable[[str], None] = nothing,
) -> Manifest:
    """Writes the data set folder and returns its manifest, as `prepare` does for texts.

    A pair's split follows from a hash of its source.
    Raises UserError as `prepare` does, and for files that are not parallel.
    """
    split = check_options(options)
    if options.max_tokens < 2:
        raise UserError(f"--max-tokens {options.max_tokens}: must be at least 2, a token and the end mark")
    sources = find_sources(options.inputs)
    files = [file for source in sources for file in pair_files(source.shards, options.sides)]
    tokenizer = Tokenizer(options.tokenizer)
    for note in tokenizer_notes(tokenizer):
        on_note(note)
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        copy = folder / TOKENIZER
        copy.write_bytes(tokenizer.model_bytes)
        job = PairJob(str(copy), options.sides, options.max_tokens, split, options.seed)
        output = PairOutput(folder, tokenizer, options.strict)
        guessed = any(file.file.compressed or file.file.kind == "hub" for file in files)
        total = None if guessed or options.limit is not None else sum(file.size for file in files)
        write_all(_sized_pairs(files, options), job, output, options, (total, on_progress))
        facts = output.finish()
        pairs = PairFacts(
            source=options.sides.source,
            target=options.sides.target,
            max_tokens=options.max_tokens,
            source_token_correlation=correlation(output.source_counts),
            one_side=output.one_side.facts(),
            too_long=output.too_long.facts(),
        )
        manifest = Manifest(**manifest_fields(options, sources, tokenizer), **facts, pairs=pairs)
        (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


def _sized_pairs(files: list[PairFile], options: PairOptions) -> Iterator[tuple[Record, int]]:
    """Raw pairs with the bytes of input that each stands for."""
    for file in files:
        for record in pair_records(file, options.sides, options.streaming):
            yield record, _size(record.raw)


def _size(raw: object) -> int:
    if isinstance(raw, tuple):
        return sum(_size(side) for side in raw)
    return len(raw) if isinstance(raw, bytes | str) else 0
