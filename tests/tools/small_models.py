"""Small Hugging Face models with random weights and a SentencePiece model beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from pretrain.data.tokens.train import train_tokenizer

VOCAB, BYTES = 280, 259
NO_MARKS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def save_gpt2(folder: Path, **config: Any) -> None:
    """Writes model and tokenizer into a folder. config: further fields of GPT2Config."""
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4}
    _save(folder, GPT2LMHeadModel, GPT2Config(**sizes, **NO_MARKS, **config))


def save_llama(folder: Path, **config: Any) -> None:
    """The same with two key/value heads for four query heads.

    config: further fields of LlamaConfig.
    """
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    _save(folder, LlamaForCausalLM, LlamaConfig(**sizes, **heads, **NO_MARKS, **config))


def save_opt(folder: Path, **config: Any) -> None:
    """The same with norms after the sublayers. config: further fields of OPTConfig."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3}
    rest = {"num_attention_heads": 4, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
    _save(folder, OPTForCausalLM, OPTConfig(**sizes, **rest, **NO_MARKS, **config))


def _save(folder: Path, kind: Any, config: Any) -> None:
    (folder / "text.txt").write_text("deep layers keep the signal\nthe norm of a residual stream\n" * 200)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", vocab_size=VOCAB)
    torch.manual_seed(0)
    model: PreTrainedModel = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        # Byte tokens and the end mark get logit 0 and so are never the likeliest:
        # bytes that are no UTF-8 have no one right text.
        model.get_input_embeddings().weight[:BYTES] = 0
    model.save_pretrained(folder)
