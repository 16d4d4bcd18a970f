"""What an export says of the precision that a model was trained in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from model.hf.export import export
from model.hf.proof import ProofError, forget
from model.hf.result import Export
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from tests.model.narrow import BF16, SEQ, cosine, narrow, narrow_config, tokens, without_units

LAYERS = 256
"""From here on a product in bf16 has nothing of DeepScaleLM's residual factor."""


def export_of(scheme: str, folder: Path, trained: LanguageModel, **given: Any) -> Export:
    """An export of a narrow model; trained: the model that the run computed with."""
    single = narrow(scheme, LAYERS)
    weights = {one.name: one.parameter.detach() for one in named_parameters(single, 0, 1)}

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = trained({"tokens": ids})
        return found

    config = narrow_config(scheme, LAYERS)
    return export(
        weights,
        config,
        folder,
        logit_scale=logit_scale(config),
        tokenizer=None,
        seq_length=SEQ,
        prove_trained=logits,
        **given,
    )


def test_training_in_bf16_is_named_in_the_proof(tmp_path: Path) -> None:
    result = export_of("deepscalelm_pre_ln", tmp_path / "out", narrow("deepscalelm_pre_ln", LAYERS, BF16))
    assert result.proof.trained is not None
    assert 0.995 < result.proof.trained < 1
    assert f"the cosine {result.proof.trained:.5f} to these" in (tmp_path / "out" / "README.md").read_text()


def test_a_precision_that_computes_another_function_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        without_units(patch)
        trained = narrow("deepscalelm_pre_ln", LAYERS, BF16)
    with pytest.raises(ProofError, match="in the precision of its training this model computes something"):
        export_of("deepscalelm_pre_ln", tmp_path / "out", trained)
    assert not list(tmp_path.iterdir())


def test_a_function_that_amplifies_roundings_is_not_refused(tmp_path: Path) -> None:
    """Plain post-LN this deep turns any rounding into other logits, in whatever arithmetic."""
    result = export_of("post_ln", tmp_path / "out", narrow("post_ln", LAYERS, BF16))
    assert result.proof.trained is not None
    assert result.proof.trained < 0.99


def test_the_modelling_file_in_bf16_computes_what_it_computes_in_fp32(tmp_path: Path) -> None:
    scheme = "deepscalelm_pre_ln"
    half = narrow(scheme, LAYERS, BF16)
    export_of(scheme, tmp_path / "out", half, architecture="fathom")
    logits = {}
    for dtype in (torch.float32, BF16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=dtype)
        with torch.no_grad():
            logits[dtype] = model.eval()(input_ids=tokens(), use_cache=False).logits.double()
        forget(model)
    assert cosine(logits[BF16], logits[torch.float32]) > 0.995
