"""Base initialisations as data: the variance of every weight before a scheme's own gains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.depth.scheme import LAYER_ROLES, WeightRole
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.norms import NORMS
from model.theory.correlation import stream_correlation, zipf_correlation
from model.theory.recursion import (
    AttentionLaw,
    Sizes,
    bidirectional_attention,
    causal_attention,
    deepscale_plan,
    published_attention,
)

LayerVariances = Mapping[WeightRole, float]


@dataclass(frozen=True)
class Base:
    """A base initialisation."""

    layers: Callable[[ModelConfig, int], list[LayerVariances]]
    """Variances of every layer by role, from the configuration and the sequence length."""
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
    """Widths of the stack's matrices, as `model.theory` takes them."""
    return Sizes(
        config.hidden_size,
        config.num_attention_heads * config.kv_channels,
        config.ffn_size,
        config.activation,
        NORMS[config.normalization].centred,
    )


def word_correlation(config: ModelConfig) -> float:
    """Token correlation of the word table alone, in [0, 1).

    All mask tokens are one word, and another one than those of text.

    Raises UserError where Zipf's law needs an unknown vocabulary size.
    """
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


def attention_law(config: ModelConfig, seq_length: int) -> AttentionLaw:
    """Moments of attention over sequences of so many tokens, under the stack's mask."""
    law = causal_attention if config.stack.causal else bidirectional_attention
    return law(seq_length, config.attention_dropout)


def _xavier(config: ModelConfig, seq_length: int) -> list[LayerVariances]:
    """2 / (fan_in + fan_out) of each matrix (Glorot & Bengio 2010), 1/h for square ones.

    Query, key, value, gate and up each count as a matrix.
    """
    hidden, inner, key_value, ffn = _widths(config)
    square, narrow, feed_forward = 2 / (hidden + inner), 2 / (hidden + key_value), 2 / (hidden + ffn)
    return [
        {"q": square, "k": narrow, "v": narrow, "o": square, "fc1": feed_forward, "fc2": feed_forward}
    ] * config.num_layers


def _fairseq(config: ModelConfig, seq_length: int) -> list[LayerVariances]:
    """The B2T repository's.

    q, k, v Xavier with gain 1/sqrt(2), o Xavier,
    feed-forward 1 / (3 fan_in), which is nn.Linear's default.
    """
    hidden, inner, key_value, ffn = _widths(config)
    square, narrow = 1 / (hidden + inner), 1 / (hidden + key_value)
    return [
        {
            "q": square,
            "k": narrow,
            "v": narrow,
            "o": 2 * square,
            "fc1": 1 / (3 * hidden),
            "fc2": 1 / (3 * ffn),
        }
    ] * config.num_layers


def _normal(config: ModelConfig, seq_length: int) -> list[LayerVariances]:
    """init.std everywhere, divided by sqrt(2 x layers) in the matrices that end a branch.

    Radford et al. 2019; Shoeybi et al. 2019. With transfer, std and layers are the base's.
    """
    variance = config.init.std**2 / config.wider
    layer = dict.fromkeys(LAYER_ROLES, variance)
    layer["o"] = layer["fc2"] = variance / (2 * (config.transfer.base_layers or config.num_layers))
    return [layer] * config.num_layers


def _deepscale(config: ModelConfig, seq_length: int) -> list[LayerVariances]:
    """Variance-preserving weights (Kedia et al. 2024), see `model.theory.recursion`."""
    attention = attention_law(config, seq_length) if config.init.causal_correction else published_attention
    plan = config.depth_plan().layers
    correlation = stream_correlation(
        word_correlation(config), positions=config.position == "learned", segments=config.token_types > 0
    )
    planned = deepscale_plan(plan, stack_sizes(config), correlation, config.hidden_dropout, attention)
    return [
        {"q": layer.qk, "k": layer.qk, "v": layer.v, "o": layer.o, "fc1": layer.fc1, "fc2": layer.fc2}
        for layer in planned
    ]


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
    tables = 1 + (config.position == "learned") + (config.token_types > 0)
    return (1 - config.hidden_dropout) / tables


def _inverse_width(config: ModelConfig) -> float:
    return 1 / config.base_width


def _one(config: ModelConfig) -> float:
    return 1.0


def _std(config: ModelConfig) -> float:
    return config.init.std**2


_XAVIER = Base(
    _xavier,
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
        _fairseq,
        word=_one,
        position=_inverse_width,
        token_type=_inverse_width,
        dense=_inverse_width,
        output=_inverse_width,
        unit_logits=True,
    ),
    "normal": Base(
        _normal, word=_std, position=_std, token_type=_std, dense=_std, output=_std, unit_logits=False
    ),
}


def base_of(config: ModelConfig) -> Base:
    """The base in force: the scheme's own unless init.base names another."""
    return BASES[SCHEMES[config.scheme].base if config.init.base == "scheme" else config.init.base]
