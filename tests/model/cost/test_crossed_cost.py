"""Bytes of an encoder-decoder against every byte that autograd saves on the real model."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from model.config import ModelConfig
from model.cost.activations import Activations
from model.cost.flops import forward_flops
from model.cost.held import chunk_of, norms_of
from model.depth.schemes import SCHEMES
from model.layers.transformer_config import transformer_config
from model.network.crossed import crossed_masks
from model.network.language_model import LanguageModel
from parallel.config import RecomputeConfig
from parallel.launch.one_process import single_process
from tests.model.cost.saved import saved_bytes

SAMPLES, SOURCE, TARGET = 3, 12, 16
OWN_SIZES = {"encoder_attention_heads": 8, "encoder_ffn_hidden_size": 80, "head_dim": 16}
CASES: dict[str, dict[str, Any]] = {
    **{scheme: {"scheme": scheme} for scheme, one in SCHEMES.items() if not one.no_cross},
    "deeper": {"encoder_layers": 5, "num_layers": 6},
    "two tables, biased logits": {"share_embeddings": False, "logit_bias": True},
    "rotary SwiGLU RMSNorm, own sizes": {
        "position": "rotary",
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "tie_embeddings": False,
        **OWN_SIZES,
    },
    "sinusoidal, norms on the embeddings": {"position": "sinusoidal", "embedding_norm": True},
    "dropout": {"hidden_dropout": 0.1},
}


@pytest.fixture(scope="module", autouse=True)
def _process() -> None:
    single_process()


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "family": "seq2seq",
            "scheme": "pre_ln",
            "encoder_layers": 3,
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "max_position_embeddings": TARGET,
            "max_source_positions": SOURCE,
            **changes,
        }
    )


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32, **core: Any) -> LanguageModel:
    settings = transformer_config(config, dtype=dtype, **core)
    return LanguageModel(config, settings, seq_length=TARGET, source_length=SOURCE).to(dtype).train()


def batch_of() -> dict[str, Tensor]:
    """As the data gives it: numbers of pairs and positions for every token."""
    batch = {}
    for name, documents, positions, length in (
        ("source", "source_documents", "source_positions", SOURCE),
        ("tokens", "documents", "positions", TARGET),
    ):
        batch[name] = torch.randint(0, 500, (SAMPLES, length))
        batch[documents] = torch.ones(SAMPLES, length, dtype=torch.int64)
        batch[positions] = torch.arange(length).repeat(SAMPLES, 1)
    return batch


def loss_of(model: LanguageModel) -> Tensor:
    return model(batch_of() | {"labels": torch.randint(0, 500, (SAMPLES, TARGET))}).mean()


def counted(config: ModelConfig, **changes: Any) -> float:
    return Activations(config, SAMPLES, TARGET, source_length=SOURCE, **changes).whole()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_formula_counts_every_saved_byte(case: dict[str, Any]) -> None:
    config = config_of(**case)
    model = model_of(config)
    tables = 0
    if config.position == "rotary":
        # One table for all layers of both stacks.
        tables = 4 * 2 * config.rotary_width * (SOURCE + TARGET)
    assert saved_bytes(model, lambda: loss_of(model)) == counted(config) + tables


@pytest.mark.parametrize(("recompute", "group"), [("selective", 1), ("full", 1), ("full", 2), ("full", 4)])
def test_what_recomputation_leaves(recompute: Literal["selective", "full"], group: int) -> None:
    config = config_of(num_layers=5)  # groups of two and four have layers of both stacks
    model = model_of(config, **RecomputeConfig(granularity=recompute, num_layers=group).core_fields())
    expected = counted(config, recompute=recompute, group=group)
    measured = saved_bytes(model, lambda: loss_of(model))
    assert expected <= measured <= 1.02 * expected  # random states, of one size for all models


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_post_ln"])
def test_an_fp32_stream_among_bf16_branches(scheme: str) -> None:
    """To 1.5 %, as with one stack."""
    config = config_of(scheme=scheme)
    model = model_of(config, torch.bfloat16, fp32_residual_connection=True)
    expected = counted(config, element=2, fp32_stream=True)
    assert saved_bytes(model, lambda: loss_of(model)) == pytest.approx(expected, rel=0.015)


@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_post_ln"])
@pytest.mark.parametrize(("first", "end"), [(0, 2), (1, 3), (2, 5), (3, 5), (0, 7)])
def test_chunks_of_a_pipeline_keep_the_message_they_get(scheme: str, first: int, end: int) -> None:
    """Chunks of the encoder, of both and of the decoder."""
    config = config_of(scheme=scheme)
    model = model_of(config)
    own, of_source = crossed_masks(batch_of())
    width = config.hidden_size

    def forward() -> Tensor:
        stream = torch.randn(SOURCE + TARGET, SAMPLES, width, requires_grad=True)
        context = None
        for layer in list(model.decoder.layers)[first:end]:
            stream, context = layer(
                hidden_states=stream, attention_mask=own, context=context, context_mask=of_source
            )
        return stream

    places = config.placed_layers()[first:end]
    norms = [norms_of(place.plan, cross=place.stack.cross) for place in places]
    expected = Activations(config, SAMPLES, TARGET, source_length=SOURCE).chunk(chunk_of(places, norms))
    assert saved_bytes(model, forward) == expected


def test_a_source_without_length_is_refused() -> None:
    with pytest.raises(ValueError, match="family seq2seq needs the length of its source"):
        Activations(config_of(), SAMPLES, TARGET).whole()


def test_operations_are_those_that_the_model_computes() -> None:
    """But for the half of the decoder's own scores that its mask hides, which are computed here."""
    config = config_of(**OWN_SIZES)
    model = model_of(config)

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter:
        loss_of(model)
    hidden = config.num_layers * 2 * 2 * config.num_attention_heads * config.kv_channels * TARGET / 2
    expected = forward_flops(config, TARGET, source_length=SOURCE).total + hidden
    assert counter.get_total_flops() == SAMPLES * TARGET * expected
