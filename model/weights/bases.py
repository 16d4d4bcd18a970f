"""Base initialisations as data: the variance of every weight before a scheme's own gains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.depth.scheme import CROSS, LAYER_ROLES, WeightRole
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.families.family import Stack
from model.norms import NORMS
from model.theory.correlation import (
    grid_moments,
    sinusoid_moments,
    stream_correlation,
    zipf_correlation,
)
from model.theory.recursion import (
    AttentionLaw,
    PlannedLayer,
    Sizes,
    bidirectional_attention,
    causal_attention,
    cross_attention,
    deepscale_plan,
    published_attention,
)

LayerVariances = Mapping[WeightRole, float]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training sequence."""

    tokens: int
    """Of the stack that makes the logits."""
    source: int | None = None
    """Of an encoder under it."""

    def of(self, config: ModelConfig, stack: Stack) -> int:
        """Those that a stack reads. Raises ValueError where they are not known."""
        if stack is config.blueprint.stacks[-1]:
            return self.tokens
        if self.source is None:
            raise ValueError(f"a model of family {config.family} needs the length of its source")
        return self.source


@dataclass(frozen=True)
class Base:
    """A base initialisation."""

    layers: Callable[[ModelConfig, Lengths], list[LayerVariances]]
    """Variances of every layer by role, in the order of the stream."""
    word: Callable[[ModelConfig], float]
    """Variance of an entry of the table of words."""
    position: Callable[[ModelConfig], float]
    """Variance of an entry of the table of positions."""
    token_type: Callable[[ModelConfig], float]
    """Variance of an entry of the table of token types."""
    dense: Callable[[ModelConfig], float]
    """Variance of an entry of the dense layer of a head."""
    output: Callable[[ModelConfig], float]
    """Variance of an entry of an untied output projection."""
    unit_logits: bool
    """Whether tied logits are scaled to variance 1 (for hidden entries of variance 1)."""


def stack_sizes(config: ModelConfig) -> Sizes:
    """Widths of a stack's matrices, as `model.theory` takes them.

    config: with the sizes of the stack (`ModelConfig.of`).
    """
    return Sizes(
        config.hidden_size,
        config.num_attention_heads * config.kv_channels,
        config.ffn_size,
        config.activation,
        NORMS[config.normalization].centred,
    )


def word_correlation(config: ModelConfig) -> float:
    """Token correlation of the word table, or of what is made of patches, alone, in [0, 1).

    All mask tokens are one word, and another one than those of text.

    Raises UserError where Zipf's law needs an unknown vocabulary size.
    """
    if config.image is not None:
        return config.image.both_patches * (config.image.patch_correlation or 0.0)
    given = config.init.token_correlation
    if given == "zipf":
        if config.vocab_size is None:
            raise UserError(
                "model.init.token_correlation=zipf needs model.vocab_size, which is not known: "
                "give it, or the correlation as a number"
            )
        given = zipf_correlation(config.vocab_size)
    masked = config.init.mask_token_share or 0.0
    return given * (1 - masked) ** 2 + masked**2


def hears(config: ModelConfig, stack: Stack) -> bool:
    """Whether a stack reads frames of speech."""
    return config.speech is not None and stack is config.blueprint.stacks[0]


def input_correlation(config: ModelConfig, stack: Stack) -> float:
    """As `word_correlation`, of what a stack reads, which may be frames of speech."""
    if config.speech is not None and hears(config, stack):
        return config.speech.known_moments.correlation
    return word_correlation(config)


def attention_law(config: ModelConfig, stack: Stack, length: int) -> AttentionLaw:
    """Moments of self-attention over sequences of so many tokens, under the stack's mask."""
    law = causal_attention if stack.causal else bidirectional_attention
    return law(length, config.attention_dropout)


def entering_correlation(config: ModelConfig, stack: Stack, length: int) -> float:
    """Token correlation of what the tables of a stack give, before dropout.

    length: tokens of its sequences.
    """
    return stream_correlation(
        input_correlation(config, stack),
        positions=config.position in ("learned", "sinusoidal"),
        segments=config.token_types > 0,
        fixed=fixed_positions(config, length),
    )


def fixed_positions(config: ModelConfig, length: int) -> tuple[float, float] | None:
    """(variance, covariance of two) of sinusoidal positions as norms see them; None without.

    In units of the variance that a table of positions has.
    """
    if config.position != "sinusoidal":
        return None
    centred = NORMS[config.normalization].centred
    if config.image is None:
        return sinusoid_moments(length, config.hidden_size, centred, config.blueprint.sinusoid)
    own, shared = grid_moments(*config.image.grid, config.hidden_size, centred)
    # A class token has that variance too, and nothing in common with others.
    patches = config.image.patches / config.image.tokens
    return patches * own + 1 - patches, config.image.both_patches * shared


Rule = Callable[[ModelConfig, Stack], LayerVariances]
"""Variances of one layer, from the sizes of its stack."""


def _alike(rule: Rule) -> Callable[[ModelConfig, Lengths], list[LayerVariances]]:
    """All layers of a stack have the same, and cross-attention has what self-attention has."""

    def layers(config: ModelConfig, lengths: Lengths) -> list[LayerVariances]:
        found: list[LayerVariances] = []
        for stack in config.blueprint.stacks:
            own = config.of(stack)
            layer = dict(rule(own, stack))
            if stack.cross:
                layer |= {cross: layer[role] for role, cross in CROSS.items()}
            found += [layer] * own.num_layers
        return found

    return layers


