"""The formula against every byte that autograd saves on the real model."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from model.config import ModelConfig
from model.cost.activations import Activations
from model.depth.schemes import SCHEMES
from model.layers.transformer_config import transformer_config
from model.network.fused_losses import FUSED_LOSSES
from model.network.language_model import LanguageModel
from parallel.config import RecomputeConfig
from parallel.launch.one_process import single_process
from pretrain.data.documents import document_parts
from tests.model.cost.saved import saved_bytes

LLAMA = {
    "position": "rotary",
    "num_query_groups": 2,
    "activation": "swiglu",
    "normalization": "rmsnorm",
    "bias": False,
}
CASES: dict[str, dict[str, Any]] = {
    **{scheme: {"scheme": scheme} for scheme in SCHEMES},
    "deeper": {"num_layers": 7},
    "one sample": {"samples": 1},
    "llama": {**LLAMA},
    "llama, padded vocabulary, untied": {**LLAMA, "vocab_size": 500, "tie_embeddings": False},
    "grouped queries": {"num_query_groups": 1, "position": "none"},
    "wide heads": {"head_dim": 24, "ffn_hidden_size": 80},
    "dropout": {"hidden_dropout": 0.1},
    "rmsnorm, deepscale": {"scheme": "deepscalelm_post_ln", "normalization": "rmsnorm"},
    **{activation: {"activation": activation} for activation in ("relu", "relu2", "silu", "geglu")},
    "norms of queries and keys": {**LLAMA, "attention": {"qk_norm": True}},
    "capped scores and logits": {"attention": {"soft_cap": 2.0}, "logit_soft_cap": 3.0},
    "capped scores, grouped queries": {**LLAMA, "attention": {"soft_cap": 2.0}},
    "capped scores, grouped, no rotation": {"attention": {"soft_cap": 2.0}, "num_query_groups": 2},
    "capped scores, one group": {"attention": {"soft_cap": 2.0}, "num_query_groups": 1},
    "capped scores, norms": {**LLAMA, "attention": {"soft_cap": 2.0, "qk_norm": True}},
    "capped scores, selective": {"attention": {"soft_cap": 2.0}, "recompute": "selective"},
    "a part of a head turns": {**LLAMA, "rotary": {"share": 0.5}},
    "losses in chunks": {"loss_chunk": 5},
    "losses in chunks, one sample, capped": {"loss_chunk": 5, "samples": 1, "logit_soft_cap": 3.0},
    "losses by torch": {"loss_kernel": "torch"},
    "losses by torch, one sample, untied": {"loss_kernel": "torch", "samples": 1, "tie_embeddings": False},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "a window": {"window": 3},
    "windows in some layers": {"window": 3, "global_every": 2},
    "documents": {"documents": True},
    "documents, windows in some layers": {"documents": True, "window": 3, "global_every": 2, **LLAMA},
    "documents, capped": {"documents": True, "attention": {"soft_cap": 2.0}},
    "documents, full": {"documents": True, "recompute": "full"},
}


@pytest.fixture(scope="module", autouse=True)
def _process() -> None:
    single_process()


def loss_of(model: LanguageModel, samples: int, seq: int, documents: bool = False) -> torch.Tensor:
    tokens = torch.randint(0, 500, (samples, seq + 1))
    inputs = tokens[:, :-1]
    parts = document_parts(inputs % 5, 0) if documents else {}
    return model({"tokens": inputs, "labels": tokens[:, 1:], **parts}).mean()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_formula_counts_every_saved_byte(case: dict[str, Any]) -> None:
    case = dict(case)
    samples, seq, recompute = case.pop("samples", 3), 16, case.pop("recompute", "none")
    loss_chunk, loss_kernel = case.pop("loss_chunk", None), case.pop("loss_kernel", "local")
    documents = case.pop("documents", False)
    config = ModelConfig(
        **{
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": seq,
            "scheme": "pre_ln",
        }
        | case
    )
    core = RecomputeConfig(granularity=recompute).core_fields()
    model = LanguageModel(config, transformer_config(config, **core), seq_length=seq).train()
    model.loss_chunk, model.loss_kernel = loss_chunk, FUSED_LOSSES.get(loss_kernel)
    asked = {"recompute": recompute, "loss_chunk": loss_chunk, "documents": documents}
    asked["loss_kernel"] = loss_kernel
    expected = Activations(config, samples, seq, **asked).whole()
    if config.position == "rotary":  # one table for all layers
        expected += 2 * 4 * seq * config.rotary_width * (samples if documents else 1)
    measured = saved_bytes(model, lambda: loss_of(model, samples, seq, documents))
    if recompute == "none":
        assert measured == expected
    else:  # masks' stand-ins and random states of the recomputation, which do not grow with the layers' width
        assert expected <= measured <= expected * 1.02


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_an_fp32_stream_among_bf16_branches(scheme: str, recompute: Literal["none", "full"]) -> None:
    """To 1.5 %.

    On a CPU statistics of norms are in bf16.
    Weights of norms of the stream are kept as fp32 copies.
    """
    config = ModelConfig(
        scheme=scheme,
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=16,
    )
    core = transformer_config(
        config,
        dtype=torch.bfloat16,
        fp32_residual_connection=True,
        **RecomputeConfig(granularity=recompute).core_fields(),
    )
    model = LanguageModel(config, core, seq_length=16)
    model = model.to(torch.bfloat16).train()
    measured = saved_bytes(model, lambda: loss_of(model, 3, 16))
    expected = Activations(config, 3, 16, element=2, recompute=recompute, fp32_stream=True).whole()
    assert measured == pytest.approx(expected, rel=0.015)


def test_parallel_shards_divide_what_they_shard() -> None:
    config = ModelConfig(num_layers=4, hidden_size=64, num_attention_heads=4, vocab_size=512)
    whole, cut, sequence = (
        Activations(config, 2, 64, tensor=t, sequence_parallel=sp).layer()
        for t, sp in ((1, False), (4, False), (4, True))
    )
    assert sequence == whole / 4
    assert sequence < cut < whole
