"""How many words of transcripts are wrong, by the library jiwer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import UserError


@dataclass(frozen=True)
class ErrorRates:
    """Substituted, left out and added units over those that were said, of a whole corpus.

    1 is what a model that writes nothing gets.
    """

    words: float
    """As they are written."""
    plain_words: float
    """In lower case and without punctuation."""
    characters: float
    said: int
    """Words that were said."""


def check_installed() -> None:
    """Raises UserError where the library is missing."""
    if importlib.util.find_spec("jiwer") is None:
        raise UserError("word error rates need the package jiwer: pip install 'fathom[speech]'")


def error_rates(wanted: Sequence[str], found: Sequence[str]) -> ErrorRates:
    """Of texts found for recordings against what is said in them. At least one, equally many.

    Raises UserError where the library is missing, and for a text without words.
    """
    check_installed()
    import jiwer

    words = [jiwer.RemoveMultipleSpaces(), jiwer.Strip(), jiwer.ReduceToListOfListOfWords()]
    written = jiwer.Compose(words)
    plain = jiwer.Compose([jiwer.ToLowerCase(), jiwer.RemovePunctuation(), *words])
    try:
        told = jiwer.process_words(list(wanted), list(found), written, written)
        bare = jiwer.process_words(list(wanted), list(found), plain, plain)
    except ValueError as error:
        raise UserError(f"a transcript without a word has no word error rate ({error})") from None
    letters = jiwer.process_characters(list(wanted), list(found))
    return ErrorRates(
        float(told.wer), float(bare.wer), float(letters.cer), sum(len(text.split()) for text in wanted)
    )
