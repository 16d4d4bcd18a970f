"""`fathom data prepare`: text in, a data set folder out; and `fathom data inspect`."""

from __future__ import annotations

import importlib.metadata
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict

from model.errors import UserError
from model.folders import FolderKind, check_target, whole_folder
from model.hf.tokenizer.special import Role
from model.words import printable
from pretrain.data.manifest import FORMAT, MANIFEST, SPLITS, Manifest, SourceFacts
from pretrain.data.reading.documents import Record, records
from pretrain.data.reading.inputs import InputFile, Source, find_sources
from pretrain.data.reading.pairs import licence_of
from pretrain.data.tokens.encode import EncodedBatch, EncodeJob, Job, encode_in_worker, start_worker
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.writer import NAME, REASON, DatasetOutput

BATCH_BYTES = 1 << 19  # raw input that one task of a worker holds
BATCH_RECORDS = 4096
DATA_SET = FolderKind("a data set", marker=MANIFEST, advice="add --overwrite to replace it", option="--out")
SOURCES_LISTED = 100  # a shell pattern may have been expanded to thousands of inputs


@dataclass(frozen=True)
class CommonOptions:
    """What is chosen for texts and for pairs of them."""

    inputs: list[str]
    out: Path
    tokenizer: Path | str
    """A file, a folder or the name of a model of the Hub."""
    split: tuple[float, ...] = (0.98, 0.01, 0.01)
    """Weights of train, validation and test."""
    split_by: Literal["document", "file"] = "document"
    seed: int = 1234
    workers: int = 0
    """Processes; 0: one for each usable core."""
    streaming: bool = False
    """Read a hub data set without downloading it whole."""
    limit: int | None = None
    """Records read at most."""
    strict: bool = False
    """The first broken record ends the run."""
    overwrite: bool = False
    marked: bool = False
    """Names of special tokens in texts stand for those tokens; they are text without."""


@dataclass(frozen=True)
class PrepareOptions(CommonOptions):
    """The choices of `fathom data prepare`."""

    text_key: str = "text"
    begin_mark: bool | None = None
    """Begin every document with the tokenizer's cls token; None: if it has a mask token, too."""


@dataclass(frozen=True)
class PrepareProgress:
    """How far a run is."""

    documents: int
    """Written."""
    tokens: int
    """Written."""
    bytes: int
    """Of raw input read."""
    total: int | None
    """What `bytes` will be, if that is known."""


def nothing(told: object) -> None:
    """Tells nobody."""


def prepare(
    options: PrepareOptions,
    on_progress: Callable[[PrepareProgress], None] = nothing,
    on_note: Callable[[str], None] = nothing,
) -> Manifest:
    """Writes the data set folder and returns its manifest (the content of dataset.json).

    The same input, tokenizer, split and seed give the same bytes, whatever the number of workers.
    The folder appears whole or not at all.
    on_note: told in a line each, before anything is read, what the tokenizer cannot do.
    Raises UserError for an option out of range, an input that matches nothing, an unusable
    tokenizer or output, or input without any document.
    """
    split = check_options(options)
    sources = find_sources(options.inputs)
    shards = [shard for source in sources for shard in source.shards]
    if options.split_by == "file" and any(shard.kind == "hub" for shard in shards):
        no_files = "a data set of the datasets library has no files here"
        raise UserError(f"--split-by file: {no_files}; use --split-by document")
    tokenizer = Tokenizer(options.tokenizer)
    begin_id = _begin_id(tokenizer, options.begin_mark)
    for note in tokenizer_notes(tokenizer):
        on_note(note)
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        copy = tokenizer.copy_to(folder)
        job = EncodeJob(
            str(copy), options.text_key, split, options.split_by, options.seed, begin_id, options.marked
        )
        output = DatasetOutput(folder, tokenizer, options.strict)
        guessed = any(shard.compressed or shard.kind == "hub" for shard in shards)
        total = None if guessed or options.limit is not None else sum(shard.size for shard in shards)
        write_all(_sized_records(sources, options), job, output, options, (total, on_progress))
        manifest = Manifest(
            **manifest_fields(options, sources, tokenizer),
            **output.finish(),
            begin_id=begin_id,
            text_key=options.text_key,
        )
        (folder / MANIFEST).write_text(manifest.text(), encoding="utf-8")
    return manifest


def write_all(
    sized: Iterator[tuple[Record, int]],
    job: Job,
    output: DatasetOutput,
    options: CommonOptions,
    progress: tuple[int | None, Callable[[PrepareProgress], None]],
) -> None:
    """Encodes all records, with their sizes in bytes, and appends them to the files.

    progress: bytes of all of them, if that is known, and whom to tell.
    """
    total, on_progress = progress
    # A process uses one core, so that --workers means what it says.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    batches = _batches(islice(sized, options.limit))
    for result in _encode_in_order(batches, job, options.workers or _usable_cores()):
        output.add(result)
        on_progress(PrepareProgress(output.documents, output.tokens, output.bytes, total))


