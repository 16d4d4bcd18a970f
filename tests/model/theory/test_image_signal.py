"""DeepScaleLM keeps the variance of a stream of patches through 192 layers.

Width 128, 4 heads, images of 64 patches, of which two have the correlation 0.3. Dropout 0.1, ReLU.
"""

from __future__ import annotations

import pytest
import torch

from model.config import ModelConfig
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.theory.correlation import grid_correlation
from model.weights.init import initialize_
from model.weights.prediction import predict
from parallel.launch.one_process import single_process
from tests.reference.vit import sines

LAYERS, CORRELATION, COUNT = 192, 0.3, 8
SHAPE = {"height": 16, "channels": 3, "patch": 2, "patch_correlation": CORRELATION}


def classifier(position: str, pool: str, correlation: float = CORRELATION) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "vit",
            "scheme": "deepscalelm_pre_ln",
            "num_layers": LAYERS,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "vocab_size": 10,
            "tie_embeddings": False,
            "activation": "relu",
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "position": position,
            "image": SHAPE | {"pool": pool, "patch_correlation": correlation},
        }
    )


def images(seed: int) -> torch.Tensor:
    """Patches that share a part, repeated over the image."""
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(COUNT, 3, 2, 2, generator=generator)
    shared = (one / one.square().mean((1, 2, 3), keepdim=True).sqrt()).repeat(1, 1, 8, 8)
    own = torch.randn(COUNT, 3, 16, 16, generator=generator)
    return CORRELATION**0.5 * shared + (1 - CORRELATION) ** 0.5 * own


def signal(model: ModelConfig, seed: int) -> tuple[list[float], float]:
    """Mean square of the stream after every layer, in training; correlation of what enters it."""
    topology = single_process()
    assert model.image is not None
    length = model.image.tokens
    core = transformer_config(model, dtype=torch.float32, on_cpu=True, **topology.core_fields())
    chunk = LanguageModel(model, core, seq_length=length).train()
    named = [(one.name, one.parameter, one.shard) for one in named_parameters(chunk, 0, 1)]
    initialize_(named, model, length, seed)
    torch.manual_seed(seed)
    found: list[float] = []
    for layer in chunk.decoder.layers:
        unit = layer.plan.leaving
        layer.register_forward_hook(
            lambda module, args, output, unit=unit: found.append(
                float(output[0].double().square().mean()) * unit**2
            )
        )
    with torch.no_grad():
        chunk({"images": images(seed)})
        entering = chunk.eval()._embed({"images": images(seed)}).double()
    total = entering.sum(0).square().sum() - entering.square().sum()
    return found, float(total / (length - 1) / entering.square().sum())


@pytest.mark.parametrize(("position", "pool"), [("learned", "class_token"), ("sinusoidal", "mean")])
def test_the_stream_stays_at_one_through_192_layers(position: str, pool: str) -> None:
    model = classifier(position, pool)
    assert model.image is not None
    runs = [signal(model, seed) for seed in range(2)]
    mean = torch.tensor([squares for squares, _ in runs]).mean(0)
    assert mean.shape == (LAYERS,)
    assert float(mean.min()) > 0.9
    assert float(mean.max()) < 1.1
    predicted = predict(model, model.image.tokens)
    assert max(abs(layer.forward_variance - 1) for layer in predicted) < 1e-6
    planned = (0.3 + grid_correlation(8, 8, 128)) / 2 if pool == "mean" else 0.3 / 2 * 63 / 65
    assert sum(entering for _, entering in runs) / 2 == pytest.approx(planned, abs=0.02)


@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (1, 1)])
def test_the_correlation_of_a_grid_is_that_of_its_vectors(grid: tuple[int, int]) -> None:
    rows, columns = grid
    place = torch.arange(rows * columns)
    vectors = torch.cat((sines(place // columns, 8), sines(place % columns, 8)), 1)
    products = vectors @ vectors.T / (vectors.shape[1] / 2)
    apart = ~torch.eye(len(place), dtype=torch.bool)
    measured = float(products[apart].mean()) if len(place) > 1 else 1.0
    assert grid_correlation(rows, columns, 16) == pytest.approx(measured, abs=1e-12)
