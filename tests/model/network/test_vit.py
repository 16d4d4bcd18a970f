"""The classifier of images of every scheme against the independent reference, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.bases import sinusoid_scale
from model.weights.init import initialize_, logit_scale
from tests.model.hf.tiny import shape_of
from tests.model.network.references import assert_gradients, copies, gradients_of, random_model
from tests.reference import vit

CLASSES, PADDED = 11, 16
IMAGE = {"height": 6, "width": 8, "channels": 2, "patch": 2}
SIZES = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}


def config_of(scheme: str, image: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "vit",
            "scheme": scheme,
            **SIZES,
            "vocab_size": CLASSES,
            "vocab_multiple": PADDED,
            "tie_embeddings": False,
            "image": IMAGE | (image or {}),
            **changes,
        }
    )


def build(config: ModelConfig) -> LanguageModel:
    assert config.image is not None
    return random_model(config, config.image.tokens)


def batch(count: int, labels: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randn(count, 2, 6, 8, dtype=torch.float64, generator=generator),
        "labels": torch.randint(0, CLASSES, (count, labels), generator=generator),
    }


def reference_of(config: ModelConfig) -> vit.Vit:
    assert config.image is not None
    shape = shape_of(config, logit_scale(config))
    scale = sinusoid_scale(config)
    return vit.Vit(shape, config.image.patch, config.image.class_token, config.embedding_norm, scale)


VARIANTS: list[dict[str, Any]] = [
    {"logit_bias": True},
    {
        "position": "sinusoidal",
        "image": {"pool": "mean", "patch": 1},
        "activation": "swiglu",
        "num_query_groups": 2,
        "normalization": "rmsnorm",
        "bias": False,
    },
    {"position": "sinusoidal", "embedding_norm": True},
]


@pytest.mark.parametrize("number", range(len(VARIANTS)))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_and_gradients_are_the_references(scheme: str, number: int) -> None:
    """With two labels of each image, as mixtures of two have."""
    config = config_of(scheme, **VARIANTS[number])
    chunk, given, model = build(config), batch(3, labels=2), reference_of(config)
    chunk.label_smoothing = 0.1
    shares = torch.tensor([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]])
    ours = chunk(given)
    ((ours * shares).sum(1).mean()).backward()
    weights = copies(chunk)
    scores = vit.logits(weights, model, given["images"])[:, :CLASSES]
    vit.loss(scores, given["labels"], shares, smoothing=0.1).backward()
    plain = torch.stack([-scores.log_softmax(1).gather(1, given["labels"][:, [k]])[:, 0] for k in (0, 1)], 1)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    assert_gradients(chunk, gradients_of(weights))


def test_hits_count_the_likeliest_class_and_those_close_to_it() -> None:
    config = config_of("pre_ln")
    chunk, given = build(config), batch(40)
    losses, first, five = chunk(given, hits=True, within=5)
    scores = chunk({"images": given["images"]})[:, 0, :CLASSES]
    assert torch.equal(first[:, 0] == 1, scores.argmax(1) == given["labels"][:, 0])
    assert torch.equal(five[:, 0] == 1, (scores.topk(5).indices == given["labels"]).any(1))
    assert 0 < first.sum() < five.sum() < 40
    torch.testing.assert_close(losses, chunk(given).float())


@pytest.mark.parametrize(("zero", "expected"), [(True, 0.0), (False, 1.0)])
def test_the_head_begins_at_zero_or_with_logits_of_variance_one(zero: bool, expected: float) -> None:
    config = config_of("pre_ln", {"zero_head": zero}, hidden_size=256, vocab_size=1000)
    chunk = build(config)
    named = named_parameters(chunk, 0, 1)
    initialize_(((one.name, one.parameter, one.shard) for one in named), config, 13, seed=0)
    scores = chunk({"images": batch(8)["images"]})[..., :1000]
    assert float(scores.var()) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"patch": 4}}, "model.image.height=6 does not divide into patches of 4"),
        ({"tie_embeddings": True}, "model.family=vit has no table of words to use as output projection"),
        ({"position": "rotary"}, "model.position=rotary does not combine with model.family=vit"),
        ({"max_position_embeddings": 9}, "does not fit the 13 tokens of model.image"),
        ({"family": "bert"}, "model.image=.* has no effect with model.family=bert"),
        ({"init": {"token_correlation": 0.1}}, "set model.image.patch_correlation"),
        ({"token_types": 2}, "model.token_types=2 has no effect with model.family=vit"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of("deepscalelm_pre_ln", **changes)


def test_other_batches_are_refused() -> None:
    chunk = build(config_of("pre_ln"))
    with pytest.raises(ValueError, match="a batch has .'tokens'., which this model does not read"):
        chunk({"images": batch(1)["images"], "tokens": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"images of shape \(2, 8, 6\) for a model of \(2, 6, 8\)"):
        chunk({"images": torch.zeros(1, 2, 8, 6)})
