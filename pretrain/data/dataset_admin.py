"""What `fathom data` does with a data set that is there: show it, and check every byte of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from model.errors import UserError
from model.hf.tokenizer.table import tokenizer_file
from pretrain.data.frequencies import counts_problem
from pretrain.data.manifest import AGAIN, MANIFEST, PAIRED, Manifest, load_manifest
from pretrain.data.speech.filterbanks import FRAMES_PER_SECOND
from pretrain.data.token_files import (
    beyond,
    check_start,
    chunks,
    damaged,
    file_sha256,
    holds_frames,
    index_problem,
    size_problem,
    split_prefix,
    stored_dtype,
    stored_values,
    tokenizer_problem,
)
from pretrain.data.tokens.tokenizer import Tokenizer


def inspect_dataset(folder: Path, split: str = "train", documents: int = 0) -> tuple[Manifest, list[str]]:
    """Returns the manifest and the first documents of a split as text.

    Raises UserError for what is missing or damaged, as far as every start of a training looks.
    """
    manifest = load_manifest(folder)
    for name in manifest.splits:
        split_prefix(folder, name, manifest)
    sides = next((PAIRED[name] for name in PAIRED if name == split and manifest.both), (split,))
    texts = [_first_texts(folder, side, manifest, documents) for side in sides]
    if manifest.both is None or len(texts) == 1:
        return manifest, texts[0]
    names = manifest.both.source, manifest.both.target
    both = zip(*texts, strict=True)
    return manifest, [
        "\n".join(f"{name}: {text}" for name, text in zip(names, pair, strict=True)) for pair in both
    ]


def _first_texts(folder: Path, split: str, manifest: Manifest, documents: int) -> list[str]:
    prefix = split_prefix(folder, split, manifest)
    check_start(folder, split, manifest)
    if not documents or not manifest.facts(folder, split).documents:
        return []
    from pretrain.data.indexed import IndexedDataset

    if manifest.images is not None:
        names, stored = manifest.images.classes, IndexedDataset(prefix)
        labels = [
            int.from_bytes(stored[index][:4].tobytes(), "little")
            for index in range(min(documents, len(stored)))
        ]
        return [f"an image of class {label}, {names[label]}" for label in labels]
    if holds_frames(manifest, split):
        assert manifest.speech is not None
        clips = IndexedDataset(prefix)  # its lengths lie in a map of its file, which ends with it
        lengths = clips.sequence_lengths[:documents] // manifest.speech.filters
        return [f"a clip of {length / FRAMES_PER_SECOND:.2f} s" for length in lengths]
    tokenizer = Tokenizer(tokenizer_file(folder))
    dataset = IndexedDataset(prefix)
    shown = range(min(documents, len(dataset)))
    try:
        return [tokenizer.decode(dataset[index].tolist()) for index in shown]
    except (IndexError, ValueError) as error:
        raise damaged(folder, split, error) from error


@dataclass(frozen=True)
class Whole:
    """A data set in which nothing is wrong."""

    folder: str
    files: int
    tokens: int


def verify_data(folder: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Whole:
    """Reads a data set whole.

    Compares the tokenizer, the files of all splits and the counts of tokens with their checksums,
    every token with the vocabulary, and every document of an index with the tokens.
    on_bytes: told how many bytes of tokens were read, now and then.
    Raises UserError naming all that is wrong.
    """
    manifest = load_manifest(folder)
    problems = [tokenizer_problem(folder, manifest) or _other_vocabulary(folder, manifest)]
    for split in manifest.splits:
        problem = size_problem(folder, split, manifest)
        problems += [problem] if problem else _split_problems(folder / split, manifest, on_bytes)
    counted = manifest.token_counts_sha256 is not None
    if counted:
        problems.append(counts_problem(folder, manifest))
    if found := list(filter(None, problems)):
        raise UserError(f"data set {folder} is damaged: {'; '.join(found)}; {AGAIN}")
    tokens = sum(facts.tokens for facts in manifest.splits.values())
    return Whole(str(folder), 1 + counted + 2 * len(manifest.splits), tokens)


def _other_vocabulary(folder: Path, manifest: Manifest) -> str:
    if manifest.images is not None:
        return ""
    tokenizer = Tokenizer(tokenizer_file(folder))
    if (tokenizer.vocab_size, tokenizer.eod_id) != (manifest.vocab_size, manifest.eod_id):
        return f"{MANIFEST} has another vocabulary or end mark than {tokenizer.path.name}"
    if manifest.special and manifest.special != tokenizer.special:
        return f"{MANIFEST} has other special tokens than {tokenizer.path.name}"
    return ""


def _split_problems(prefix: Path, manifest: Manifest, on_bytes: Callable[[int], None]) -> list[str]:
    split, facts = prefix.name, manifest.facts(prefix.parent, prefix.name)
    dtype = stored_dtype(manifest, split)
    digest, first = hashlib.sha256(), None
    position = 0
    for data in chunks(prefix.with_suffix(".bin")):
        digest.update(data)
        if first is None and (found := beyond(data, dtype, stored_values(manifest, split))):
            first = position // dtype.itemsize + found[0], found[1]
        position += len(data)
        on_bytes(len(data))
    problems = []
    if digest.hexdigest() != facts.sha256:
        problems.append(f"{split}.bin has another checksum than {MANIFEST} says")
    if first is not None:
        problems.append(f"{split}.bin has token {first[1]} at {first[0]}, beyond the vocabulary")
    if facts.index_sha256 not in (None, file_sha256(prefix.with_suffix(".idx"))):
        return [*problems, f"{split}.idx has another checksum than {MANIFEST} says"]
    # Where the tokens are damaged, so may be the end marks.
    no_marks = problems or manifest.images is not None or holds_frames(manifest, split)
    marks = (None, None) if no_marks else (manifest.begin_id, manifest.eod_id)
    wrong = index_problem(prefix, facts, dtype, *marks)
    return [*problems, f"{split}.idx has {wrong}"] if wrong else problems
