"""Exports of models whose settings carry over: branches, logits and scores are folded exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.hf.export import export
from model.hf.importer import import_model
from model.hf.reference import Evaluation
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import POSITIONS, make_config, make_tokens, make_weights

# Scores, branches and logits all have factors that are no powers of two.
TRANSFER = {
    "method": "completep",
    "base_layers": 3,
    "base_hidden": 24,
    "base_head_dim": 6,
    "alpha": 0.75,
}
LLAMA: dict[str, Any] = {
    "normalization": "rmsnorm",
    "position": "rotary",
    "activation": "swiglu",
    "num_query_groups": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("pre_ln", {}),
    "llama": ("pre_ln", LLAMA),
    "opt": ("post_ln", {"scheme_options": {"branch": 1.0}, "activation": "relu"}),
    "fathom": ("b2t", {"scheme_options": {"branch": 2.0}}),
}


@pytest.mark.parametrize("target", MODELS)
def test_exports_fold_every_factor(tmp_path: Path, target: str) -> None:
    scheme, fields = MODELS[target]
    config = make_config(scheme, transfer=TRANSFER, **fields)
    weights, scale = make_weights(config), logit_scale(config)
    done = export(weights, config, tmp_path / "out", logit_scale=scale, tokenizer=None, seq_length=POSITIONS)
    assert done.architecture == target
    assert done.proof.difference <= 1e-5
    tokens = make_tokens(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=target == "fathom")
    with torch.no_grad():
        theirs = model.eval()(tokens).logits
    ours = Evaluation(weights, config, logit_scale=scale)(tokens)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5 * float(ours.std()))
    plain = Evaluation(weights, make_config(scheme, **fields), logit_scale=scale)(tokens)
    assert float((plain - ours).std() / ours.std()) > 0.01, "no factor was felt"
    if target == "fathom":
        back = import_model(tmp_path / "out", vocab_multiple=16)
        assert back.config.transfer == config.transfer
        for name, value in weights.items():
            rows = config.vocab_size if "word" in name else None  # the padding is cut off
            torch.testing.assert_close(back.weights[name][:rows], value[:rows], rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", MODELS)
def test_the_model_that_trains_has_the_same_factors(target: str) -> None:
    """Ours against the plain evaluation, in float64, which rotary angles are not computed in."""
    scheme, fields = MODELS[target]
    fields = {**fields, "position": "learned", "max_position_embeddings": POSITIONS}
    config = make_config(scheme, transfer=TRANSFER, **fields)
    single_process()
    chunk = LanguageModel(config, transformer_config(config, dtype=torch.float64), seq_length=POSITIONS)
    chunk.double().eval()
    weights = {name: value.double() for name, value in make_weights(config).items()}
    tokens = make_tokens(config)
    with torch.no_grad():
        for named in named_parameters(chunk, 0, 1):
            named.parameter.copy_(weights[named.name])
        ours = chunk({"tokens": tokens})
    theirs = Evaluation(weights, config, logit_scale=logit_scale(config), dtype=torch.float64)(tokens)
    torch.testing.assert_close(ours[..., : config.vocab_size], theirs, rtol=0, atol=1e-10)
