"""A checkpoint asked to continue a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.errors import UserError
from pretrain.trained.open import open_trained


def generate_text(
    checkpoint: Path | str,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a prompt with the model of a checkpoint, piece of text by piece of text; ends at the end of a document.

    An empty prompt starts a document. Raises UserError as `open_trained` does, and for settings out of range or no tokenizer, before the first piece.
    """
    from model.hf.reference import generate
    from pretrain.data.tokenizer import Tokenizer

    trained = open_trained(checkpoint)
    if trained.tokenizer is None:
        raise UserError(
            f"{trained.reader.folder} has no tokenizer.model: put the tokenizer of its data there"
        )
    tokenizer = Tokenizer(trained.tokenizer)
    # Documents follow each other with nothing but the end mark between them, so that mark is what the first token of one is predicted from.
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    room = trained.positions - len(ids)
    if trained.config.position == "learned" and max_new_tokens > room:
        raise UserError(
            f"max_new_tokens={max_new_tokens} does not fit: the prompt has {len(ids)} tokens and the model {trained.positions} positions"
        )
    new = generate(
        dict(trained.weights),
        trained.config,
        ids,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        logit_scale=trained.logit_scale,
        stop_id=tokenizer.eod_id,
    )
    return _pieces(tokenizer, ids, new)


def _pieces(tokenizer: Any, ids: list[int], new: Iterator[int]) -> Iterator[str]:
    """Text of new ids as it becomes certain: a character may need several byte tokens."""
    all_ids, shown = list(ids), len(tokenizer.decode(ids))
    text = ""
    for token in new:
        all_ids.append(token)
        text = tokenizer.decode(all_ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if text[shown:]:
        yield text[shown:]
