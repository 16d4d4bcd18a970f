"""The encoder of a checkpoint asked what stands in the places of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from pretrain.trained.open import ENCODER, Trained, open_trained

if TYPE_CHECKING:
    from pretrain.data.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """A token for a place."""

    text: str
    probability: float


@dataclass(frozen=True)
class Filled:
    """A text whose places were filled."""

    text: str
    """With the likeliest token in every place."""
    places: tuple[tuple[Candidate, ...], ...]
    """For every place its likeliest tokens, best first."""


def fill_text(checkpoint: Path | str, text: str, top: int = 5) -> Filled:
    """Fills the places of a text, which are written as the mask token, each by itself.

    Spaces before a place belong to it, because the pieces of words begin with theirs.
    The text is read as a whole document, with its marks.
    top: candidates of every place.

    Raises UserError as `open_trained` does, for a decoder, a tokenizer without a mask token, a text
    without a place, and one that is too long.
    """
    import torch

    from model.hf.reference import Evaluation
    from pretrain.data.tokens.tokenizer import Tokenizer

    trained = open_trained(checkpoint)
    trained.check_kind(ENCODER)
    trained.check_warm()
    tokenizer = Tokenizer(trained.needed_tokenizer())
    ids, parts = _encode(trained, tokenizer, text)
    mask = tokenizer.special["mask"]
    evaluation = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    logits_pv = evaluation(torch.tensor([ids]))[0, [at for at, index in enumerate(ids) if index == mask]]
    if not logits_pv.isfinite().all():
        raise UserError("the model's logits are not finite: this checkpoint fills nothing")
    best = logits_pv.softmax(-1).topk(min(top, logits_pv.shape[-1]))
    spelt = [piece.decode(errors="replace") for piece in tokenizer.token_bytes()]
    places = tuple(
        tuple(
            Candidate(spelt[index] if index < len(spelt) else "", share)
            for share, index in zip(shares, tokens, strict=True)
        )
        for shares, tokens in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    whole = parts[0] + "".join(place[0].text + part for place, part in zip(places, parts[1:], strict=True))
    return Filled(whole, places)


def _encode(trained: Trained, tokenizer: Tokenizer, text: str) -> tuple[list[int], list[str]]:
    """Ids of a document with places, and the text around them.

    Raises UserError for a text without one, or longer than the model's positions.
    """
    mask = tokenizer.special.get("mask")
    if mask is None:
        raise UserError(f"tokenizer {tokenizer.path} has no mask token: it marks no place in a text")
    name = tokenizer.piece(mask)
    parts = text.split(name)
    if len(parts) == 1:
        raise UserError(f"the text has no place to fill: write {name} where one is")
    parts = [part.rstrip(" ") for part in parts[:-1]] + parts[-1:]
    ids = [tokenizer.special["cls"]] if "cls" in tokenizer.special else []
    try:
        for number, part in enumerate(parts):
            ids += ([mask] if number else []) + tokenizer.encode(part)
    except UnicodeEncodeError as error:
        raise UserError(f"the text is not valid: {error.reason} at character {error.start}") from None
    ids.append(tokenizer.eod_id)
    if trained.config.position == "learned" and len(ids) > trained.positions:
        raise UserError(
            f"the text has {len(ids)} tokens with its marks, and the model {trained.positions} positions: "
            "shorten it"
        )
    return ids, parts
