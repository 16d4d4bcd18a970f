"""Sections of a model's configuration: initial weights, and what carries over between sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LAYERS = 10_000
"""Layers of the deepest model."""


class Strict(BaseModel):
    """Base of every configuration section.

    Unknown keys and infinite numbers are refused, and values are never coerced across types. Every
    number has bounds that are far beyond any use, so that a typing mistake is told at once.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


class InitConfig(Strict):
    """Weight initialisation.

    Every weight's standard deviation follows from the scheme and these choices
    (`model/weights/init.py`).
    """

    base: Literal["scheme", "xavier", "normal", "fairseq"] = Field(
        "scheme",
        description="Weight variances before the scheme's own gains. scheme: the scheme's own "
        "(deepscalelm_*: the published ones; b2t: fairseq; others: xavier,"
        " which is Fathom's choice for pre-LN and its relatives). "
        "xavier: 2/(fan_in+fan_out) per matrix, unit-variance embeddings. "
        "normal: `std` everywhere, divided by sqrt(2 x layers) for output projections (GPT-2, Megatron). "
        "fairseq: the variances of the B2T repository, drawn from a normal distribution, with biases at 0.",
    )
    std: float = Field(
        0.02, ge=1e-12, le=100, description="Standard deviation of base `normal`; no other base reads it."
    )
    token_correlation: Annotated[float, Field(ge=0, lt=1)] | Literal["zipf"] = Field(
        "zipf",
        description="Token correlation r0 of the word embedding that DeepScaleLM's recursion starts from: "
        "a number (`fathom data prepare` prints the one of your corpus), "
        "or `zipf` for the value Zipf's law gives for the vocabulary size.",
    )
    mask_token_share: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the model's input that is the mask token, which DeepScaleLM's recursion "
        "counts as one word; null: what the task hides, or none.",
    )
    causal_correction: bool = Field(
        True,
        description="DeepScaleLM: finite-length correction of attention's gain under a causal mask; "
        "false: the published gain, which overshoots in a decoder.",
    )
    unigram: bool = Field(
        False,
        description="Start the logits at the log frequencies of the training tokens, "
        "so that no layer has to learn them. "
        "With LayerNorm and tied embeddings these are initial values only, without a new parameter; "
        "other models need model.logit_bias=true.",
    )

    @model_validator(mode="after")
    def _std_needs_normal(self) -> InitConfig:
        if "std" in self.model_fields_set and self.base != "normal" and self.std != 0.02:
            raise ValueError(
                f"model.init.std={self.std} has no effect with model.init.base={self.base}: "
                "set model.init.base=normal or remove model.init.std"
            )
        return self


class TransferConfig(Strict):
    """Settings that carry over between sizes: tuned on a small base, used on a large model.

    Depth and width are measured against the base; at the base sizes nothing changes.
    """

    method: Literal["none", "completep"] = Field(
        "none",
        description="completep: factors on branches, attention, logits, weights, rates, epsilons and decay "
        "by depth and width, so that the best rate stays where it is (Dey et al. 2025).",
    )
    base_layers: int | None = Field(
        None, ge=1, le=LAYERS, description="Layers of the base; null: as many as the model has."
    )
    base_hidden: int | None = Field(
        None, ge=1, le=1 << 20, description="Width of the base; null: the model's."
    )
    base_head_dim: int | None = Field(
        None, ge=1, le=1 << 16, description="Width of one head of the base; null: the model's."
    )
    alpha: float = Field(
        1.0,
        ge=0.5,
        le=1,
        description="Branches are multiplied by (layers / base layers) to the power of -alpha.",
    )

    @model_validator(mode="after")
    def _check(self) -> TransferConfig:
        bases = ("base_layers", "base_hidden", "base_head_dim")
        given = [name for name in bases if getattr(self, name) is not None]
        if self.method == "none":
            unread = [*given, *(["alpha"] if self.alpha != 1 else [])]
            if unread:
                raise ValueError(
                    f"model.transfer.{unread[0]}={getattr(self, unread[0])} has no effect with "
                    "model.transfer.method=none: remove it or set method=completep"
                )
        elif not given:
            raise ValueError(
                f"model.transfer.method={self.method} has no effect without a base: "
                "give model.transfer.base_layers or model.transfer.base_hidden"
            )
        elif self.alpha != 1 and self.base_layers is None:
            raise ValueError(
                f"model.transfer.alpha={self.alpha} has no effect without model.transfer.base_layers: "
                "give that or remove alpha"
            )
        return self
