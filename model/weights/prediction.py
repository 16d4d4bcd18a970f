"""Predicted signal of a configured model at initialisation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from model.config import ModelConfig
from model.depth.scheme import WeightRole
from model.theory.propagation import LayerSignal, propagate
from model.theory.recursion import bidirectional_attention, causal_attention
from model.theory.step import Stream
from model.weights.bases import (
    fixed_position_variance,
    position_correlation,
    stack_sizes,
    word_correlation,
)
from model.weights.init import standard_deviations
from model.weights.unigram import word_moments


def predict(
    config: ModelConfig,
    seq_length: int,
    *,
    coincidence: float | None = None,
    causal: bool | None = None,
    log_p_v: Tensor | None = None,
) -> list[LayerSignal]:
    """Signals of every layer at initialisation, first to last, for any scheme and initialisation.

    seq_length: tokens a sequence.
    coincidence: chance that two tokens are equal, or the correlation of what is made of patches;
    null takes the configuration's.
    causal: the mask of attention; null takes that of the model's stack.
    False predicts the same weights under unmasked attention.
    Causal gradients are those of late positions.
    Unmasked ones leave attention's share out too and are a lower bound.
    Padding, document masks and rotary embedding do not enter.
    log_p_v: log frequencies of the training tokens, for `model.init.unigram`.
    Raises UserError where the vocabulary size is needed and unknown.
    """
    plan, init = config.depth_plan(), standard_deviations(config, seq_length)
    words, shared = word_moments(config, init.word**2, init.logit_scale, log_p_v)
    types = (init.token_type or 0.0) ** 2
    fixed = fixed_position_variance(config)
    variance = words + (init.position or 0.0) ** 2 + fixed + types
    same = word_correlation(config) if coincidence is None else coincidence
    shared = same * shared + (fixed and fixed * position_correlation(config, seq_length))
    # Two tokens of a sample that is cut at a uniform place are of one type in 2 of 3 cases.
    start = Stream(variance, shared + 2 / 3 * types, variance).dropped(config.hidden_dropout)
    if causal is None:
        causal = config.stack.causal
    law = causal_attention if causal else bidirectional_attention
    return propagate(
        plan.layers,
        [_variances(layer, config.score_scale) for layer in init.layers],
        stack_sizes(config),
        start.normed(plan.embedding_norm),
        attention=law(seq_length, config.attention_dropout),
        p=config.hidden_dropout,
    )


def _variances(deviations: Mapping[WeightRole, float], score_scale: float) -> Mapping[WeightRole, float]:
    """Of a layer's weights by role, with the factor on attention's scores as one on the queries."""
    variances = {role: std**2 for role, std in deviations.items()}
    return {**variances, "q": variances["q"] * score_scale**2}
