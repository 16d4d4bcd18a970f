"""Sections of a model's configuration: initial weights, rotation, and transfer between sizes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.words import written

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

    def check_read(self, scheme: str, *, recursion: bool) -> None:
        """Refuses options of DeepScaleLM's recursion where another base is in force.

        Defaults pass: a written-out configuration holds them.
        """
        if recursion:
            if self.token_correlation == 0 and not self.causal_correction:
                raise ValueError(
                    "model.init.token_correlation=0 gives infinite weights with "
                    "model.init.causal_correction=false: give a positive number"
                )
            return
        for name in ("token_correlation", "mask_token_share", "causal_correction"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(
                    f"model.init.{name}={written(value)} has no effect with model.scheme={scheme} "
                    f"and model.init.base={self.base}: remove it "
                    f"(its default is {written(default)}), or choose deepscalelm_pre_ln or "
                    "deepscalelm_post_ln with model.init.base=scheme"
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
        None,
        ge=1,
        le=LAYERS,
        description="Layers of the base, of its decoder where there is an encoder too; "
        "null: as many as the model has.",
    )
    base_encoder_layers: int | None = Field(
        None,
        ge=1,
        le=LAYERS,
        description="Layers of the base's encoder under a decoder; null: as many as base_layers.",
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
        bases = ("base_layers", "base_encoder_layers", "base_hidden", "base_head_dim")
        given = [name for name in bases if getattr(self, name) is not None]
        if self.method == "none":
            unread = [*given, *(["alpha"] if self.alpha != 1 else [])]
            if unread:
                raise ValueError(
                    f"model.transfer.{unread[0]}={getattr(self, unread[0])} has no effect with "
                    "model.transfer.method=none: remove it or set model.transfer.method=completep"
                )
        elif not given:
            raise ValueError(
                f"model.transfer.method={self.method} has no effect without a base: "
                "give model.transfer.base_layers or model.transfer.base_hidden"
            )
        elif self.alpha != 1 and self.base_layers is None and self.base_encoder_layers is None:
            raise ValueError(
                f"model.transfer.alpha={self.alpha} has no effect without model.transfer.base_layers: "
                "give that or remove alpha"
            )
        return self

    def of_encoder(self) -> TransferConfig:
        """The section as an encoder under a decoder reads it: by its own depth and its base's."""
        return self.model_copy(update={"base_layers": self.base_encoder_layers or self.base_layers})


class AttentionConfig(Strict):
    """What keeps attention's scores in bounds, and which of its parts have biases.

    Theory and initial weights are those of attention without a norm or cap: at initialisation
    attention under a causal mask hardly depends on its scores.
    """

    qk_norm: bool = Field(
        False,
        description="A norm, with a gain of its own, on every head's queries and keys before they turn "
        "(Henry et al. 2020; as in Qwen 3): scores stay bounded however large the projections grow.",
    )
    soft_cap: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Scores s become cap tanh(s / cap) (Gemma 2: 50). No fused kernel has it: memory and "
        "time grow with the square of the length; null: none.",
    )
    qkv_bias: bool = Field(
        False,
        description="Biases of queries, keys and values where model.bias=false leaves no others (Qwen 2).",
    )

    def check(self, *, bias: bool, crossed: str | None) -> None:
        """Raises ValueError for what has no effect, or no place.

        bias: `model.bias`. crossed: the family, where it has cross-attention.
        """
        changed = sorted(self.model_dump(exclude_defaults=True))
        if crossed and changed:
            raise ValueError(
                f"model.attention.{changed[0]} does not combine with model.family={crossed}: "
                "cross-attention has no such thing; remove it"
            )
        if self.qkv_bias and bias:
            raise ValueError(
                "model.attention.qkv_bias=true has no effect with model.bias=true, which gives all linear "
                "layers biases: remove it or set model.bias=false"
            )


class RotaryConfig(Strict):
    """Rotary embedding beside its base: how much of a head turns, and how fast.

    Scaling stretches frequencies that were learned on `original_positions` over longer texts;
    `model/rotary.py` has the equations.
    """

    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a head that turns, its first entries; the rest has none (GPT-NeoX).",
    )
    scaling: Literal["none", "linear", "llama3", "yarn"] = Field(
        "none",
        description="linear: all frequencies divided by the factor (Chen et al. 2023). "
        "llama3: only slow ones (Llama 3.1). yarn: slow ones, by their turns over the "
        "original length, and hotter scores (Peng et al. 2023). A fixed NTK scaling is another rotary_base.",
    )
    factor: float = Field(1.0, ge=1, le=1 << 20, description="How much longer texts become.")
    original_positions: int | None = Field(
        None, ge=1, le=1 << 26, description="Tokens of the longest text before scaling (llama3, yarn)."
    )
    low_frequency: float = Field(
        1.0, gt=0, le=1 << 20, description="llama3: fewer turns over the original length are slow."
    )
    high_frequency: float = Field(
        4.0, gt=0, le=1 << 20, description="llama3: more turns over the original length are left alone."
    )
    beta_fast: float = Field(
        32.0, gt=0, le=1 << 20, description="yarn: more turns over the original length are left alone."
    )
    beta_slow: float = Field(
        1.0, gt=0, le=1 << 20, description="yarn: fewer turns over the original length are slow."
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        le=100,
        description="yarn: factor on turned queries and keys; null: 0.1 ln(factor) + 1.",
    )
    truncate: bool = Field(
        True, description="yarn: both limits are rounded outwards to whole entries of a head."
    )

    @model_validator(mode="after")
    def _check(self) -> RotaryConfig:
        read = ROTARY_SCALINGS[self.scaling]
        fields = type(self).model_fields
        for name in fields:
            value = getattr(self, name)
            if name not in ("share", "scaling", *read) and value != fields[name].default:
                raise ValueError(
                    f"model.rotary.{name}={written(value)} has no effect with "
                    f"model.rotary.scaling={self.scaling}: remove it or choose another scaling"
                )
        for name, missing in (
            ("factor", self.factor == 1),
            ("original_positions", self.original_positions is None),
        ):
            if name in read and missing:
                raise ValueError(f"model.rotary.scaling={self.scaling} needs model.rotary.{name}: give it")
        for low, high in (("low_frequency", "high_frequency"), ("beta_slow", "beta_fast")):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"model.rotary.{low}={getattr(self, low)} must be below "
                    f"model.rotary.{high}={getattr(self, high)}"
                )
        return self

    def check(self, position: str, head_width: int, base: int | None) -> None:
        """Raises ValueError where it does not fit the positions and the width of heads.

        base: `model.rotary_base`, None where that has its default.
        """
        if position != "rotary":
            changed = [f"rotary.{name}" for name in sorted(self.model_dump(exclude_defaults=True))]
            if base is not None:
                changed = [f"rotary_base={base}", *changed]
            if changed:
                raise ValueError(
                    f"model.{changed[0]} has no effect with model.position={position}: "
                    "remove it or set model.position=rotary"
                )
            return
        if head_width % 2:
            raise ValueError(
                f"model.position=rotary needs an even head width, got {head_width}: set model.head_dim"
            )
        width = self.width(head_width)
        if width < 2 or width % 2:
            raise ValueError(
                f"model.rotary.share={self.share} turns {width} of {head_width} entries of a head: "
                "give one that makes an even number"
            )

    def width(self, head_width: int) -> int:
        """Entries of a head that turn."""
        return int(head_width * self.share)


ROTARY_SCALINGS: dict[str, tuple[str, ...]] = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_positions", "low_frequency", "high_frequency"),
    "yarn": ("factor", "original_positions", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
"""What each kind of scaling reads."""
