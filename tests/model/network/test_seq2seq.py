"""Encoder-decoders of every scheme against the reference, in fp64: packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.network.language_model import LanguageModel
from model.weights.bases import sinusoid_scale
from model.weights.init import logit_scale
from tests.model.hf.tiny import shape_of
from tests.model.network.references import assert_equals_reference, copies, gradients_of, random_model
from tests.reference import seq2seq

SOURCE, TARGET, VOCAB, PADDED = 10, 8, 30, 32
PACKED = {
    "source_documents": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 2, 2, 2, 0, 0]]),
    "source_positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]),
    "documents": torch.tensor([[1, 1, 2, 2, 2, 3, 0, 0], [1, 1, 1, 2, 2, 2, 2, 2]]),
    "positions": torch.tensor([[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 0, 1, 2, 3, 4]]),
}
CROSSED = [name for name, scheme in SCHEMES.items() if not scheme.no_cross]


def build(scheme: str, **changes: Any) -> tuple[LanguageModel, ModelConfig]:
    sizes = {"num_layers": 4, "encoder_layers": 3, "hidden_size": 16, "num_attention_heads": 4}
    config = ModelConfig.model_validate(
        {
            "family": "seq2seq",
            "scheme": scheme,
            **sizes,
            "ffn_hidden_size": 24,
            "vocab_size": VOCAB,
            "vocab_multiple": PADDED,
            **changes,
        }
    )
    return random_model(config, TARGET, SOURCE), config


def padded(sources: list[int], targets: list[int]) -> dict[str, Tensor]:
    """One pair a row, of so many tokens."""
    found = {}
    for prefix, width, lengths in (("source_", SOURCE, sources), ("", TARGET, targets)):
        places = torch.arange(width)
        found[f"{prefix}documents"] = (places < torch.tensor(lengths)[:, None]).long()
        found[f"{prefix}positions"] = places.expand(len(lengths), width)
    return found


def batch(pairs: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(pairs["documents"])
    return {
        "source": torch.randint(0, VOCAB, (rows, SOURCE), generator=generator),
        "tokens": torch.randint(0, VOCAB, (rows, TARGET), generator=generator),
        "labels": torch.randint(0, VOCAB, (rows, TARGET), generator=generator),
        "weights": (pairs["documents"] > 0).double(),
        **pairs,
    }


def described(config: ModelConfig) -> seq2seq.Model:
    """The model as the reference takes it."""
    encoder, decoder = config.blueprint.stacks
    scale = sinusoid_scale(config) if config.position == "sinusoidal" else None
    return seq2seq.Model(
        shape_of(config.of(encoder), logit_scale(config)),
        shape_of(config.of(decoder), logit_scale(config)),
        config.share_embeddings,
        config.embedding_norm,
        scale,
    )


def reference(
    chunk: LanguageModel, config: ModelConfig, given: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses [batch, tokens], and gradients of those that count by canonical name."""
    weights = copies(chunk)
    fields = ("source", "tokens", "source_documents", "documents", "source_positions", "positions")
    inputs = seq2seq.Batch(**{name: given[name] for name in fields})
    losses = seq2seq.losses(weights, described(config), inputs, given["labels"], VOCAB)
    (losses * given["weights"]).sum().backward()
    return losses, gradients_of(weights)


VARIANTS: list[dict[str, Any]] = [
    {"position": "learned", "embedding_norm": True},
    {"position": "sinusoidal", "share_embeddings": False, "activation": "relu", "bias": False},
    {
        "position": "rotary",
        "rotary": {"share": 0.5, "scaling": "linear", "factor": 3.0},
        "logit_soft_cap": 2.0,
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "tie_embeddings": False,
        "encoder_ffn_hidden_size": 40,
        "head_dim": 4,
        "encoder_attention_heads": 2,
    },
]
OPTIONS: list[tuple[str, dict[str, float | bool]]] = [
    ("deepscalelm_pre_ln", {"unscaled_cross": True}),
    ("deepscalelm_post_ln", {"unscaled_cross": True}),
    ("deepscalelm_pre_ln", {"k": 1.0, "alpha": 0.8}),
    ("keel", {"alpha": 5.0}),
    ("mix_ln", {"post_fraction": 0.5}),
]


@pytest.mark.parametrize("number", range(len(VARIANTS)))
@pytest.mark.parametrize("scheme", CROSSED)
def test_losses_and_gradients_are_the_references(scheme: str, number: int) -> None:
    chunk, config = build(scheme, **VARIANTS[number])
    given = batch(padded([SOURCE, 6], [5, TARGET]) if number == 1 else PACKED)
    assert_equals_reference(chunk, given, *reference(chunk, config, given))


@pytest.mark.parametrize(("scheme", "options"), OPTIONS)
def test_options_are_the_references(scheme: str, options: dict[str, float | bool]) -> None:
    chunk, config = build(scheme, scheme_options=options)
    given = batch(PACKED)
    assert_equals_reference(chunk, given, *reference(chunk, config, given))


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_a_pair_does_not_feel_what_stands_beside_it(position: str) -> None:
    """Packed with others, padded on both sides, or alone: the same losses."""
    chunk, _ = build("deepscalelm_pre_ln", position=position)
    given = batch(PACKED)
    given.pop("weights")
    packed = chunk(given)[0, 2:5]
    alone = {"source": given["source"][:1, 3:7]} | {
        name: given[name][:1, 2:5] for name in ("tokens", "labels")
    }
    lengthened = {name: torch.nn.functional.pad(ids, (0, 3)) for name, ids in alone.items()}
    lengthened |= {
        "source_documents": torch.tensor([[1, 1, 1, 1, 0, 0, 0]]),
        "documents": torch.tensor([[1, 1, 1, 0, 0, 0]]),
    }
    expected = chunk(alone)[0]
    torch.testing.assert_close(packed, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunk(lengthened)[0, :3], expected, rtol=1e-12, atol=1e-12)


def test_padding_beside_a_full_source_gives_finite_gradients() -> None:
    """A padded target row whose source has no padding still has keys to look at."""
    chunk, _ = build("pre_ln")
    given = batch(padded([SOURCE, SOURCE], [2, 1]))
    weights = given.pop("weights")
    losses = chunk(given)
    (losses * weights).sum().backward()
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(one.grad).all() for one in chunk.parameters() if one.grad is not None)
