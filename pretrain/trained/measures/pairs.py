"""How well an encoder-decoder of a checkpoint tells the targets of pairs, and translates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from model.errors import UserError
from pretrain.tasks.table import task_of
from pretrain.tasks.task import perplexity
from pretrain.trained.measures.bleu import Score, score_texts
from pretrain.trained.open import BOTH

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.tokens.tokenizer import Tokenizer
    from pretrain.trained.beam import Search
    from pretrain.trained.open import Trained
    from pretrain.trained.scorer import Scorer

BATCH = 8
Pair = tuple[np.ndarray, np.ndarray]
"""Ids of source and target, each with its end mark."""


@dataclass(frozen=True)
class PairsAsked:
    """Which pairs a model is measured on. No data and no text: the run's own data set."""

    data: Path | str | None = None
    """A prepared data set of pairs."""
    split: str = "validation"
    """Of the data set."""
    text: Sequence[str] = ()
    """Files, folders or patterns of pairs."""
    sides: str | None = None
    """SOURCE,TARGET: keys, columns or suffixes of the files of `text`."""
    samples: int | None = None
    """Rows of a data set, or pairs of text, from the first on; None: all."""
    batch_size: int | None = None
    """Of them at once; None: the run's micro_batch_size."""


@dataclass(frozen=True)
class Translated:
    """Scores of translations."""

    scores: dict[str, Score]
    beam: int
    length_penalty: float
    max_new_tokens: int | None
    """None: as many as a target had in training."""
    ended: int
    """Translations with an end mark; the others were cut."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Losses of target tokens, summed."""

    checkpoint: str
    step: int
    data: str
    samples: int
    """Rows of pairs, or pairs of text."""
    pairs: int
    left_out: int
    """Pairs of the data that no row has room for."""
    precision: str
    nats: float
    """Without label smoothing."""
    tokens: int
    """Of targets, end marks among them."""
    wrong_nats: float | None = None
    """The same with every target beside the source of another pair; None where not asked for."""
    translated: Translated | None = None
    """None where it was not asked for."""

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        facts: dict[str, object] = {
            name: value
            for name, value in vars(self).items()
            if name not in ("nats", "wrong_nats", "translated")
        }
        loss = self.nats / self.tokens
        facts |= {"total_nats": self.nats, "loss": loss, "perplexity": perplexity(loss)}
        if self.wrong_nats is not None:
            wrong = self.wrong_nats / self.tokens
            facts |= {"wrong_source_loss": wrong, "source_gain": wrong - loss}
        return facts | ({} if self.translated is None else {"translated": asdict(self.translated)})


@dataclass(frozen=True)
class _Given:
    """What is measured on."""

    name: str
    samples: int
    rows: Iterator[list[Pair]]
    """The pairs of each sample."""
    lengths: tuple[int, int] | None
    """Of a row's two sides; None: as long as the pair."""
    left_out: int = 0
    """Pairs that are longer than a row."""
    texts: list[tuple[str, str]] | None = None
    """Of all pairs; None: what their ids spell."""


