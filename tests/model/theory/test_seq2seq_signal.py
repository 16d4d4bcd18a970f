"""What an encoder and the decoder over it make of a signal at the start: planned and measured.

Two sequences of 64 Zipf tokens a seed on either side. Dropout 0.1, ReLU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers.layer import DepthLayer
from model.layers.seam import EncoderLayer
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import initialize_, standard_deviations
from model.weights.prediction import predict
from parallel.launch.one_process import single_process
from pretrain.probe.measure import zipf_tokens
from tests.reference import oracle

VOCAB, LENGTH, BATCH = 4096, 64, 2


def model_of(scheme: str, encoder: int, decoder: int, width: int = 128, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "seq2seq",
            "scheme": scheme,
            "num_layers": decoder,
            "encoder_layers": encoder,
            "hidden_size": width,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "activation": "relu",
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            **changes,
        }
    )


def measured(model: ModelConfig, seed: int) -> tuple[list[float], list[float]]:
    """Variance and token correlation of each stack's stream after its layers, in training.

    As norms see the stream: without the mean over each token's entries.
    """
    topology = single_process()
    core = transformer_config(model, dtype=torch.float32, on_cpu=True, **topology.core_fields())
    chunk = LanguageModel(model, core, seq_length=LENGTH, source_length=LENGTH).train()
    named = ((one.name, one.parameter, one.shard) for one in named_parameters(chunk, 0, 1))
    initialize_(named, model, LENGTH, seed, source_length=LENGTH)
    torch.manual_seed(seed)
    variances, correlations = [], []

    def look(layer: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(layer, DepthLayer)
        stream = output[int(isinstance(layer, EncoderLayer))].double() * layer.plan.leaving
        stream = stream - stream.mean(-1, keepdim=True)
        variances.append(float(stream.square().mean()))
        correlations.append(oracle.token_correlation(stream.transpose(0, 1)))

    for layer in chunk.decoder.layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        source, tokens = (zipf_tokens(VOCAB, BATCH, LENGTH, 2 * seed + side) for side in (0, 1))
        chunk({"source": source, "tokens": tokens})
    return variances, correlations


@pytest.mark.parametrize("layers", [18, 48, pytest.param(96, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["deepscalelm_pre_ln", "deepscalelm_post_ln"])
def test_variance_stays_one_in_both_stacks(scheme: str, layers: int) -> None:
    """The mean of eight seeds: one scatters by 0.1, as cross-attention adds one vector a sample."""
    model = model_of(scheme, layers, layers)
    predicted = [signal.forward_variance for signal in predict(model, LENGTH, source_length=LENGTH)]
    assert predicted == pytest.approx([1.0] * 2 * layers, abs=1e-6)
    normed = scheme == "deepscalelm_post_ln"
    mean = torch.tensor([measured(model, seed)[0] for seed in range(1 if normed else 8)]).mean(0)
    assert mean.shape == (2 * layers,)
    assert mean.tolist() == pytest.approx([1.0] * 2 * layers, abs=1e-4 if normed else 0.08)


# Layers of each stack, correlation of what the encoder gives, d x variance of values: of
# cross-attention, of the decoder's own in its first and last layer; correlation at its end, beta^2.
CONSTANTS = [
    (6, 0.5983, 1.2159, 2.1657, 1.1974, 0.6400, 0.11111),
    (18, 0.6007, 1.2137, 2.1657, 1.1637, 0.6406, 0.03704),
    (96, 0.6009, 1.2134, 2.1657, 1.1526, 0.6406, 0.00694),
]


@pytest.mark.parametrize(("layers", "source", "cross", "first", "last", "out", "beta2"), CONSTANTS)
def test_constants_of_deepscalelm(
    layers: int, source: float, cross: float, first: float, last: float, out: float, beta2: float
) -> None:
    model = model_of("deepscalelm_pre_ln", layers, layers, vocab_size=32000)
    planned = standard_deviations(model, LENGTH, LENGTH).layers[layers:]
    signals = predict(model, LENGTH, source_length=LENGTH)
    assert {round(128 * layer["cv"] ** 2, 4) for layer in planned} == {cross}
    assert {layer["co"] for layer in planned} == {planned[0]["cv"]}
    assert [128 * planned[index]["v"] ** 2 for index in (0, -1)] == pytest.approx([first, last], abs=5e-5)
    found = [signals[index].token_correlation for index in (layers - 1, -1)]
    assert found == pytest.approx([source, out], abs=5e-5)
    place = model.placed_layers()[-1]
    assert place.plan.cross.branch_scale**2 == pytest.approx(beta2, abs=5e-6)


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("deepscalelm_pre_ln", {"scheme_options": {"unscaled_cross": True}}),
        ("deepscalelm_pre_ln", {"position": "sinusoidal"}),
        ("pre_ln", {}),
        ("b2t", {}),
        ("deepnorm", {"position": "sinusoidal"}),
        ("peri_ln", {}),
        ("subln", {}),
    ],
)
def test_prediction_against_measurement(scheme: str, changes: dict[str, Any]) -> None:
    model = model_of(scheme, 8, 10, **changes)
    runs = [measured(model, seed) for seed in range(3)]
    variances, correlations = (torch.tensor([run[part] for run in runs]).mean(0) for part in (0, 1))
    signals = predict(model, LENGTH, source_length=LENGTH)
    assert [signal.layer for signal in signals] == [*range(1, 9), *range(1, 11)]
    assert [signal.cross_variance is None for signal in signals] == [True] * 8 + [False] * 10
    for index, signal in enumerate(signals):
        assert float(variances[index]) == pytest.approx(signal.forward_variance, rel=0.15), index
        assert float(correlations[index]) == pytest.approx(signal.token_correlation, abs=0.08), index


def test_unscaled_cross_attention_grows_with_depth() -> None:
    """As in the published code: the decoder's variance rises by a whole branch a layer."""
    model = model_of("deepscalelm_pre_ln", 18, 18, scheme_options={"unscaled_cross": True})
    signals = predict(model, LENGTH, source_length=LENGTH)
    assert signals[17].forward_variance == pytest.approx(1.0, abs=1e-6)
    assert signals[-1].forward_variance > 5