def _xavier(config: ModelConfig, stack: Stack) -> LayerVariances:
    """2 / (fan_in + fan_out) of each matrix (Glorot & Bengio 2010), 1/h for square ones.

    Query, key, value, gate and up each count as a matrix.
    """
    hidden, inner, key_value, ffn = _widths(config)
    square, narrow, feed_forward = 2 / (hidden + inner), 2 / (hidden + key_value), 2 / (hidden + ffn)
    return {"q": square, "k": narrow, "v": narrow, "o": square, "fc1": feed_forward, "fc2": feed_forward}


def _fairseq(config: ModelConfig, stack: Stack) -> LayerVariances:
    """The B2T repository's.

    q, k, v Xavier with gain 1/sqrt(2), o Xavier,
    feed-forward 1 / (3 fan_in), which is nn.Linear's default.
    """
    hidden, inner, key_value, ffn = _widths(config)
    square, narrow = 1 / (hidden + inner), 1 / (hidden + key_value)
    return {
        "q": square,
        "k": narrow,
        "v": narrow,
        "o": 2 * square,
        "fc1": 1 / (3 * hidden),
        "fc2": 1 / (3 * ffn),
    }


def _normal(config: ModelConfig, stack: Stack) -> LayerVariances:
    """init.std everywhere, divided by sqrt(sublayers x layers) in the matrices that end a branch.

    Radford et al. 2019; Shoeybi et al. 2019. With transfer, std and layers are the base's.
    """
    variance = config.init.std**2 / config.wider
    layer = dict.fromkeys(LAYER_ROLES, variance)
    depth = config.transfer.base_layers or config.num_layers
    layer["o"] = layer["fc2"] = variance / (stack.sublayers * depth)
    return layer


def _deepscale(config: ModelConfig, lengths: Lengths) -> list[LayerVariances]:
    """Variance-preserving weights (Kedia et al. 2024), see `model.theory.recursion`.

    Stack after stack: what one leaves is what the next one's cross-attention reads.
    """
    found: list[LayerVariances] = []
    cross: AttentionLaw | None = None
    for stack in config.blueprint.stacks:
        own, length = config.of(stack), lengths.of(config, stack)
        law = attention_law(own, stack, length)
        planned = deepscale_plan(
            config.stack_plan(stack).layers,
            stack_sizes(own),
            entering_correlation(config, stack, length),
            config.hidden_dropout,
            law if config.init.causal_correction or not stack.causal else published_attention,
            cross if stack.cross else None,
        )
        found += [_by_role(layer) for layer in planned]
        cross = cross_attention(length, planned[-1].left, config.attention_dropout)
    return found


def _by_role(layer: PlannedLayer) -> LayerVariances:
    variances: dict[WeightRole, float] = {
        "q": layer.qk,
        "k": layer.qk,
        "v": layer.v,
        "o": layer.o,
        "fc1": layer.fc1,
        "fc2": layer.fc2,
    }
    if layer.cross is None:
        return variances
    return variances | {"cq": layer.qk, "ck": layer.qk, "cv": layer.cross, "co": layer.cross}


def _widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """(hidden, all query heads, all key heads, feed-forward)."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.kv_channels,
        config.groups * config.kv_channels,
        config.ffn_size,
    )


def _unit_sum(config: ModelConfig) -> float:
    """(1 - p) / tables (Kedia et al. 2024).

    The sum of the embedding tables then has unit variance after dropout.
    """
    tables = 1 + (config.position in ("learned", "sinusoidal")) + (config.token_types > 0)
    return (1 - config.hidden_dropout) / tables


def _inverse_width(config: ModelConfig) -> float:
    return 1 / config.base_width


def _one(config: ModelConfig) -> float:
    return 1.0


def _std(config: ModelConfig) -> float:
    return config.init.std**2


def sinusoid_scale(config: ModelConfig) -> float:
    """Factor on fixed sines and cosines, with which they have the variance of the base's positions.

    Base fairseq's is 1, as in its repository.
    """
    base = base_of(config)
    return 1.0 if base is BASES["fairseq"] else math.sqrt(2 * base.position(config))


def fixed_position_variance(config: ModelConfig) -> float:
    """Variance of an entry of fixed positions; 0 where there are none."""
    return sinusoid_scale(config) ** 2 / 2 if config.position == "sinusoidal" else 0.0


_XAVIER = Base(
    _alike(_xavier),
    word=_unit_sum,
    position=_unit_sum,
    token_type=_unit_sum,
    dense=_inverse_width,
    output=_inverse_width,
    unit_logits=True,
)
BASES: dict[str, Base] = {
    "xavier": _XAVIER,
    "deepscale": replace(_XAVIER, layers=_deepscale),
    # fairseq draws all tables from N(0, 1/h) and multiplies words, not learned positions,
    # by sqrt(h) on their way in.
    # A unit-variance table with 1/sqrt(h) on tied logits is the same function.
    "fairseq": Base(
        _alike(_fairseq),
        word=_one,
        position=_inverse_width,
        token_type=_inverse_width,
        dense=_inverse_width,
        output=_inverse_width,
        unit_logits=True,
    ),
    "normal": Base(
        _alike(_normal), word=_std, position=_std, token_type=_std, dense=_std, output=_std, unit_logits=False
    ),
}


def base_of(config: ModelConfig) -> Base:
    """The base in force: the scheme's own unless init.base names another."""
    return BASES[SCHEMES[config.scheme].base if config.init.base == "scheme" else config.init.base]
