"""BERT: an encoder, in which every token sees all others (Devlin et al. 2019)."""

from __future__ import annotations

from model.families.family import WINDOWS, Family, Head, Mask, Stack

BERT = Family(
    name="bert",
    summary="an encoder whose tokens see all others",
    stacks=(Stack("encoder", Mask.BIDIRECTIONAL),),
    head=Head(targets=True, transform=True),
    settings=("token_types", "embedding_norm", "first_norm", "plain_head", "logit_bias", *WINDOWS),
)
