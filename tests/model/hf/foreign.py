"""Small models of transformers' own classes, on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

GPT2 = {
    "vocab_size": 101,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "activation_function": "gelu",
}
LLAMA = {
    "vocab_size": 101,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}

OPT = {
    "vocab_size": 101, "max_position_embeddings": 24, "hidden_size": 32, "ffn_dim": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4,
    "do_layer_norm_before": False, "pad_token_id": None,
}  # fmt: skip


BERT = {
    "vocab_size": 101, "max_position_embeddings": 24, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": None,
}  # fmt: skip


def save(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saves with random weights everywhere.

    Fresh models have zero biases, which would hide a wrong one.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


MODERNBERT = {
    "vocab_size": 101, "max_position_embeddings": 24, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 4, "num_attention_heads": 4, "local_attention": 6, "pad_token_id": None,
}  # fmt: skip
