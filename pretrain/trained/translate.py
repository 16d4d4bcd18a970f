"""An encoder-decoder of a checkpoint asked to translate texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from model.errors import UserError
from pretrain.trained.beam import Found, Search, search
from pretrain.trained.open import BOTH, Kind, Trained, is_export, open_trained

if TYPE_CHECKING:
    from torch import Tensor, device

    from model.hf.crossed_reference import CrossedEvaluation

BATCH = 32
"""Texts translated at once, where nothing is said."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Translation:
    """One translation of a text."""

    text: str
    score: float
    """As `pretrain/trained/beam.py` has it."""
    tokens: int
    """With the end mark."""
    ended: bool
    """By its end mark, not because it was as long as allowed."""

    @property
    def line(self) -> str:
        """The text without line breaks."""
        return re.sub(r"[\r\n]+", " ", self.text)


class Translator(Protocol):
    """A model that translates."""

    @property
    def name(self) -> str:
        """Where it is."""

    @property
    def longest(self) -> int | None:
        """Tokens of a source with its end mark; None where any number is possible."""

    @property
    def longest_new(self) -> int | None:
        """The same of a translation."""

    @property
    def new_tokens(self) -> int:
        """Tokens of the longest targets in training."""

    def encode(self, text: str) -> Any:
        """What the encoder reads of a source: ids with their end mark, or frames of a recording.

        Raises UnicodeEncodeError for a text that is none.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def search(self, sources: Sequence[Any], settings: Search) -> list[list[Found]]:
        """The best sequences of each of some sources."""

    @property
    def end(self) -> int:
        """The end mark."""


class CrossedCheckpoint:
    """A checkpoint with an encoder under its decoder. On a GPU where there is one, in fp32."""

    def __init__(self, trained: Trained, kind: Kind) -> None:
        """Raises UserError for a model of another kind, without a tokenizer, or not warm yet."""
        import torch

        from model.hf.crossed_reference import CrossedEvaluation
        from pretrain.data.tokens.tokenizer import Tokenizer

        trained.check_kind(kind)
        trained.check_warm()
        self.name = str(trained.reader.folder)
        self.tokenizer = Tokenizer(trained.needed_tokenizer())
        self.end = self.tokenizer.eod_id
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = {name: weight.to(self.device) for name, weight in trained.weights.items()}
        self.evaluation = CrossedEvaluation(weights, trained.config, logit_scale=trained.logit_scale)
        learned = trained.config.position == "learned"
        self.most_tokens = trained.source_positions if learned else None
        """Of a source, where its positions are learned."""
        self.longest_new = trained.positions if learned else None
        self.new_tokens = trained.positions

    def decode(self, ids: Sequence[int]) -> str:
        """As `Translator`. Ids that the tokenizer does not know are left out."""
        return self.tokenizer.decode(index for index in ids if index < self.tokenizer.vocab_size)

    def found(self, sources: Tensor, keep: Tensor, settings: Search) -> list[list[Found]]:
        """The best sequences of each source. sources, keep: as `CrossedEvaluation.encode`."""
        return search(Read(self.evaluation, sources, keep, self.device), len(sources), settings, self.end)


class CheckpointTranslator(CrossedCheckpoint):
    """A checkpoint, as a `Translator` of texts."""

    def __init__(self, trained: Trained) -> None:
        """Raises UserError as `CrossedCheckpoint` does."""
        super().__init__(trained, BOTH)
        self.longest = self.most_tokens

    def encode(self, text: str) -> list[int]:
        """As `Translator`."""
        return [*self.tokenizer.encode(text), self.end]

    def search(self, sources: Sequence[list[int]], settings: Search) -> list[list[Found]]:
        """As `Translator`."""
        import torch

        longest = max(map(len, sources))
        # What stands in the place of padding is seen by nobody.
        ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in sources])
        keep = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in sources])
        return self.found(ids, keep, settings)


class Read:
    """Sources that an encoder has read: a `Decoding`."""

    def __init__(self, evaluation: CrossedEvaluation, sources: Tensor, keep: Tensor, on: device) -> None:
        """sources, keep: as `CrossedEvaluation.encode`. on: where the weights are."""
        from model.hf.reference import Cache

        self.evaluation, self.device = evaluation, on
        self.memory, self.cache = evaluation.encode(sources.to(on), keep.to(on)), Cache()

    def next(self, tokens: Tensor, rows: Tensor | None, sources: Tensor | None) -> Tensor:
        """As `Decoding`."""
        if rows is not None:
            self.cache.select(rows.to(self.device))
        if sources is not None and len(sources) < len(self.memory.hidden):
            self.memory = self.memory.of(sources.to(self.device))
        found = self.evaluation.decode(tokens[:, None].to(self.device), self.memory, self.cache)
        return found[:, -1]


def open_translator(model: Path | str) -> Translator:
    """The model of a checkpoint, or of a folder of `fathom export`.

    Raises UserError as `open_trained` does, as `CheckpointTranslator` and `ExportTranslator`.
    """
    if is_export(model):
        from pretrain.trained.export_translator import ExportTranslator

        return ExportTranslator(Path(model))
    return CheckpointTranslator(open_trained(model))


def translate(
    translator: Translator,
    texts: Sequence[str],
    settings: Search,
    *,
    batch_size: int | None = None,
    names: str = "text",
    progress: Progress | None = None,
) -> list[list[Translation]]:
    """The best translations of each text, best first; none of a text that is blank.

    Texts of like length are translated together, which changes none of the translations.
    batch_size: texts at once; None means BATCH. names: what texts are called in messages.
    Raises UserError before the first translation for a text that is no text or too long, and where
    the model's logits are not finite.
    """
    sources = [_encoded(translator, text, f"{names} {at}") for at, text in enumerate(texts, start=1)]
    return searched(translator, sources, settings, batch_size or BATCH, progress)


def searched(
    translator: Translator,
    sources: Sequence[Any],
    settings: Search,
    size: int,
    progress: Progress | None,
) -> list[list[Translation]]:
    """As `translate`, of what the encoder reads: the longest first, `size` of them at once.

    Sources of length 0 have no translations.
    """
    settings = replace(settings, max_new_tokens=_new_tokens(translator, settings.max_new_tokens))
    given = sorted((at for at, one in enumerate(sources) if len(one)), key=lambda at: -len(sources[at]))
    found: list[list[Translation]] = [[] for _ in sources]
    for start in range(0, len(given), size):
        chosen = given[start : start + size]
        results = translator.search([sources[at] for at in chosen], settings)
        for at, sequences in zip(chosen, results, strict=True):
            found[at] = [_told(translator, one) for one in sequences]
        if progress:
            progress(min(start + size, len(given)), len(given))
    return found


def _new_tokens(translator: Translator, wanted: int | None) -> int:
    """Raises UserError for more tokens than there are positions."""
    most = translator.longest_new
    if wanted is not None and most is not None and wanted > most:
        raise UserError(f"--max-new-tokens {wanted}: {translator.name} has learned {most} positions")
    return wanted or translator.new_tokens


def _encoded(translator: Translator, text: str, name: str) -> Any:
    """Ids of a text; none of a blank one. Raises UserError for a text that cannot be read."""
    if not text.strip():
        return []
    try:
        ids = translator.encode(text)
    except UnicodeEncodeError as error:
        raise UserError(f"{name} is not valid text: {error.reason} at character {error.start}") from None
    if translator.longest is not None and len(ids) > translator.longest:
        raise UserError(
            f"{name} has {len(ids)} tokens with its end mark, and {translator.name} reads "
            f"{translator.longest}: shorten it"
        )
    return ids


def _told(translator: Translator, one: Found) -> Translation:
    ended = one.ids[-1] == translator.end
    text = translator.decode(one.ids[:-1] if ended else one.ids)
    return Translation(text, one.score, len(one.ids), ended)
