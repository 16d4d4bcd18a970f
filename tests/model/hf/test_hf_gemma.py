"""Gemma 1, 2 and 3 (text): read and written, tensor for tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedModel,
)

from model.hf.export import export
from model.hf.importer import import_model
from model.hf.proof import proof_inputs
from model.hf.reference import Evaluation
from tests.model.hf.foreign import LLAMA, save
from tests.model.hf.tiny import export_tiny, make_config, make_weights, reference

GEMMA = {**LLAMA, "hidden_size": 64, "head_dim": 24, "num_key_value_heads": 2, "pad_token_id": None}
SCALED = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
GEMMAS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, Any]]] = {
    "gemma": (GemmaForCausalLM, GemmaConfig, {}),
    "gemma, untied": (GemmaForCausalLM, GemmaConfig, {"tie_word_embeddings": False}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {}),
    "gemma2, no caps": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu"},
    ),
    "gemma3_text": (Gemma3ForCausalLM, Gemma3TextConfig, {"num_hidden_layers": 7}),
    "gemma3_text, scaled": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": SCALED,
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
            "final_logit_softcapping": 3.0,
        },
    ),
}


@pytest.mark.parametrize("name", GEMMAS)
def test_gemma(tmp_path: Path, name: str) -> None:
    """Gains of 1 + g and words times the root of the width, bit by bit for numbers of 16 bits."""
    kind, settings, given = GEMMAS[name]
    if name != "gemma" and "gemma," not in name:
        given = {"sliding_window": 5, "query_pre_attn_scalar": 24, **given}
    model = save(kind(settings(**{**GEMMA, **given})), tmp_path / "source")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(tmp_path / "source")
    imported = import_model(tmp_path / "source", vocab_multiple=16)
    layout = name.partition(",")[0]
    assert imported.layout == layout
    weights, inputs = dict(imported.weights), proof_inputs(imported.config, 16)
    with torch.no_grad():
        theirs = inputs.seen(model(**inputs.arguments()).logits)
    for ours in (
        Evaluation(weights, imported.config, logit_scale=imported.logit_scale),
        reference(imported.config, weights, imported.logit_scale),
    ):
        error = (inputs.ask(ours)[..., :101] - theirs).abs().max()
        assert error < 1e-5 * theirs.abs().max()
    result = export(
        imported.weights,
        imported.config,
        tmp_path / "back",
        logit_scale=imported.logit_scale,
        tokenizer=None,
        seq_length=imported.positions,
        architecture=layout,
    )
    assert result.architecture == layout
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    back = import_model(tmp_path / "back").config
    assert back.model_copy(update={"vocab_multiple": 16}) == imported.config


def test_peri_ln_is_exported_as_gemma2(tmp_path: Path) -> None:
    """Factors of transfer go into the norms after the branches and of the queries."""
    transfer = {"method": "completep", "base_hidden": 16, "base_head_dim": 4, "base_layers": 2}
    llama = {"normalization": "rmsnorm", "activation": "swiglu", "position": "rotary", "bias": False}
    for qk_norm, architecture in ((False, "gemma2"), (True, "gemma3_text")):
        config = make_config(
            "peri_ln", **llama, transfer=transfer, embedding_norm=False, attention={"qk_norm": qk_norm}
        )
        result = export_tiny(make_weights(config), config, tmp_path / architecture)
        assert result.architecture == architecture
