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
from model.theory.correlation import grid_moments
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
    """Variance of the stream after every layer, in training; correlation of what enters it.

    As norms see it: without the mean over each token's entries.
    """
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
                float(output[0].double().var(-1, correction=0).mean()) * unit**2
            )
        )
    with torch.no_grad():
        chunk({"images": images(seed)})
        entering = chunk.eval()._embed({"images": images(seed)}).double()
    entering -= entering.mean(-1, keepdim=True)
    total = entering.sum(0).square().sum() - entering.square().sum()
    return found, float(total / (length - 1) / entering.square().sum())


@pytest.mark.parametrize(("position", "pool"), [("learned", "class_token"), ("sinusoidal", "mean")])
def test_the_stream_stays_near_one_through_192_layers(position: str, pool: str) -> None:
    """Norms take 0.47 of what sines and cosines bring, which is half of what enters."""
    model = classifier(position, pool)
    assert model.image is not None
    runs = [signal(model, seed) for seed in range(2)]
    mean = torch.tensor([squares for squares, _ in runs]).mean(0)
    assert mean.shape == (LAYERS,)
    predicted = [layer.forward_variance for layer in predict(model, model.image.tokens)]
    assert mean.tolist() == pytest.approx(predicted, abs=0.1)
    own, shared = grid_moments(8, 8, 128, True)
    entered = (1 + own) / 2 if pool == "mean" else 1.0
    assert predicted[0] == pytest.approx(entered, abs=4e-3)
    assert predicted[-1] == pytest.approx(1, abs=0.05)
    planned = (0.3 + shared) / (1 + own) if pool == "mean" else 0.3 / 2 * 63 / 65
    assert sum(entering for _, entering in runs) / 2 == pytest.approx(planned, abs=0.02)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("grid", [(3, 5), (1, 7), (1, 1)])
def test_moments_of_a_grid_are_those_of_its_vectors(grid: tuple[int, int], centred: bool) -> None:
    rows, columns = grid
    place = torch.arange(rows * columns)
    vectors = torch.cat((sines(place // columns, 8), sines(place % columns, 8)), 1)
    if centred:
        vectors -= vectors.mean(1, keepdim=True)
    products = vectors @ vectors.T / (16 / 2)
    apart = ~torch.eye(len(place), dtype=torch.bool)
    own, shared = grid_moments(rows, columns, 16, centred)
    assert own == pytest.approx(float(products.diagonal().mean()), abs=1e-12)
    assert shared == pytest.approx(float(products[apart].mean()) if len(place) > 1 else own, abs=1e-12)