def evaluate_pairs(
    trained: Trained,
    asked: PairsAsked,
    *,
    precision: str | None = None,
    settings: Search | None = None,
    wrong: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Told:
    """Loss of the targets of pairs, and scores of the translations of their sources.

    precision: of the loss; None: the run's. settings: how to translate; None: not at all.
    wrong: also with every target beside another pair's source, which tells how much the decoder
    takes from the encoder.
    The first `train.eval_samples` rows of the run's validation split are those that the trainer
    evaluates on.
    Raises UserError where data and model do not fit, or an argument has no effect.
    """
    from pretrain.data.tokens.tokenizer import Tokenizer
    from pretrain.trained.scorer import Scorer

    trained.check_kind(BOTH)
    tokenizer = Tokenizer(trained.needed_tokenizer())
    given = _given(trained, tokenizer, asked)
    if settings and given.texts is None and not tokenizer.lossless:
        raise UserError(
            f"tokenizer {tokenizer.path} changes texts ({', '.join(tokenizer.changes)}), so that a data set "
            "does not hold what translations are compared with: name files with --text and --pairs"
        )
    run = trained.reader.sections
    size = asked.batch_size or run.train.micro_batch_size or BATCH
    scorer = Scorer(trained, precision or run.train.precision or "auto")
    nats, tokens, done = 0.0, 0, 0
    pairs: list[Pair] = []
    while rows := list(islice(given.rows, size)):
        told, count = score_batch(scorer, _batch(rows, given.lengths, tokenizer.eod_id))
        nats, tokens, done = nats + told, tokens + count, done + len(rows)
        pairs += [pair for row in rows for pair in row]
        if progress:
            progress(done, given.samples)
    wrong_nats = None
    if wrong:
        mixed = iter(with_wrong_sources(pairs))
        wrong_nats = 0.0
        while few := list(islice(mixed, size)):
            wrong_nats += score_batch(scorer, _batch([[pair] for pair in few], None, tokenizer.eod_id))[0]
    translated = None
    if settings:
        translated = _translated(trained, given.texts or _spelt(tokenizer, pairs), settings, progress)
    return Told(
        checkpoint=str(trained.reader.folder),
        step=trained.reader.step,
        data=given.name,
        samples=done,
        pairs=len(pairs),
        left_out=given.left_out,
        precision=scorer.label,
        nats=nats,
        tokens=tokens,
        wrong_nats=wrong_nats,
        translated=translated,
    )


def score_batch(scorer: Scorer, batch: dict[str, Tensor]) -> tuple[float, int]:
    """(Nats of all target tokens, how many there are)."""
    counted = batch["weights"] > 0
    return float(scorer.labelled(batch)[counted].double().sum()), int(counted.sum())


def with_wrong_sources(pairs: Sequence[Pair]) -> list[Pair]:
    """Every target beside the source of the next pair that has another one, in a circle.

    Raises UserError where all pairs have one source.
    """
    count = len(pairs)
    # From the last pair to the first, twice round: the distance to the next other source.
    apart = [0] * count
    for index in (*range(count - 1, -1, -1), *range(count - 1, -1, -1)):
        after = (index + 1) % count
        same = np.array_equal(pairs[index][0], pairs[after][0])
        apart[index] = apart[after] + 1 if same and apart[after] else 0 if same else 1
    if not all(apart):
        raise UserError("--wrong-source needs pairs with at least two different sources: measure more pairs")
    return [(pairs[(index + apart[index]) % count][0], pair[1]) for index, pair in enumerate(pairs)]


def held_out(trained: Trained, split: str, count: int) -> list[tuple[str, str]]:
    """The texts of the first pairs of a split of the run's data set, at most `count`.

    Raises UserError as `evaluate_pairs`.
    """
    from pretrain.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer(trained.needed_tokenizer())
    rows = _data_pairs(trained, tokenizer, PairsAsked(split=split)).rows
    return _spelt(tokenizer, islice(chain.from_iterable(rows), count))


def _spelt(tokenizer: Tokenizer, pairs: Iterable[Pair]) -> list[tuple[str, str]]:
    """The texts of pairs of ids."""
    return [
        (tokenizer.decode(source.tolist()), tokenizer.decode(target.tolist())) for source, target in pairs
    ]


def _translated(
    trained: Trained,
    texts: list[tuple[str, str]],
    settings: Search,
    progress: Callable[[int, int], None] | None,
) -> Translated:
    from pretrain.trained.translate import CheckpointTranslator, translate

    sources, wanted = ([pair[side] for pair in texts] for side in (0, 1))
    found = translate(CheckpointTranslator(trained), sources, settings, names="pair", progress=progress)
    best = [translations[0] for translations in found]
    return Translated(
        score_texts(sources, [one.line for one in best], wanted),
        settings.beam,
        settings.length_penalty,
        settings.max_new_tokens,
        sum(one.ended for one in best),
    )


def _batch(rows: list[list[Pair]], lengths: tuple[int, int] | None, end: int) -> dict[str, Tensor]:
    import torch

    from pretrain.data.pairs.samples import row_of

    if lengths is None:
        longest = [max(len(pair[side]) for row in rows for pair in row) for side in (0, 1)]
        lengths = longest[0], longest[1]
    found = [row_of(row, lengths, end, end) for row in rows]
    return {name: torch.from_numpy(np.stack([row[name] for row in found])) for name in found[0]}


def _given(trained: Trained, tokenizer: Tokenizer, asked: PairsAsked) -> _Given:
    if asked.text:
        if asked.data is not None:
            raise UserError("give either --data or --text, not both")
        if asked.sides is None:
            raise UserError("--text of pairs needs --pairs SOURCE,TARGET: keys, columns or suffixes of files")
        return _text_pairs(trained, tokenizer, asked)
    if asked.sides is not None:
        raise UserError(f"--pairs {asked.sides} has an effect with --text only: data sets hold tokens")
    task = task_of(trained.reader.sections.train.task, trained.config.family)
    if asked.data is None and task.samples != "pairs":
        raise UserError(
            f"{trained.reader.folder} was trained for {task.name}, and translations are measured on pairs: "
            "name a data set of pairs with --data, or files with --text and --pairs"
        )
    return _data_pairs(trained, tokenizer, asked)


def _data_pairs(trained: Trained, tokenizer: Tokenizer, asked: PairsAsked) -> _Given:
    from pretrain.data.pairs.samples import open_pairs
    from pretrain.trained.measures.windows import check_fits, chosen, rows_asked

    corpora, cache = chosen(trained, asked.data)
    lengths = trained.row_lengths
    blend = open_pairs(corpora, asked.split, lengths, 0, cache, alone=True)
    name = f"{asked.split} split of {check_fits(trained, tokenizer, corpora, blend)}"
    samples = rows_asked(blend, asked.samples, name, "rows of pairs ")
    return _Given(name, samples, (blend.pairs_of(index) for index in range(samples)), lengths, blend.left_out)


def _text_pairs(trained: Trained, tokenizer: Tokenizer, asked: PairsAsked) -> _Given:
    from pretrain.data.reading.inputs import find_sources
    from pretrain.data.reading.pairs import Sides, pair_files, pair_of, pair_records
    from pretrain.data.reading.raw_record import Broken

    sides, pairs, broken = Sides.of(asked.sides or ""), [], []
    texts: list[tuple[str, str]] = []
    for source in find_sources(list(asked.text)):
        for file in pair_files(source.shards, sides):
            if file.file.kind == "hub":
                raise UserError(f"--text {file.file.name}: no such file")
            for record in pair_records(file, sides):
                found = pair_of(record, sides)
                if isinstance(found, Broken):
                    broken.append(found)
                elif all(text.strip() for text in found):
                    texts.append(found)
                    pairs.append(_encoded(trained, tokenizer, found, f"{record.file}:{record.line}"))
    name = f"{len(pairs)} pairs of {', '.join(asked.text)}"
    if broken:
        name += f" ({len(broken)} broken left out, the first: {broken[0].place})"
    if not pairs:
        raise UserError(f"--text: there is no pair in it, {name}")
    samples = len(pairs) if asked.samples is None else asked.samples
    if samples > len(pairs):
        raise UserError(f"--samples {samples}: there are {name} only")
    return _Given(name, samples, ([pair] for pair in pairs[:samples]), None, texts=texts[:samples])


def _encoded(trained: Trained, tokenizer: Tokenizer, texts: tuple[str, str], place: str) -> Pair:
    """Raises UserError for a pair that the model has no positions for."""
    found = [np.array([*tokenizer.encode(text), tokenizer.eod_id], dtype=np.int64) for text in texts]
    if trained.config.position == "learned":
        for ids, most in zip(found, (trained.source_positions, trained.positions), strict=True):
            if most is not None and len(ids) > most:
                raise UserError(f"{place}: {len(ids)} tokens, and the model has learned {most} positions")
    return found[0], found[1]
