"""The table of families, by the names that `model.family` takes."""

from __future__ import annotations

from model.families.bert import BERT
from model.families.family import Family
from model.families.gpt import GPT
from model.families.seq2seq import SEQ2SEQ
from model.families.speech import SPEECH
from model.families.vit import VIT

FAMILIES: dict[str, Family] = {family.name: family for family in (GPT, BERT, SEQ2SEQ, VIT, SPEECH)}
DEFAULT_FAMILY = GPT.name
OWN_SETTINGS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.settings))
"""Fields of `ModelConfig` that only some families read."""


def summaries() -> str:
    """All families by name, each in a few words."""
    return "; ".join(f"{family.name}: {family.summary}" for family in FAMILIES.values())
