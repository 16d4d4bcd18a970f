"""ViT: an encoder of patches, which tells the class of an image (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from model.families.family import Family, Head, Mask, Stack

VIT = Family(
    name="vit",
    summary="an encoder of images, cut into patches",
    stacks=(Stack("encoder", Mask.BIDIRECTIONAL),),
    head=Head(pooled=True),
    positions=("learned", "sinusoidal", "none"),
    inputs="patches",
    settings=("image", "embedding_norm", "logit_bias"),
)
