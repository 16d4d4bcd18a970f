"""A decoder asked to continue a text: of a checkpoint, or of a folder in Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.errors import UserError
from pretrain.trained.open import DECODER, Trained, check_kind, is_export, open_trained

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.data.tokens.tokenizer import Tokenizer

NEW_TOKENS = 64
"""Tokens to add where nothing is said, and the model has positions for them."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int | None = None
    """None means NEW_TOKENS, or as many as there are positions."""
    temperature: float = 1.0
    """0 takes the likeliest token each time."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Writer:
    """A decoder with its tokenizer, on one CPU process and in fp32."""

    weights: Mapping[str, Tensor]
    """Canonical names, in memory."""
    config: ModelConfig
    logit_scale: float
    positions: int
    """The longest sequence."""
    tokenizer: Tokenizer
    marked: bool = False
    """Whether documents were trained apart, so that each is read after an end mark."""

    def ids(self, text: str) -> list[int]:
        """What the model reads of a text. Raises UserError for what is no text."""
        try:
            ids = self.tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt is not valid text: {error.reason} at character {error.start}"
            ) from None
        # Documents follow each other with nothing but the end mark between them,
        # so that mark is what the first token of one is predicted from. Where documents do not see
        # each other it is the first that all texts are read after.
        return [self.tokenizer.eod_id, *ids] if self.marked or not ids else ids

    def text(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """What comes after a prompt, piece by piece. Raises UserError as `ids` and `go_on` do."""
        ids = self.ids(prompt)
        return stream(self.tokenizer, ids, self.go_on(ids, sampling))

    def go_on(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        """New ids after `ids`, until the end mark (which is the last then) or as many as allowed.

        Raises UserError for settings out of range before the first; in between, where the model's
        logits are not finite.
        """
        from model.hf.reference import generate

        return generate(
            self.weights,
            self.config,
            ids,
            self.new_tokens(len(ids), sampling.max_new_tokens),
            sampling.temperature,
            sampling.top_k,
            sampling.top_p,
            sampling.seed,
            logit_scale=self.logit_scale,
            stop_id=self.tokenizer.eod_id,
        )

    def new_tokens(self, prompt: int, wanted: int | None) -> int:
        """Tokens to add to a prompt of so many.

        Raises UserError where the model has no positions for them.
        """
        if self.config.position != "learned":
            return wanted or NEW_TOKENS
        room = self.positions - prompt
        if room < 1:
            raise UserError(
                f"the prompt has {prompt} tokens, which leaves no room: "
                f"the model has {self.positions} positions"
            )
        if wanted is not None and wanted > room:
            raise UserError(
                f"--max-new-tokens {wanted} does not fit: the prompt has {prompt} tokens "
                f"and the model {self.positions} positions"
            )
        return wanted or min(NEW_TOKENS, room)


def writer_of(trained: Trained) -> Writer:
    """The decoder of a checkpoint.

    Raises UserError for another kind of model, no tokenizer, and branches that are not warm yet.
    """
    from pretrain.data.tokens.tokenizer import Tokenizer

    trained.check_kind(DECODER)
    trained.check_warm()
    return Writer(
        dict(trained.weights),
        trained.config,
        trained.logit_scale,
        trained.positions,
        Tokenizer(trained.needed_tokenizer()),
        marked=trained.reader.sections.data.document_mask,
    )


def open_writer(model: Path | str) -> Writer:
    """The decoder of a checkpoint, or of a folder in Hugging Face format.

    No code of the folder is run.
    Raises UserError as `open_trained` and `writer_of` do, and where the folder holds what
    `fathom import` refuses.
    """
    if not is_export(model):
        return writer_of(open_trained(model))
    from model.hf.importer import import_model
    from pretrain.data.tokens.tokenizer import Tokenizer

    found = import_model(str(model))
    check_kind(found.config, DECODER, str(model))
    if found.tokenizer is None:
        raise UserError(f"{model} has no tokenizer: export the checkpoint with its own")
    tokenizer = Tokenizer(found.tokenizer)
    return Writer(dict(found.weights), found.config, found.logit_scale, found.positions, tokenizer)


def generate_text(
    checkpoint: Path | str,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a prompt with a model, piece of text by piece of text.

    Ends at the end of a document, or after max_new_tokens.
    An empty prompt starts a document.

    max_new_tokens: as `Sampling` has it.
    Raises UserError as `open_writer` and `Writer.text` do.
    """
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    return open_writer(checkpoint).text(prompt, sampling)


def stream(tokenizer: Tokenizer, ids: Sequence[int], new: Iterator[int]) -> Iterator[str]:
    """Text of new ids after `ids`, as it becomes certain: a character may need several byte tokens.

    Only the ids since the last piece are decoded, and those of that piece before them, because some
    tokenizers drop spaces at the beginning of what they decode.
    """
    parts = tokenizer.token_bytes()
    known = [index for index in ids if index < len(parts)]
    context, shown = 0, len(known)

    def text(end: int) -> str:
        return tokenizer.decode(known[context:end])[len(tokenizer.decode(known[context:shown])) :]

    for token in new:
        if token >= len(parts):
            continue  # a row of the model that no text belongs to
        known.append(token)
        end = len(known) - _unfinished([parts[index] for index in known[max(shown, len(known) - 3) :]])
        if piece := text(end):
            yield piece
            if tokenizer.lossless or piece.strip(" "):
                context = shown
            shown = end
    if piece := text(len(known)):
        yield piece


def _unfinished(last: Sequence[bytes]) -> int:
    """How many of the last tokens are the first bytes of a longer character.

    last: the tokens, given as what they spell.
    """
    for count, part in enumerate(reversed(last), start=1):
        lead = part[0] if len(part) == 1 else 0
        if lead >= 0xC0:
            needed = 2 + (lead >= 0xE0) + (lead >= 0xF0)
            return count if count < needed else 0
        if lead < 0x80:
            break
    return 0
