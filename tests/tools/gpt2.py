"""A Hugging Face GPT-2 with random weights and a SentencePiece model beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pretrain.data.train_tokenizer import train_tokenizer

VOCAB, BYTES = 280, 259


def save_gpt2(folder: Path, **config: Any) -> None:
    """Writes model and tokenizer into a folder. config: further fields of GPT2Config."""
    (folder / "text.txt").write_text("deep layers keep the signal\nthe norm of a residual stream\n" * 200)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", vocab_size=VOCAB)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None, **config
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        # Byte tokens and the end mark get logit 0 and so are never the likeliest: bytes that are no UTF-8 have no one right text.
        model.transformer.wte.weight[:BYTES] = 0
    model.save_pretrained(folder)
