"""Predicted signal of a configured model at initialisation."""

from __future__ import annotations

from model.config import ModelConfig
from model.theory.propagation import LayerSignal, propagate
from model.theory.recursion import bidirectional_attention, causal_attention
from model.theory.step import Stream
from model.weights.bases import stack_sizes, word_correlation
from model.weights.init import standard_deviations


def predict(
    config: ModelConfig, seq_length: int, *, stream_correlation: float | None = None, causal: bool = True
) -> list[LayerSignal]:
    """Signals of every layer at initialisation, first to last, for any scheme and initialisation.

    seq_length: tokens a sequence.
    stream_correlation: token correlation of the embedding before dropout;
        null takes it from the tables' variances and `model.init.token_correlation`.
    causal: False predicts the same weights under unmasked attention.
    Causal gradients are those of late positions.
    Unmasked ones leave attention's share out too and are a lower bound.
    Padding, document masks and rotary embedding do not enter.
    Raises UserError where the vocabulary size is needed and unknown.
    """
    plan, init = config.depth_plan(), standard_deviations(config, seq_length)
    variance = init.word**2 + (init.position or 0.0) ** 2
    correlation = (
        word_correlation(config) * init.word**2 / variance
        if stream_correlation is None
        else stream_correlation
    )
    start = Stream(variance, variance * correlation, variance).dropped(config.hidden_dropout)
    law = causal_attention if causal else bidirectional_attention
    return propagate(
        plan.layers,
        [{role: std**2 for role, std in layer.items()} for layer in init.layers],
        stack_sizes(config),
        start.normed(plan.embedding_norm),
        attention=law(seq_length, config.attention_dropout),
        p=config.hidden_dropout,
    )
