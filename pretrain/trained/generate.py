"""A checkpoint asked to continue a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from pretrain.trained.open import DECODER, Trained, open_trained

if TYPE_CHECKING:
    from pretrain.data.tokens.tokenizer import Tokenizer

NEW_TOKENS = 64
"""Tokens to add where nothing is said, and the model has positions for them."""


def generate_text(
    checkpoint: Path | str,
    prompt: str,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a prompt with the model of a checkpoint, piece of text by piece of text.

    Ends at the end of a document, or after max_new_tokens.
    An empty prompt starts a document.

    max_new_tokens: None means NEW_TOKENS, or as many as there are positions.

    Raises UserError as `open_trained` does, for settings out of range, no tokenizer or branches
    that are not warm yet, before the first piece; in between, where the model's logits are not
    finite.
    """
    from model.hf.reference import generate
    from pretrain.data.tokens.tokenizer import Tokenizer

    trained = open_trained(checkpoint)
    trained.check_kind(DECODER)
    trained.check_warm()
    tokenizer = Tokenizer(trained.needed_tokenizer())
    try:
        # Documents follow each other with nothing but the end mark between them,
        # so that mark is what the first token of one is predicted from. Where documents do not see
        # each other it is the first that all texts are read after.
        ids = tokenizer.encode(prompt)
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid text: {error.reason} at character {error.start}") from None
    if trained.reader.sections.data.document_mask or not ids:
        ids = [tokenizer.eod_id, *ids]
    new = generate(
        dict(trained.weights),
        trained.config,
        ids,
        _length(trained, len(ids), max_new_tokens),
        temperature,
        top_k,
        top_p,
        seed,
        logit_scale=trained.logit_scale,
        stop_id=tokenizer.eod_id,
    )
    return stream(tokenizer, ids, new)


def _length(trained: Trained, prompt: int, wanted: int | None) -> int:
    """Tokens to add to a prompt of so many.

    Raises UserError where the model has no positions for them.
    """
    if trained.config.position != "learned":
        return wanted or NEW_TOKENS
    room = trained.positions - prompt
    if room < 1:
        raise UserError(
            f"the prompt has {prompt} tokens, which leaves no room: "
            f"the model has {trained.positions} positions"
        )
    if wanted is not None and wanted > room:
        raise UserError(
            f"max_new_tokens={wanted} does not fit: the prompt has {prompt} tokens "
            f"and the model {trained.positions} positions"
        )
    return wanted or min(NEW_TOKENS, room)


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
