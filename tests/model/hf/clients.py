"""Exports that other programs read: small, seeded, each with a tokenizer trained on the spot."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.hf.export import export
from model.hf.reference import Weights, generate
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import special_names, train_tokenizer
from tests.model.hf.crossed import make_crossed
from tests.model.hf.tiny import LOGIT_SCALE, make_config, make_encoder, make_weights

SIZE = 296
"""Of the vocabulary. CTranslate2 reads OPT only where it is a multiple of 8."""
BYTES = 259
"""Ids below are special tokens and single bytes."""
POSITIONS = 48
NEW = 16
"""Tokens of a continuation."""
PROMPTS = ("the deep layer of the signal", "norm", "a stream, in the residual")
MADE = {"gpt": make_config, "bert": make_encoder, "seq2seq": make_crossed}

ROTARY: dict[str, Any] = {
    "normalization": "rmsnorm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "num_query_groups": 2,
    "rotary_base": 500,
}
GEMMA: dict[str, Any] = {**ROTARY, "activation": "geglu_tanh", "rotary_base": 10000}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"scheme": "pre_ln"},
    "llama": {"scheme": "layernorm_scaling", **ROTARY},
    "mistral": {"scheme": "pre_ln", **ROTARY},
    "qwen3": {"scheme": "pre_ln", **ROTARY, "attention": {"qk_norm": True}},
    "gemma": {"scheme": "pre_ln", **GEMMA},
    "gemma2": {"scheme": "peri_ln", "embedding_norm": False, **GEMMA},
    "gemma3_text": {
        "scheme": "peri_ln",
        "embedding_norm": False,
        "attention": {"qk_norm": True},
        **GEMMA,
        "rotary_base": 1_000_000,
        "norm_epsilon": 1e-6,
    },
    "opt": {"scheme": "post_ln"},
}
"""Target -> a model of it that all programs named in docs/huggingface.md can compute."""
DEEP: dict[str, tuple[str, dict[str, Any]]] = {
    "pre_ln": ("llama", ROTARY),
    "layernorm_scaling": ("llama", ROTARY),
    "deepscalelm_pre_ln": ("gpt2", {"norm_epsilon": 1e-6}),
    "post_ln": ("opt", {}),
    "deepscalelm_post_ln": ("opt", {}),
    "deepnorm": ("opt", {}),
}
"""Scheme -> the stock class of its models, and what else they need."""
LAYERS = 96


@dataclass(frozen=True)
class Exported:
    """An export, and what it was made of."""

    folder: Path
    weights: Weights
    config: ModelConfig
    tokenizer: Path

    def continued(self, prompt: str) -> list[int]:
        """Ids that `fathom generate --temperature 0` adds to a prompt."""
        codec = Tokenizer(self.tokenizer)
        ids = codec.encode(prompt)
        given = dict(self.weights)
        return list(generate(given, self.config, ids, NEW, 0, logit_scale=LOGIT_SCALE, stop_id=codec.eod_id))


def make_tokenizer(folder: Path, special: str | None = None) -> Path:
    """A SentencePiece model. special: tokens for families that need them, as `--special` takes."""
    text, path = folder / "text.txt", folder / "tokenizer.model"
    text.write_text("the deep layer has a norm of the signal in the residual stream\n" * 300)
    given = special_names(special) if special else None
    train_tokenizer([str(text)], path, SIZE, special=given)
    return path


def exported(folder: Path, target: str, tokenizer: Path, family: str = "gpt", **given: Any) -> Exported:
    """Writes an export of a stock class into a folder."""
    config = MADE[family](**given, vocab_size=SIZE)
    lengths = {"max_position_embeddings": POSITIONS, "max_source_positions": POSITIONS}
    if family == "seq2seq":
        config = config.model_copy(update=lengths)
    weights = make_weights(config, positions=POSITIONS)
    if family == "gpt":
        # Never the likeliest: bytes that are no UTF-8 have no one right text.
        weights["embedding.word_embeddings.weight"][:BYTES] = 0
    export(
        weights,
        config,
        folder,
        logit_scale=LOGIT_SCALE,
        tokenizer=tokenizer,
        seq_length=POSITIONS,
        architecture=target,
    )
    return Exported(folder, weights, config, tokenizer)


def spread(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in standard deviations of `ours`."""
    return float((theirs - ours).abs().max() / ours.std())


@contextmanager
def quick_collections() -> Iterator[None]:
    """Converters collect garbage after each layer: what is there already is left alone."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
