"""The formula for operations, against a count of a plain implementation's products.

It is also held against the 6N rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.cost.flops import Recompute, flops_per_token, forward_flops

BATCH, SEQ = 2, 16


def config_of(**sizes: Any) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "num_layers": 3,
            "hidden_size": 24,
            "num_attention_heads": 4,
            "vocab_size": 50,
            "vocab_multiple": 32,
            **sizes,
        }
    )


@pytest.mark.parametrize("window", [1, 5, 15, 40])
@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_keys_in_a_window_are_counted_one_by_one(family: str, window: int) -> None:
    config = config_of(family=family, window=window, global_every=2)
    seen = sum(
        abs(query - key) <= window and (key <= query or family == "bert")
        for query in range(SEQ)
        for key in range(SEQ)
    )
    whole = SEQ / 2 if family == "gpt" else SEQ
    pairs = 2 * whole + seen / SEQ  # of three layers the first and the third see all
    assert forward_flops(config, SEQ).attention_core == pytest.approx(pairs * 2 * 2 * 24)


CONFIGS = {
    "plain": config_of(),
    "grouped queries, gated": config_of(
        num_query_groups=2, activation="swiglu", tie_embeddings=False, bias=False
    ),
    "wide heads, narrow feed-forward": config_of(head_dim=10, num_query_groups=1, ffn_hidden_size=40),
}


class Layer(nn.Module):
    """Pre-LN layer whose attention computes the full square: the counter sees every product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.num_attention_heads * config.kv_channels
        self.qkv = nn.Linear(
            config.hidden_size, inner + 2 * config.groups * config.kv_channels, bias=config.bias
        )
        self.proj = nn.Linear(inner, config.hidden_size, bias=config.bias)
        self.fc1 = nn.Linear(
            config.hidden_size, (2 if config.gated else 1) * config.ffn_size, bias=config.bias
        )
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size, bias=config.bias)

    def core(self, q_bhsd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor) -> Tensor:
        mask = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
        return (q_bhsd @ k_bhsd.transpose(-1, -2)).masked_fill(~mask, -1e9).softmax(-1) @ v_bhsd

    def forward(
        self, x_bsh: Tensor, run_core: Callable[..., Tensor] = lambda core, *args: core(*args)
    ) -> Tensor:
        c, d = self.config, self.config.kv_channels
        q, k, v = self.qkv(F.layer_norm(x_bsh, x_bsh.shape[-1:])).split(
            [c.num_attention_heads * d, c.groups * d, c.groups * d], dim=-1
        )
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(c.num_attention_heads // c.groups, dim=1) for part in (k, v))
        x_bsh = x_bsh + self.proj(run_core(self.core, q, k, v).transpose(1, 2).flatten(-2))
        up = self.fc1(F.layer_norm(x_bsh, x_bsh.shape[-1:]))
        if c.gated:
            gate, up = up.chunk(2, dim=-1)
            return x_bsh + self.fc2(F.silu(gate) * up)
        return x_bsh + self.fc2(F.gelu(up))


class Plain(nn.Module):
    def __init__(self, config: ModelConfig, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(config.padded_vocab, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.output = nn.Linear(config.hidden_size, config.padded_vocab, bias=False)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        def checkpoint(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
            # `early_stop` would spare the last products of each recomputed piece.
            # Megatron's recomputation does not.
            with torch.utils.checkpoint.set_checkpoint_early_stop(False):
                return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

        x_bsh = self.embedding(tokens_bs)
        for layer in self.layers:
            if self.recompute == "full":
                x_bsh = checkpoint(layer, x_bsh)
            elif self.recompute == "selective":
                x_bsh = layer(x_bsh, checkpoint)
            else:
                x_bsh = layer(x_bsh)
        return self.output(x_bsh)


def counted(config: ModelConfig, recompute: str = "none", backward: bool = True) -> float:
    """Operations per token that a run of the plain model does."""
    torch.manual_seed(0)
    model = Plain(config, recompute)
    tokens_bs = torch.randint(config.padded_vocab, (BATCH, SEQ))
    with FlopCounterMode(display=False) as counter:
        logits = model(tokens_bs)
        if backward:
            logits.square().mean().backward()
    return counter.get_total_flops() / tokens_bs.numel()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_matches_the_counted_products(name: str) -> None:
    forward = forward_flops(CONFIGS[name], SEQ)
    assert (
        counted(CONFIGS[name], backward=False) == forward.total + forward.attention_core
    )  # the counter sees the full square


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_step_matches_the_counted_products(name: str, recompute: Recompute) -> None:
    config = CONFIGS[name]
    count, core = flops_per_token(config, SEQ, recompute=recompute), forward_flops(config, SEQ).attention_core
    masked_half = 3 * core + (core if recompute != "none" else 0)
    assert counted(config, recompute) == count.hardware + masked_half
    assert (
        count.model == flops_per_token(config, SEQ).model
    )  # what the model needs does not depend on the recomputation


@pytest.mark.parametrize("name", CONFIGS)
def test_six_n_rule(name: str) -> None:
    """6 operations per matrix weight and token.

    Attention comes on top, 6 x layers x s x width, which the rule leaves out.
    """
    config = CONFIGS[name]
    model = Plain(config)
    weights = sum(
        parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.ndim == 2 and not key.startswith("embedding")
    )
    attention = 6 * config.num_layers * SEQ * config.num_attention_heads * config.kv_channels
    assert flops_per_token(config, SEQ).model == 6 * weights + attention


def test_six_n_rule_at_a_published_size() -> None:
    """GPT-3 175B (96 layers, width 12288, 2048 tokens): 6N with 174.6e9 parameters.

    Attention adds 1.4 %.
    """
    config = config_of(num_layers=96, hidden_size=12288, num_attention_heads=96, vocab_size=50257)
    count = flops_per_token(config, 2048)
    assert count.model == pytest.approx(6 * 174.6e9 * (1 + 96 * 2048 * 12288 / 174.6e9), rel=2e-3)
    assert flops_per_token(config, 2048, recompute="full").hardware / count.model == pytest.approx(
        4 / 3, rel=2e-3
    )


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        flops_per_token(config_of(vocab_size=None), 4)
    with pytest.raises(ValueError, match="seq_length=0"):
        flops_per_token(CONFIGS["plain"], 0)
    with pytest.raises(ValueError, match="blockwise"):
        flops_per_token(CONFIGS["plain"], 4, recompute="blockwise")  # type: ignore[arg-type]
