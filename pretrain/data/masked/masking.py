"""Which tokens of a sample are to be predicted, and what the model sees in their place.

Pure functions of the run's seed and the sample's number, which counts over all passes: every pass
has other masks (dynamic masking, arXiv:1907.11692), and any of them can be computed again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model.errors import UserError
from pretrain.config.sections.masking import Masking
from pretrain.data.order import sample_key
from pretrain.data.tokens.tokenizer import Tokenizer

WORDS = 2.0**-64
"""Turns 64 raw bits into a number from 0 to 1."""


@dataclass(frozen=True)
class MaskVocabulary:
    """What masking has to know about the tokens of a vocabulary of v."""

    mask_id: int
    padding: int
    """What fills a sample up, hidden: where there is no token for it, the end mark."""
    special: np.ndarray
    """[v] bool: no text contains it, so that there is nothing to predict."""
    drawable: np.ndarray
    """[at most v] ids that may hide another, in ascending order."""
    begins: np.ndarray
    """[v] bool: begins with white space, and so begins a word."""
    ends: np.ndarray
    """[v] bool: ends with white space, so that the next token begins a word."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> MaskVocabulary:
        """Reads it from a tokenizer. Raises UserError where that has no mask token."""
        mask_id = tokenizer.special.get("mask")
        if mask_id is None:
            advice = (
                "train one with `fathom tokenizer train --special mask,pad,cls,sep` "
                "and prepare the data with it"
            )
            raise UserError(f"tokenizer {tokenizer.path} has no mask token: {advice}")
        texts = tokenizer.token_bytes()
        return cls(
            mask_id,
            padding=tokenizer.special.get("pad", tokenizer.eod_id),
            special=tokenizer.is_control(),
            drawable=np.flatnonzero([bool(text) for text in texts]),
            begins=np.array([text[:1].isspace() for text in texts]),
            ends=np.array([text[-1:].isspace() for text in texts]),
        )


@dataclass(frozen=True)
class Masked:
    """One sample of s tokens with k places to predict."""

    inputs: np.ndarray
    """[s] int64: what the model sees."""
    places: np.ndarray
    """[k] int64: places of the tokens to predict, ascending, then zeros."""
    labels: np.ndarray
    """[k] int64: the tokens that stood there, then zeros."""
    weights: np.ndarray
    """[k] float32: 1 for a token to predict, 0 where there was none left."""


def places_per_sample(rate: float, seq_length: int) -> int:
    """Returns k, the places to predict of every sample, whatever it holds.

    Raises UserError where that would be none.
    """
    if count := round(rate * seq_length):
        return count
    least = 0.5 / seq_length
    raise UserError(
        f"masking.rate={rate:g} leaves nothing to predict of data.seq_length={seq_length}: "
        f"set it above {least:.3g}"
    )


def target_count(rate: float, tokens: int, maskable: int) -> int:
    """Returns how many tokens of a sample are to be predicted.

    That is the rate's share of its tokens, marks included, at least 1, and at most the maskable.
    tokens: of the sample without padding. maskable: those of them that are text.
    """
    return min(max(round(rate * tokens), 1), maskable)


def type_cut(seed: int | None, index: int, length: int) -> int:
    """Returns the place, 0 to length, from which tokens of a sample are of the second type.

    Uniform; seed and index as in `sample_key`.
    """
    return sample_key("types", seed, index) % (1 << 64) % (length + 1)


def mask_sample(
    tokens: np.ndarray,
    segments: np.ndarray,
    settings: Masking,
    vocabulary: MaskVocabulary,
    key: int,
) -> Masked:
    """Masks one sample.

    tokens: [s] int64. segments: [s], 0 for padding, which is never to be predicted.
    key: of `sample_key`.
    """
    number = places_per_sample(settings.rate, len(tokens))
    # Raw output of the bit generator: numpy promises never to change it.
    raw = np.random.Philox(key=key).random_raw(len(tokens) + 2 * number)
    present = segments > 0
    maskable = np.flatnonzero(present & ~vocabulary.special[tokens])
    count = target_count(settings.rate, int(np.count_nonzero(present)), len(maskable))
    order = raw[: len(tokens)]
    if settings.whole_words:
        order = order[_word_firsts(tokens, segments, vocabulary)]
    # Stable, so that the pieces of a word stay in their order.
    chosen = np.sort(maskable[np.argsort(order[maskable], kind="stable")[:count]])

    places, labels = np.zeros(number, np.int64), np.zeros(number, np.int64)
    weights = np.zeros(number, np.float32)
    places[:count], labels[:count], weights[:count] = chosen, tokens[chosen], 1.0
    inputs = tokens.copy()
    inputs[chosen] = _shown(labels[:count], raw[len(tokens) :].reshape(2, number), settings, vocabulary)
    return Masked(inputs, places, labels, weights)


def _shown(labels: np.ndarray, raw: np.ndarray, settings: Masking, vocabulary: MaskVocabulary) -> np.ndarray:
    """What stands in the place of tokens [n]: the mask token, a random one, or the token.

    raw: [2, at least n] bits, of the choice between these three and of the random token.
    """
    choice = raw[0, : len(labels)] * WORDS
    drawn = vocabulary.drawable[raw[1, : len(labels)] % np.uint64(len(vocabulary.drawable))]
    exchanged = np.where(choice < settings.masked_share + settings.random_share, drawn, labels)
    return np.where(choice < settings.masked_share, vocabulary.mask_id, exchanged)


def _word_firsts(tokens: np.ndarray, segments: np.ndarray, vocabulary: MaskVocabulary) -> np.ndarray:
    """[s] place of the first piece of each token's word.

    A mark is a word of its own, and no word reaches across documents.
    """
    special = vocabulary.special[tokens]
    first = vocabulary.begins[tokens] | special
    first[0] = True
    first[1:] |= vocabulary.ends[tokens[:-1]] | special[:-1] | (segments[1:] != segments[:-1])
    return np.maximum.accumulate(np.where(first, np.arange(len(tokens)), 0))


def document_positions(segments: np.ndarray) -> np.ndarray:
    """Returns positions that start again with every document, of segments [..., s].

    Padding counts as one more document.
    """
    first = np.ones(segments.shape, dtype=bool)
    first[..., 1:] = segments[..., 1:] != segments[..., :-1]
    places = np.broadcast_to(np.arange(segments.shape[-1]), segments.shape)
    starts = np.maximum.accumulate(np.where(first, places, 0), axis=-1)
    return np.asarray(places - starts, dtype=np.int64)
