"""The windows of tokens that a trained model is measured on, from prepared data or from text.

Tokens are cut into windows as in training.
Documents follow each other in one stream, each ended by the end-of-document token.
A window may begin inside a document.
Without a stride, windows do not overlap: the first token of a window is seen by nothing before it
but the token it is predicted from.
A model whose documents did not see each other (`data.document_mask`) is measured so too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.errors import UserError
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.trained.measures.text_tokens import read_text

if TYPE_CHECKING:
    from pretrain.config.schema import Corpus
    from pretrain.data.blend import Blend
    from pretrain.trained.open import Trained

BATCH = 8


@dataclass(frozen=True)
class Asked:
    """Which text a model is measured on. No data and no text: the run's own data set."""

    data: Path | str | None = None
    """A prepared data set."""
    split: str = "validation"
    """Of the data set."""
    text: Sequence[str] = ()
    """Files, folders or patterns."""
    text_key: str | None = None
    """Key or column of the text in records of `text`; None: text."""
    samples: int | None = None
    """Windows, from the first on; None: all."""
    at_most: int | None = None
    """Where `samples` is None: as many as there are up to this."""
    stride: int | None = None
    """Tokens from one window to the next, for text only; None: the window."""
    batch_size: int | None = None
    """Windows at once; None: the run's micro_batch_size."""


def rows_asked(
    blend: Blend, samples: int | None, name: str, unit: str = "", at_most: int | None = None
) -> int:
    """How many rows of a data set are measured, from the first on.

    samples, at_most: as in `Asked`.
    name, unit: of the data and of its rows, with a space behind it, for messages.
    Raises UserError where there are fewer, and where several data sets have no end.
    """
    rows = blend.samples_per_epoch
    if len(rows) == 1:
        return _limit(samples, at_most, rows[0], f"the {name}", unit)
    asked = at_most if samples is None else samples
    if asked is None:
        raise UserError(
            "the run blends several data sets, which has no end: give --samples, or name one with --data"
        )
    return asked


@dataclass(frozen=True)
class Windows:
    """What is scored."""

    data: str
    """Where it is from, in words."""
    count: int
    """Windows in all."""
    window: int
    """Tokens of one, without the first, which is only read."""
    stride: int
    batches: Iterator[tuple[Tensor, int]]
    """Windows [b, n + 1] with the first target that counts in each."""
    end_mark: int | None
    """Ends documents that do not see each other, where the model was trained so."""


def open_windows(trained: Trained, tokenizer: Tokenizer | None, asked: Asked) -> Windows:
    """The windows that a model is measured on.

    tokenizer: the model's, None where the checkpoint has none.
    Raises UserError where data and model do not fit, or a field of `asked` has no effect.
    """
    run = trained.reader.sections
    batch_size = asked.batch_size or run.train.micro_batch_size or BATCH
    window = run.data.seq_length or trained.positions
    if asked.data is not None and asked.text:
        raise UserError("give either --data or --text, not both")
    if asked.text_key is not None and not asked.text:
        raise UserError(f"--text-key {asked.text_key} has an effect on --text only: data sets hold tokens")
    if asked.text:
        ids, name = _tokens_of(asked.text, tokenizer, asked.text_key or "text")
        assert tokenizer is not None
        found = _text_windows(ids, name, window, batch_size, asked)
        return replace(found, end_mark=tokenizer.eod_id) if run.data.document_mask else found
    if asked.stride is not None:
        raise UserError(
            f"--stride {asked.stride} has an effect on --text only: windows of prepared data do not overlap"
        )
    return _data_windows(trained, tokenizer, window, batch_size, asked)


def chosen(trained: Trained, data: Path | str | None) -> tuple[list[Corpus], Path | None]:
    """The data sets to measure on, and the folder of their sample indices.

    data: a prepared data set; None: the run's own.
    Raises UserError where the checkpoint does not name them.
    """
    from pretrain.config.errors import checked
    from pretrain.config.schema import Corpus

    if data is not None:
        return [checked(Corpus, {"path": str(data)}, "--data: ", {"path": "--data"})], None
    cache = trained.reader.sections.data.cache
    return trained.corpora(), Path(cache) if cache else None


