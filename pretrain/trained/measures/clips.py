"""How well a model of speech of a checkpoint tells what recordings say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError
from pretrain.config.sections.spec_augment import SpecAugment
from pretrain.tasks.task import perplexity
from pretrain.trained.heard import speech_facts
from pretrain.trained.measures.wer import ErrorRates, check_installed, error_rates
from pretrain.trained.open import SPEECH, Trained

if TYPE_CHECKING:
    from pretrain.data.speech.samples import ClipBlend
    from pretrain.trained.beam import Search


@dataclass(frozen=True)
class Written:
    """Texts that the model wrote for all clips."""

    errors: ErrorRates
    bleu: float
    beam: int
    length_penalty: float
    ended: int
    """Texts with an end mark; the others were cut."""
    examples: tuple[tuple[str, str], ...]
    """(said, written) of the first clips."""


@dataclass(frozen=True, kw_only=True)
class ToldClips:
    """Losses of target tokens, and errors of what was written."""

    checkpoint: str
    step: int
    data: str
    rows: int
    clips: int
    left_out: int
    """Clips of the data that no row has room for."""
    precision: str
    loss: float
    """Nats a target token, without label smoothing."""
    tokens: int
    written: Written | None = None
    """None where it was not asked for."""

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        return asdict(self) | {"perplexity": perplexity(self.loss)}


EXAMPLES = 8


def open_split(trained: Trained, split: str, data: Path | str | None = None) -> ClipBlend:
    """Rows of clips of a split of the run's data set, or of another one, as the model hears them.

    Raises UserError as `open_clips` and `speech_facts` do.
    """
    from pretrain.data.speech.samples import open_clips
    from pretrain.trained.measures.windows import chosen

    corpora, cache = chosen(trained, data)
    blend = open_clips(corpora, split, trained.row_lengths, 0, cache, SpecAugment(), alone=True)
    facts = speech_facts(trained)
    blend.check_filters(facts.filters)
    blend.heard_as(facts.scale)
    return blend


def evaluate_clips(
    trained: Trained,
    *,
    data: Path | str | None = None,
    split: str = "validation",
    samples: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    settings: Search | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ToldClips:
    """Loss of what is said in clips, and errors of what the model writes for them.

    samples: rows from the first on; None: all. precision: of the loss; None: the run's.
    settings: how to write; None: not at all.
    Raises UserError where data and model do not fit.
    """
    from pretrain.data.tokens.tokenizer import Tokenizer
    from pretrain.trained.measures.pairs import score_batch
    from pretrain.trained.measures.windows import check_fits, chosen, rows_asked
    from pretrain.trained.scorer import Scorer

    trained.check_kind(SPEECH)
    if settings:
        check_installed()
    tokenizer = Tokenizer(trained.needed_tokenizer())
    blend = open_split(trained, split, data)
    name = f"{split} split of {check_fits(trained, tokenizer, chosen(trained, data)[0], blend)}"
    rows = rows_asked(blend, samples, name, "rows of clips ")
    if settings and not tokenizer.lossless:
        raise UserError(
            f"tokenizer {tokenizer.path} changes texts ({', '.join(tokenizer.changes)}), so that a data set "
            "does not hold what is said: leave out --translate"
        )
    run = trained.reader.sections
    size = batch_size or run.train.micro_batch_size or 8
    scorer = Scorer(trained, precision or run.train.precision or "auto")
    nats, tokens, count = 0.0, 0, 0
    clips: list[tuple[np.ndarray, np.ndarray]] = []
    for first in range(0, rows, size):
        numbers = range(first, min(first + size, rows))
        batch = blend.batch(numbers)
        told, counted = score_batch(scorer, batch)
        nats, tokens = nats + told, tokens + counted
        count += int(batch["documents"].amax(1).sum())  # a row's clips are numbered from 1
        if settings:
            clips += [clip for number in numbers for clip in blend.clips_of(number)]
        if progress:
            progress(numbers.stop, rows)
    return ToldClips(
        checkpoint=str(trained.reader.folder),
        step=trained.reader.step,
        data=name,
        rows=rows,
        clips=count,
        left_out=blend.left_out,
        precision=scorer.label,
        loss=nats / tokens,
        tokens=tokens,
        written=None if settings is None else write_clips(trained, clips, settings),
    )


def write_clips(trained: Trained, clips: list[tuple[np.ndarray, np.ndarray]], settings: Search) -> Written:
    """What a model writes for clips of (standardised frames, ids), and how much of it is wrong."""
    from pretrain.trained.measures.bleu import score_texts
    from pretrain.trained.transcribe import BATCH, Transcriber
    from pretrain.trained.translate import searched

    transcriber = Transcriber(trained)
    found = searched(transcriber, [frames for frames, _ in clips], settings, BATCH, None)
    wanted = [transcriber.decode(ids[:-1].tolist()) for _, ids in clips]
    texts = [best[0].line for best in found]
    return Written(
        error_rates(wanted, texts),
        score_texts(texts, texts, wanted)["bleu"].value,
        settings.beam,
        settings.length_penalty,
        sum(best[0].ended for best in found),
        tuple(zip(wanted, texts, strict=True))[:EXAMPLES],
    )
