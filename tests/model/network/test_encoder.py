"""The encoder of every scheme against the independent reference, in fp64: packed, padded, plain."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.network.language_model import LanguageModel
from model.weights.init import logit_scale
from tests.model.hf.tiny import shape_of
from tests.model.network.references import assert_gradients, copies, gradients_of, random_model
from tests.reference import encoder

SEQ, VOCAB, PADDED = 12, 30, 32
DOCUMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3], [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]])
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
TARGETS = torch.tensor([[1, 5, 11], [0, 3, 6]])


def build(scheme: str, **changes: Any) -> tuple[LanguageModel, ModelConfig]:
    sizes = {"num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "ffn_hidden_size": 24}
    config = ModelConfig.model_validate(
        {
            "family": "bert",
            "scheme": scheme,
            **sizes,
            "vocab_size": VOCAB,
            "vocab_multiple": PADDED,
            "max_position_embeddings": SEQ,
            **changes,
        }
    )
    return random_model(config, SEQ), config


def batch(config: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {
        "tokens": torch.randint(0, VOCAB, (2, SEQ), generator=generator),
        "documents": DOCUMENTS,
        "positions": POSITIONS,
        "targets": TARGETS,
        "labels": torch.randint(0, VOCAB, TARGETS.shape, generator=generator),
    }
    if config.token_types:
        found["token_types"] = torch.randint(0, 2, (2, SEQ), generator=generator)
    return found


def reference(
    chunk: LanguageModel, config: ModelConfig, given: dict[str, Tensor], packed: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [targets] of the reference, and its gradients by canonical name.

    packed: documents hide from each other; otherwise padding hides from all.
    """
    shape = shape_of(config, logit_scale(config))
    model = encoder.Encoder(shape, config.token_types, config.embedding_norm, config.plain_head)
    weights = copies(chunk)
    labels = torch.full((2, SEQ), encoder.IGNORED).scatter(1, given["targets"], given["labels"])
    inputs = encoder.Batch(
        given["tokens"],
        keep=None if packed else (given["documents"] > 0).long(),
        documents=given["documents"] if packed else None,
        positions=given["positions"],
        types=given.get("token_types"),
    )
    losses = encoder.losses(weights, model, inputs, labels, VOCAB)
    losses.mean().backward()
    return losses, gradients_of(weights)


VARIANTS: list[dict[str, Any]] = [
    {"token_types": 2, "embedding_norm": True},
    {"position": "rotary", "activation": "swiglu", "num_query_groups": 2, "normalization": "rmsnorm"},
    {"position": "learned", "embedding_norm": False, "bias": False, "activation": "relu"},
    {
        "position": "rotary",
        "plain_head": True,
        "logit_bias": True,
        "tie_embeddings": False,
        "window": 2,
        "global_every": 3,
        "rotary_base_local": 100,
    },
]


@pytest.mark.parametrize("number", range(len(VARIANTS)))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_losses_and_gradients_are_the_references(scheme: str, number: int) -> None:
    chunk, config = build(scheme, **VARIANTS[number])
    packed, given = number != 2, batch(config)
    if not packed:
        lengths = torch.tensor([[SEQ], [7]])
        given |= {
            "documents": (torch.arange(SEQ) < lengths).long(),
            "positions": torch.arange(SEQ).expand(2, SEQ),
        }
    ours = chunk(given)
    ours.mean().backward()
    theirs, gradients = reference(chunk, config, given, packed)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-10, atol=1e-10)
    assert_gradients(chunk, gradients)


@pytest.mark.parametrize("scheme", ["pre_ln", "layernorm_scaling", "deepscalelm_pre_ln"])
def test_the_first_attention_may_read_the_norm_on_the_embedding(scheme: str) -> None:
    chunk, config = build(scheme, embedding_norm=True, first_norm=False)
    assert not any("layers.0.input_layernorm" in name for name, _ in chunk.named_parameters())
    given = batch(config)
    theirs, _ = reference(chunk, config, given, packed=True)
    torch.testing.assert_close(chunk(given).flatten(), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("scheme", "embedding_norm", "missing"),
    [("pre_ln", False, "norm on the embedding"), ("post_ln", True, "norm before its first attention")],
)
def test_a_first_norm_that_nothing_replaces_is_kept(scheme: str, embedding_norm: bool, missing: str) -> None:
    with pytest.raises(ValueError, match=f"model.first_norm=false needs a {missing}"):
        build(scheme, embedding_norm=embedding_norm, first_norm=False)


def test_a_document_does_not_feel_what_stands_beside_it() -> None:
    """Packed with others, padded, or alone: the same losses."""
    chunk, config = build("deepscalelm_pre_ln")
    packed = batch(config)
    alone = {name: packed[name][:1, 8:] for name in ("tokens", "positions")}
    alone |= {"targets": torch.tensor([[3]]), "labels": packed["labels"][:1, 2:]}
    torch.testing.assert_close(chunk(alone)[0, 0], chunk(packed)[0, 2], rtol=1e-12, atol=0)


def test_a_batch_with_what_the_model_does_not_read_is_refused() -> None:
    chunk, _ = build("pre_ln")
    with pytest.raises(ValueError, match="token_types"):
        chunk({"tokens": torch.zeros(1, 4, dtype=torch.int64), "token_types": torch.zeros(1, 4)})
