"""Models that answer line by line: a decoder goes on with a text, an encoder-decoder translates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from model.errors import UserError
from model.records import Record, read_record
from pretrain.trained.beam import Search
from pretrain.trained.generate import NEW_TOKENS, Sampling, Writer, open_writer, stream, writer_of
from pretrain.trained.open import BOTH, is_export, open_trained
from pretrain.trained.translate import CheckpointTranslator, Translator, open_translator, translate


class Partner(Protocol):
    """Whoever answers."""

    hint: str
    """What becomes of a line, for whoever types."""

    def answer(self, line: str) -> Iterator[str]:
        """The answer, piece by piece. Raises UserError for a line that cannot be read."""

    def reset(self) -> None:
        """Forgets all lines before."""


class Conversation:
    """A decoder that goes on with one text, to which lines are added.

    It reads as many of the text's last tokens as leave room for its answer in the longest sequence
    that it was trained on.
    The first answer is what `fathom generate` has after the line, each later one has a seed of its
    own.
    """

    hint = "a line is added to the text, and the model goes on; so it does after an empty one"

    def __init__(self, writer: Writer, sampling: Sampling) -> None:
        """Raises UserError for settings out of range."""
        self.writer, self.sampling = writer, sampling
        most = writer.positions - 1
        self.new_tokens = sampling.max_new_tokens or min(NEW_TOKENS, max(1, most // 2))
        if self.new_tokens > most:
            raise UserError(
                f"--max-new-tokens {self.new_tokens} does not fit: "
                f"the model has {writer.positions} positions, of which one is for what it goes on from"
            )
        self.reset()
        writer.go_on(self._context(""), self._chosen())

    def reset(self) -> None:
        """As `Partner`."""
        self.ended: list[int] = []
        """Ids of what was said in documents that have ended."""
        self.text = ""
        """Of the document that goes on."""
        self.answers = 0

    def answer(self, line: str) -> Iterator[str]:
        """As `Partner`. What was said of an answer that is broken off stays in the text."""
        text = "\n".join(filter(None, (self.text, line)))
        ids = self._context(text)  # a line that is no text changes nothing
        self.text = text
        said: list[int] = []

        def new() -> Iterator[int]:
            for token in self.writer.go_on(ids, self._chosen()):
                said.append(token)
                yield token

        for piece in stream(self.writer.tokenizer, ids, new()):
            self.text += piece
            yield piece
        self.answers += 1
        if said[-1] == self.writer.tokenizer.eod_id:
            # Where documents do not see each other, the next one begins with nothing before it.
            self.ended, self.text = [] if self.writer.marked else [*ids, *said], ""

    def _chosen(self) -> Sampling:
        seed = (self.sampling.seed + self.answers) % (1 << 63) if self.answers else self.sampling.seed
        return replace(self.sampling, max_new_tokens=self.new_tokens, seed=seed)

    def _context(self, text: str) -> list[int]:
        ids = self.writer.ids(text) if text or not self.ended else []
        return [*self.ended, *ids][-(self.writer.positions - self.new_tokens) :]


class Translations:
    """An encoder-decoder that translates each line by itself."""

    hint = "a line is translated"

    def __init__(self, translator: Translator) -> None:
        self.translator = translator

    def answer(self, line: str) -> Iterator[str]:
        """As `Partner`."""
        for one in translate(self.translator, [line], Search())[0]:
            yield one.line

    def reset(self) -> None:
        """As `Partner`: no line is remembered."""


class Kinds(Record):
    """What config.json of an export says of its stacks."""

    is_encoder_decoder: bool = False


def open_partner(model: Path | str, sampling: Sampling) -> Partner:
    """The model of a checkpoint, or of a folder in Hugging Face format.

    Raises UserError as `open_writer` and `open_translator` do, and as `Conversation`.
    """
    if is_export(model):
        kinds = read_record(Path(model) / "config.json", Kinds, "export the checkpoint again")
        if kinds.is_encoder_decoder:
            return Translations(open_translator(model))
        return Conversation(open_writer(model), sampling)
    trained = open_trained(model)
    if trained.kind is BOTH:
        return Translations(CheckpointTranslator(trained))
    return Conversation(writer_of(trained), sampling)
