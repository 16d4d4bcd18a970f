"""How close translations are to references: BLEU and chrF by the library sacrebleu.

Papineni et al. 2002, Popović 2015; Post 2018 for what makes scores comparable: texts without
tokenization of ours, and a signature of all settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score of a whole corpus."""

    value: float
    """0 to 100."""
    copied: float
    """What the sources themselves get, as if copying were translating."""
    signature: str
    """All settings, as sacrebleu writes them."""


def score_texts(sources: Sequence[str], found: Sequence[str], wanted: Sequence[str]) -> dict[str, Score]:
    """Scores by name, `bleu` and `chrf`, of texts found for sources against those wanted.

    At least one text each, equally many.
    """
    from sacrebleu.metrics import BLEU, CHRF

    scores = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        value, copied = (metric.corpus_score(texts, [wanted]).score for texts in (found, sources))
        scores[name] = Score(float(value), float(copied), str(metric.get_signature()))
    return scores
