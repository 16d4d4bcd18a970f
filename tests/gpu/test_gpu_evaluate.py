"""Perplexity on a GPU against the plain evaluation on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from model.hf.reference import Evaluation
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import train_tokenizer
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.measures.perplexity import evaluate
from pretrain.trained.measures.text_tokens import read_text
from pretrain.trained.open import open_trained

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_equals_the_evaluation_on_the_cpu(tmp_path: Path, precision: str, tolerance: float) -> None:
    (tmp_path / "text.txt").write_text("deep layers keep the signal\nthe norm of a residual stream\n" * 40)
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "tokenizer.model", vocab_size=280)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=280, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    ).save_pretrained(tmp_path)
    import_checkpoint(str(tmp_path), tmp_path / "checkpoint")
    ours = evaluate(tmp_path / "checkpoint", text=[str(tmp_path / "text.txt")], precision=precision)
    assert precision in ours.precision
    assert "CPU" not in ours.precision
    trained = open_trained(tmp_path / "checkpoint")
    ids = read_text([str(tmp_path / "text.txt")], Tokenizer(tmp_path / "tokenizer.model")).ids
    plain, nats = Evaluation(dict(trained.weights), trained.config, logit_scale=trained.logit_scale), 0.0
    for start in range(0, len(ids) - 1, 64):
        window = ids[start : start + 65]
        nats += float(F.cross_entropy(plain(window[None, :-1])[0], window[1:], reduction="sum"))
    assert ours.nats == pytest.approx(nats, rel=tolerance)
