"""Predicted signal of a configured model at initialisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from model.config import ModelConfig
from model.depth.scheme import WeightRole
from model.families.family import Stack
from model.theory.propagation import LayerSignal, Source, propagate
from model.theory.recursion import AttentionLaw, bidirectional_attention, causal_attention, cross_attention
from model.theory.step import Stream
from model.weights.bases import (
    Lengths,
    fixed_position_variance,
    fixed_positions,
    hears,
    input_correlation,
    stack_sizes,
)
from model.weights.init import Deviations, standard_deviations
from model.weights.unigram import last_bias_moments, word_moments


def predict(
    config: ModelConfig,
    seq_length: int,
    *,
    source_length: int | None = None,
    coincidence: float | Sequence[float] | None = None,
    seen: Sequence[int | None] | None = None,
    causal: bool | None = None,
    log_p_v: Tensor | None = None,
    one_gradient: bool = False,
) -> list[LayerSignal]:
    """Signals of every layer at initialisation, stack after stack, for any scheme and weights.

    seq_length: tokens a sequence. source_length: the same of an encoder under a decoder.
    coincidence: chance that two tokens are equal, or the correlation of what is made of patches;
    null takes the configuration's; a sequence has one for each stack.
    seen: tokens that see each other, of each stack, where a sequence holds several texts.
    causal: the mask of self-attention; null takes those of the model's stacks.
    False predicts the same weights under unmasked attention.
    Causal gradients are those of late positions.
    Unmasked ones leave attention's share out too and are a lower bound.
    An encoder's are relative to its own last layer.
    one_gradient: all tokens of a stack without a causal mask have the same gradient.
    It is nearly so where a decoder attends to them.
    Attention hands it down whole, so it is an upper bound.
    Padding, the spread of texts' lengths and rotary embedding do not enter.
    log_p_v: log frequencies of the training tokens, for `model.init.unigram`.
    Raises UserError where the vocabulary size is needed and unknown.
    """
    init = standard_deviations(config, seq_length, source_length)
    lengths = Lengths(seq_length, source_length)
    deviations = iter(init.layers)
    found: list[LayerSignal] = []
    source: Source | None = None
    for place, stack in enumerate(config.blueprint.stacks):
        own, plan = config.of(stack), config.stack_plan(stack)
        length = (seen and seen[place]) or lengths.of(config, stack)
        masked = stack.causal if causal is None else causal
        law = causal_attention if masked else bidirectional_attention
        equal = coincidence[place] if isinstance(coincidence, Sequence) else coincidence
        start = _start(config, stack, init, length, equal, log_p_v)
        signals = propagate(
            plan.layers,
            [_variances(next(deviations), own.score_scale) for _ in plan.layers],
            stack_sizes(own),
            start.normed(plan.embedding_norm),
            attention=_attention(law(length, config.attention_dropout), one_gradient and not masked),
            p=config.hidden_dropout,
            source=source if stack.cross else None,
        )
        found += signals
        last = signals[-1]
        covariance = last.token_correlation * last.forward_variance
        source = Source(
            Stream(last.forward_variance, covariance, last.forward_variance),
            cross_attention(length, last.token_correlation, config.attention_dropout),
        )
    variance, square = last_bias_moments(config, log_p_v)
    if square:
        found[-1] = _shifted(found[-1], variance, square)
    return found


def _shifted(signal: LayerSignal, variance: float, square: float) -> LayerSignal:
    """With a vector added to every token's. variance, square: of its entries, square above 0."""
    shared = signal.token_correlation * signal.forward_variance + square
    return replace(
        signal,
        forward_variance=signal.forward_variance + variance,
        token_correlation=shared / (signal.forward_variance + square),
    )


def _attention(law: AttentionLaw, one_gradient: bool) -> AttentionLaw:
    """With the gradient that values pass on where all tokens have the same (derived).

    Each value gets the mean over queries of what its readers get, and that is the gradient itself.
    """
    if not one_gradient:
        return law
    return lambda r, scores: replace(law(r, scores), late_value=1.0)


def _start(
    config: ModelConfig,
    stack: Stack,
    init: Deviations,
    length: int,
    coincidence: float | None,
    log_p_v: Tensor | None,
) -> Stream:
    """What a stack's tables give, after dropout. Arguments as in `predict`."""
    words, shared = word_moments(config, init.word**2, init.logit_scale, log_p_v)
    types, positions = (init.token_type or 0.0) ** 2, (init.position or 0.0) ** 2
    if hears(config, stack):
        words = shared = init.word**2
    same = input_correlation(config, stack) if coincidence is None else coincidence
    # Two tokens of a sample that is cut at a uniform place are of one type in 2 of 3 cases.
    covariance = same * shared + 2 / 3 * types
    fixed = fixed_positions(config, length)
    if fixed is not None:
        drawn = fixed_position_variance(config)
        positions = drawn * fixed[0]
        covariance += drawn * fixed[1]
    variance = words + positions + types
    return Stream(variance, covariance, variance).dropped(config.hidden_dropout)


def _variances(deviations: Mapping[WeightRole, float], score_scale: float) -> Mapping[WeightRole, float]:
    """Of a layer's weights by role, with the factor on attention's scores as one on the queries."""
    return {
        role: std**2 * (score_scale**2 if role in ("q", "cq") else 1.0) for role, std in deviations.items()
    }
