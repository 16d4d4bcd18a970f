"""BERT: an encoder, in which every token sees all others (Devlin et al. 2019)."""

from __future__ import annotations

from model.families.family import Family, Head, Mask, Stack

BERT = Family(
    name="bert",
    summary="an encoder whose tokens see all others",
    stacks=(Stack("encoder", Mask.BIDIRECTIONAL),),
    head=Head(transform=True),
    settings=("token_types", "embedding_norm"),
)
