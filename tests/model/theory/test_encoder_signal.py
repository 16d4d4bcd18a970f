"""DeepScaleLM's encoder keeps the variance of its stream through 192 layers.

Width 128, 4 heads, 2 sequences of 128 Zipf tokens a seed (vocabulary 4096), of which 12 % are the
mask token. Dropout 0.1, ReLU.
"""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.theory.correlation import zipf_correlation
from model.weights.bases import word_correlation
from model.weights.init import initialize_
from model.weights.prediction import predict
from parallel.launch.one_process import single_process
from pretrain.probe.measure import zipf_tokens

VOCAB, LENGTH, BATCH, MASKED, LAYERS = 4096, 128, 2, 0.12, 192


def encoder(token_types: int) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "bert",
            "scheme": "deepscalelm_pre_ln",
            "num_layers": LAYERS,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "max_position_embeddings": LENGTH,
            "token_types": token_types,
            "activation": "relu",
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "init": {"mask_token_share": MASKED},
        }
    )


def variances(model: ModelConfig, seed: int) -> list[float]:
    """Of the stream after every layer, in training."""
    topology = single_process()
    core = transformer_config(model, dtype=torch.float32, on_cpu=True, **topology.core_fields())
    chunk = LanguageModel(model, core, seq_length=LENGTH).train()
    initialize_(
        ((one.name, one.parameter, one.shard) for one in named_parameters(chunk, 0, 1)), model, LENGTH, seed
    )
    torch.manual_seed(seed)
    tokens = zipf_tokens(VOCAB, BATCH, LENGTH, seed)
    batch = {"tokens": tokens.masked_fill(torch.rand(tokens.shape) < MASKED, VOCAB - 1)}
    if model.token_types:
        cuts = torch.randint(0, LENGTH + 1, (BATCH, 1))
        batch["token_types"] = (torch.arange(LENGTH) >= cuts).long()
    found: list[float] = []
    for layer in chunk.decoder.layers:
        unit = layer.plan.leaving
        layer.register_forward_hook(
            lambda module, args, output, unit=unit: found.append(float(output[0].double().var()) * unit**2)
        )
    with torch.no_grad():
        chunk(batch)
    return found


@pytest.mark.parametrize("token_types", [0, 2], ids=["2 tables", "3 tables"])
def test_variance_stays_one_through_192_layers(token_types: int) -> None:
    model = encoder(token_types)
    runs = torch.tensor([variances(model, seed) for seed in range(4)])
    mean = runs.mean(0)
    assert mean.shape == (LAYERS,)
    assert float(mean.min()) > 0.9
    assert float(mean.max()) < 1.1
    predicted = torch.tensor([layer.forward_variance for layer in predict(model, LENGTH)])
    assert float((predicted - 1).abs().max()) < 1e-6


def test_masks_are_one_word_among_zipfs() -> None:
    assert word_correlation(encoder(0)) == pytest.approx(zipf_correlation(VOCAB) * 0.88**2 + 0.12**2)
