"""`fathom data prepare`: text in, a data set folder in Megatron-core's indexed format out; and `fathom data inspect`."""

from __future__ import annotations

import importlib.metadata
import json
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
from typing import Any, Literal

from model.errors import UserError
from model.files import atomic_write_text
from model.folders import FolderKind, whole_folder
from pretrain.data.documents import Record, records
from pretrain.data.encode import SPLITS, EncodedBatch, EncodeJob, Encoder, encode_in_worker, start_worker
from pretrain.data.inputs import Source, find_sources
from pretrain.data.manifest import FORMAT, MANIFEST, load_manifest, split_prefix
from pretrain.data.tokenizer import Tokenizer
from pretrain.data.writer import DatasetOutput

BATCH_BYTES = 1 << 19  # raw input that one task of a worker holds
BATCH_RECORDS = 4096
DATA_SET = FolderKind("a data set", marker=MANIFEST, advice="add --overwrite to replace it", option="--out")
SOURCES_LISTED = 100  # a shell pattern may have been expanded to thousands of inputs


@dataclass(frozen=True)
class PrepareOptions:
    """The choices of `fathom data prepare`.

    split: weights of train, validation and test. limit: records read at most. workers: processes; 0 means one for each usable core.
    streaming: read a hub data set without downloading it whole. strict: the first broken record ends the run.
    """

    inputs: list[str]
    out: Path
    tokenizer: Path
    text_key: str = "text"
    split: tuple[float, ...] = (0.98, 0.01, 0.01)
    split_by: Literal["document", "file"] = "document"
    seed: int = 1234
    workers: int = 0
    streaming: bool = False
    limit: int | None = None
    strict: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Progress:
    """How far a run is: documents and tokens written; bytes of raw input read, out of `total` if that is known."""

    documents: int
    tokens: int
    bytes: int
    total: int | None


def prepare(
    options: PrepareOptions, on_progress: Callable[[Progress], None] = lambda progress: None
) -> dict[str, Any]:
    """Writes the data set folder and returns its manifest (the content of dataset.json).

    The same input, tokenizer, split and seed give the same bytes, whatever the number of workers. The folder appears whole or not at all.
    Raises UserError for an option out of range, an input that matches nothing, an unusable tokenizer or output, or input without any document.
    """
    split = _check(options)
    sources = find_sources(options.inputs)
    if options.split_by == "file" and any(
        shard.kind == "hub" for source in sources for shard in source.shards
    ):
        raise UserError(
            "--split-by file: a data set of the datasets library has no files here; use --split-by document"
        )
    tokenizer = Tokenizer(options.tokenizer)
    with whole_folder(options.out, DATA_SET, options.overwrite) as folder:
        copy = folder / "tokenizer.model"
        copy.write_bytes(tokenizer.model_bytes)
        job = EncodeJob(str(copy), options.text_key, split, options.split_by, options.seed)
        output = DatasetOutput(folder, tokenizer, options.strict)
        shards = [shard for source in sources for shard in source.shards]
        predictable = options.limit is None and not any(
            shard.compressed or shard.kind == "hub" for shard in shards
        )
        total = sum(shard.size for shard in shards) if predictable else None
        for result in _encode_in_order(_batches(sources, options), job, options.workers or _usable_cores()):
            output.add(result)
            on_progress(Progress(output.documents, output.tokens, output.bytes, total))
        manifest = _manifest(options, sources, tokenizer, output)
        atomic_write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def inspect_dataset(
    folder: Path, split: str = "train", documents: int = 0
) -> tuple[dict[str, Any], list[str]]:
    """Returns the manifest and the first documents of a split as text, after checking that the files are whole. Raises UserError as load_manifest does."""
    manifest = load_manifest(folder)
    texts = []
    for name in manifest["splits"]:
        split_prefix(folder, name, manifest)
    prefix = split_prefix(folder, split, manifest)
    if documents and manifest["splits"][split]["documents"]:
        from pretrain.data.indexed import IndexedDataset

        tokenizer = Tokenizer(folder / "tokenizer.model")
        dataset = IndexedDataset(prefix)
        texts = [tokenizer.decode(dataset[index].tolist()) for index in range(min(documents, len(dataset)))]
    return manifest, texts


def _manifest(
    options: PrepareOptions, sources: list[Source], tokenizer: Tokenizer, output: DatasetOutput
) -> dict[str, Any]:
    rest = sources[SOURCES_LISTED:]
    return {
        "format": FORMAT,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "seed": options.seed,
        "split": list(options.split),
        "split_by": options.split_by,
        "text_key": options.text_key,
        "limit": options.limit,
        **output.finish(),
        "sources": [{"input": source.input, **_extent([source])} for source in sources[:SOURCES_LISTED]]
        + ([{"input": f"({len(rest)} more)", **_extent(rest)}] if rest else []),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("megatron-core", "sentencepiece", "datasets", "numpy")
        },
    }


def _extent(sources: list[Source]) -> dict[str, Any]:
    shards = [shard for source in sources for shard in source.shards]
    return {"kinds": sorted({shard.kind for shard in shards}), "parts": len(shards)}


def _check(options: PrepareOptions) -> tuple[float, float, float]:
    """Returns the split weights scaled to a sum of 1. Raises UserError."""
    given = ",".join(f"{share:g}" for share in options.split)
    if (
        len(options.split) != len(SPLITS)
        or not all(math.isfinite(share) and share >= 0 for share in options.split)
        or options.split[0] <= 0
    ):
        raise UserError(
            f"--split {given}: give three numbers TRAIN,VALIDATION,TEST, none negative and the first above 0"
        )
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed {options.seed}: must lie between 0 and 2^63 - 1")
    if options.workers < 0:
        raise UserError(f"--workers {options.workers}: must be at least 1, or 0 for one process on each core")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: must be at least 1")
    train, validation, test = (share / sum(options.split) for share in options.split)
    return train, validation, test


def _batches(sources: list[Source], options: PrepareOptions) -> Iterator[tuple[list[Record], int]]:
    """Groups the records of all sources, in order, into batches with their size in bytes."""
    every = (
        (
            record,
            shard.size
            if isinstance(record.raw, Path)
            else len(record.raw)
            if isinstance(record.raw, bytes | str)
            else 0,
        )
        for source in sources
        for shard in source.shards
        for record in records(shard, options.text_key, options.streaming)
    )
    batch: list[Record] = []
    size = 0
    for record, own in islice(every, options.limit):
        batch.append(record)
        size += own
        if size >= BATCH_BYTES or len(batch) >= BATCH_RECORDS:
            yield batch, size
            batch, size = [], 0
    if batch:
        yield batch, size


def _encode_in_order(
    batches: Iterator[tuple[list[Record], int]], job: EncodeJob, workers: int
) -> Iterator[EncodedBatch]:
    """Encodes batches in `workers` processes (1: in this one) and yields the results in input order, holding a few at a time."""
    if workers == 1:
        encoder = Encoder(job)
        for batch, size in batches:
            yield encoder.encode(batch, size)
        return
    # spawn: this process may hold threads (a progress bar, a library's pool), which fork would copy in an undefined state.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(job,)
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch, size in batches:
            waiting.append(pool.submit(encode_in_worker, batch, size))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers {workers}: a worker process was killed, most likely for lack of memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
