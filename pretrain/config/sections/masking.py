"""What a user may say about masked language modelling."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from model.sections import Strict

LongDocuments = Literal["split", "cut"]


class Masking(Strict):
    """Which tokens are to be predicted, what hides them from the model, and what a sample is."""

    rate: float = Field(0.15, ge=0.001, le=0.9, description="Share of a sample's tokens to predict.")
    masked_share: float = Field(
        0.8, gt=0, le=1, description="Share of the tokens to predict that the mask token hides."
    )
    random_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of the tokens to predict that a random token hides. "
        "What masked_share and random_share leave is shown as it is.",
    )
    whole_words: bool = Field(
        False,
        description="Take all pieces of a word together. A word begins after white space, so that "
        "scripts written without spaces are better off without.",
    )
    packed: bool = Field(
        True,
        description="true: samples are windows of the stream of documents; "
        "false: a sample is one document, or a part of one, filled up with padding.",
    )
    long_documents: LongDocuments | None = Field(
        None,
        description="With packed=false, a document longer than data.seq_length is split into parts of "
        "about equal length (split, which null means), or loses what is beyond it (cut).",
    )

    @model_validator(mode="after")
    def _check(self) -> Masking:
        # .9 + .1 is a little more than 1 in binary numbers.
        if self.masked_share + self.random_share > 1 + 1e-9:
            raise ValueError(
                f"masking.masked_share={self.masked_share:g} and masking.random_share={self.random_share:g} "
                "add up to more than 1: lower one of them"
            )
        if self.packed and self.long_documents is not None:
            raise ValueError(
                f"masking.long_documents={self.long_documents} has no effect with masking.packed=true: "
                "remove it or set masking.packed=false"
            )
        return self

    @property
    def long(self) -> LongDocuments:
        """What happens to long documents where a sample is one document."""
        return self.long_documents or "split"