def _begin_id(tokenizer: Tokenizer, wanted: bool | None) -> int | None:
    """What every document begins with. Raises UserError for a mark that the tokenizer has not."""
    if wanted is None:
        wanted = "mask" in tokenizer.special
        return tokenizer.special.get("cls") if wanted else None
    if wanted and "cls" not in tokenizer.special:
        missing = f"tokenizer {tokenizer.path} has no token that begins a document"
        raise UserError(f"--begin-mark: {missing}; train one with `fathom tokenizer train`, or leave it out")
    return tokenizer.special["cls"] if wanted else None


def tokenizer_notes(tokenizer: Tokenizer) -> list[str]:
    """What one would otherwise learn after the training, a line each."""
    notes = []
    if tokenizer.changes:
        what = f"tokenizer {tokenizer.path} changes text: it {', it '.join(tokenizer.changes)}"
        notes.append(f"{what}; the data set will hold the changed text")
    if problem := tokenizer.kind.obstacle(tokenizer.path):
        from model.hf.tokenizer.convert import OTHERWISE

        why = f"tokenizer {tokenizer.path} has no equal fast tokenizer: {problem}; {OTHERWISE}"
        notes.append(f"a model of these data cannot be exported with its tokenizer: {why}")
    return notes


class _Fields(TypedDict):
    """Fields of a manifest that follow from what was asked for."""

    format: Literal[1]
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    special: dict[Role, int]
    special_in_text: bool
    seed: int
    split: tuple[float, ...]
    split_by: str
    limit: int | None
    left_out: tuple[str, ...]
    sources: tuple[SourceFacts, ...]
    versions: dict[str, str]


def manifest_fields(options: CommonOptions, sources: list[Source], tokenizer: Tokenizer) -> _Fields:
    """What a manifest says of the options, the input and the tokenizer."""
    rest = sources[SOURCES_LISTED:]
    listed = [_facts(printable(source.input, NAME), [source]) for source in sources[:SOURCES_LISTED]]
    left_out = [printable(name, NAME) for source in sources for name in source.left_out]
    packages = ("megatron-core", tokenizer.kind.package, "datasets", "numpy")
    return {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "special": dict(tokenizer.special),
        "special_in_text": options.marked,
        "seed": options.seed,
        "split": options.split,
        "split_by": options.split_by,
        "limit": options.limit,
        "left_out": tuple(left_out[:SOURCES_LISTED]),
        "sources": (*listed, *([_facts(f"({len(rest)} more)", rest)] if rest else [])),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _facts(given: str, sources: list[Source]) -> SourceFacts:
    shards = [shard for source in sources for shard in source.shards]
    kinds = tuple(sorted({shard.kind for shard in shards}))
    names = [shard.name for shard in shards[:SOURCES_LISTED]]
    found = {printable(Path(name).name, NAME): printable(licence_of(name), REASON) for name in names}
    licences = {name: licence for name, licence in found.items() if licence}
    return SourceFacts(input=given, kinds=kinds, parts=len(shards), licences=licences)


def check_options(options: CommonOptions) -> tuple[float, float, float]:
    """Returns the split weights scaled to a sum of 1.

    Raises UserError for what is out of range, and for a folder that cannot be written.
    """
    check_target(options.out, DATA_SET, options.overwrite)
    given = ",".join(f"{share:g}" for share in options.split)
    shares = [share for share in options.split if math.isfinite(share) and share >= 0]
    if not len(options.split) == len(shares) == len(SPLITS) or shares[0] <= 0:
        wanted = "give three numbers TRAIN,VALIDATION,TEST, none negative and the first above 0"
        raise UserError(f"--split {given}: {wanted}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: must lie between 0 and 2^63 - 1")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: must be at least 1, or 0 for one process on each core")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    train, validation, test = (share / sum(options.split) for share in options.split)
    return train, validation, test


def _batches(sized: Iterator[tuple[Record, int]]) -> Iterator[tuple[list[Record], int]]:
    """Groups records, in order, into batches with their size in bytes."""
    batch: list[Record] = []
    size = 0
    for record, own in sized:
        batch.append(record)
        size += own
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _sized_records(sources: list[Source], options: PrepareOptions) -> Iterator[tuple[Record, int]]:
    for source in sources:
        for shard in source.shards:
            for record in records(shard, options.text_key, options.streaming):
                yield record, _size(record, shard)


def _size(record: Record, shard: InputFile) -> int:
    """Bytes of raw input that a record stands for."""
    if isinstance(record.raw, Path):
        return shard.size
    return len(record.raw) if isinstance(record.raw, bytes | str) else 0


def _encode_in_order(
    batches: Iterator[tuple[list[Record], int]],
    job: Job,
    workers: int,
) -> Iterator[EncodedBatch]:
    """Encodes batches in `workers` processes (1: in this one), holding a few at a time.

    Yields the results in input order.
    """
    if workers == 1:
        encoder = job.encoder()
        for batch, size in batches:
            yield encoder.encode(batch, size)
        return
    # spawn: this process may hold threads (a progress bar, a library's pool), which fork would copy
    # in an undefined state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(job,))
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch, size in batches:
            waiting.append(pool.submit(encode_in_worker, batch, size))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        killed = "a worker process was killed, most likely for lack of memory"
        raise UserError(f"--workers {workers}: {killed}; use fewer workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
