"""Small models, what the probe measures of them, and measurements that are changed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from parallel.launch.one_process import single_process
from pretrain.config.scheme_choice import parse_variant
from pretrain.data.samples import next_tokens
from pretrain.probe.measure import probe, zipf_log_frequencies, zipf_tokens
from pretrain.probe.records import Probe
from pretrain.tasks.causal_lm import CAUSAL_LM

LENGTH = 12


def model(scheme: str = "pre_ln", layers: int = 3, **more: Any) -> ModelConfig:
    fields = {
        "num_layers": layers,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "vocab_size": 50,
        "max_position_embeddings": LENGTH,
    }
    return parse_variant(scheme).apply(ModelConfig.model_validate({**fields, **more}))


def measured(config: ModelConfig, seeds: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float64) -> Probe:
    return probe(
        config,
        single_process(),
        seq_length=LENGTH,
        task=CAUSAL_LM,
        batches=lambda seed: next_tokens(zipf_tokens(50, 2, LENGTH + 1, seed)),
        seeds=seeds,
        dtype=dtype,
        source="synthetic",
        log_p_v=zipf_log_frequencies(50) if config.init.unigram else None,
    )


def changed(base: Probe, index: int, **fields: Any) -> Probe:
    layers = list(base.layers)
    layers[index] = replace(layers[index], **fields)
    return replace(base, layers=tuple(layers))


def plain_correlation(x_sbh: Tensor, texts_sb: Tensor | None = None) -> float:
    """Mean product of two tokens of a text over the mean square of one, from the mean entry on."""
    texts_sb = torch.ones(x_sbh.shape[:2]) if texts_sb is None else texts_sb
    x = x_sbh.detach() - x_sbh[texts_sb > 0].mean().detach()
    products = [
        float(x[one, row] @ x[two, row])
        for row in range(x.shape[1])
        for one in range(len(x))
        for two in range(len(x))
        if one != two and texts_sb[one, row] == texts_sb[two, row] > 0
    ]
    return sum(products) / len(products) / float(x[texts_sb > 0].square().sum(-1).mean())