def check_fits(trained: Trained, tokenizer: Tokenizer | None, corpora: list[Corpus], blend: Blend) -> str:
    """Returns the data sets in words.

    tokenizer: the model's, None where the checkpoint has none.
    Raises UserError for data of another vocabulary or tokenizer than the model's.
    """
    name = ", ".join(corpus.path for corpus in corpora)
    if blend.vocab_size != trained.config.vocab_size:
        raise UserError(
            f"data set {name} has a vocabulary of {blend.vocab_size}, "
            f"the model {trained.config.vocab_size}: prepare it with the model's tokenizer"
        )
    if tokenizer and blend.manifests[0].tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"data set {name} was prepared with another tokenizer than the model's, "
            f"{tokenizer.path}: prepare it with that one"
        )
    return name


def _data_windows(
    trained: Trained, tokenizer: Tokenizer | None, window: int, batch_size: int, asked: Asked
) -> Windows:
    from pretrain.data.blend import open_blend

    split = asked.split
    corpora, cache = chosen(trained, asked.data)
    blend = open_blend(corpora, split, window, 0, cache, alone=True)
    name = f"{split} split of {check_fits(trained, tokenizer, corpora, blend)}"
    samples = rows_asked(blend, asked.samples, name, "windows ", asked.at_most)
    steps = range(0, samples, batch_size)
    batches = ((blend.batch(range(at, min(at + batch_size, samples))), 0) for at in steps)
    mark = blend.eod_id if trained.reader.sections.data.document_mask else None
    return Windows(name, samples, window, window, batches, mark)


def _tokens_of(files: Sequence[str], tokenizer: Tokenizer | None, text_key: str) -> tuple[Tensor, str]:
    """The ids of text files, and what they are in words."""
    if tokenizer is None:
        advice = "put the tokenizer of its data there"
        raise UserError(f"--text needs a tokenizer, and the checkpoint has none: {advice}")
    found = read_text(files, tokenizer, text_key)
    name = f"{found.documents} document{'s' * (found.documents > 1)} of {', '.join(files)}"
    if found.broken:
        left_out = f"{found.broken} broken record{'s' * (found.broken > 1)} left out"
        name += f" ({left_out}, the first: {found.first_broken})"
    return found.ids, name


def _text_windows(ids: Tensor, name: str, window: int, batch_size: int, asked: Asked) -> Windows:
    stride = window if asked.stride is None else asked.stride
    if not 1 <= stride <= window:
        raise UserError(f"--stride {stride} must lie between 1 and the window of {window} tokens")
    starts = list(range(0, max(len(ids) - 1 - window, 0) + stride, stride))
    starts = starts[: _limit(asked.samples, asked.at_most, len(starts), name, "windows ")]
    return Windows(name, len(starts), window, stride, _cut(ids, starts, window, stride, batch_size), None)


def _cut(
    ids: Tensor, starts: list[int], window: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, int]]:
    """Windows [b, n + 1] with the first target that counts in each.

    First the first window alone, which counts whole.
    Then full windows in batches, of which the last `stride` targets count.
    Then what is left.
    """
    full = [start for start in starts[1:] if start + window < len(ids)]
    yield ids[starts[0] : starts[0] + window + 1][None], 0
    for at in range(0, len(full), batch_size):
        yield (
            torch.stack([ids[start : start + window + 1] for start in full[at : at + batch_size]]),
            window - stride,
        )
    for start in starts[1 + len(full) :]:
        yield ids[start : start + window + 1][None], window - stride


def _limit(samples: int | None, at_most: int | None, available: int, what: str, unit: str) -> int:
    if samples is None:
        return available if at_most is None else min(at_most, available)
    if samples > available:
        raise UserError(f"--samples {samples}: {what} gives {available} {unit}only")
    return samples
