"""Models whose losses a library's kernel computes, beside the same with our own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers.transformer_config import transformer_config
from model.network.fused_losses import FusedLosses
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import make_config

SEQ, BATCH = 12, 3
CROSSED = {"family": "seq2seq", "encoder_layers": 2, "max_source_positions": SEQ}
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, a bias, no padding": {
        "tie_embeddings": False,
        "scheme": "pre_ln",
        "logit_bias": True,
        "vocab_size": 112,
    },
    "scaled logits": {"scheme": "deepscalelm_pre_ln"},
    "an encoder's head": {"family": "bert"},
    "two stacks": CROSSED,
}
"""Fields of models; the vocabulary is 101 tokens, padded to 112."""
CAPPED = {"logit_soft_cap": 1.5}


def example(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> tuple[LanguageModel, Any]:
    """A model with weights at random, and two micro-batches of it."""
    single_process()
    core = transformer_config(config, dtype=dtype, on_cpu=device == "cpu")
    source = SEQ if config.blueprint.crossed else None
    model = LanguageModel(config, core, seq_length=SEQ, source_length=source).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, [
        {name: tensor.to(device) for name, tensor in _batch(config, generator).items()} for _ in range(2)
    ]


def _batch(config: ModelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    names = ("tokens", "labels", *(["source"] if config.blueprint.crossed else []))
    batch = {name: torch.randint(0, 101, (BATCH, SEQ), generator=generator) for name in names}
    if config.blueprint.crossed:
        batch |= {
            name: torch.ones(BATCH, SEQ, dtype=torch.long) for name in ("documents", "source_documents")
        }
    if config.blueprint.head.targets:
        batch["targets"] = torch.stack([torch.randperm(SEQ, generator=generator)[:8] for _ in range(BATCH)])
        batch["labels"] = batch["labels"][:, :8]
    return batch


def weighted(losses: Tensor) -> Tensor:
    """A loss in which some labels count nothing and the others differently, as under masks."""
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype, device=losses.device)
    return (losses.flatten() * weights * (torch.arange(losses.numel(), device=losses.device) % 3 > 0)).sum()


def passed(model: LanguageModel, batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of all micro-batches, and the sums of their gradients."""
    model.zero_grad()
    losses = []
    for batch in batches:
        losses.append(model(batch))
        weighted(losses[-1]).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(losses).detach(), found


def errors(
    kernel: FusedLosses,
    fields: dict[str, Any],
    dtype: torch.dtype,
    *,
    chunk: int | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    device: str = "cpu",
) -> dict[str, float]:
    """Largest differences from our losses: of losses, of evaluated ones, of any gradient.

    The last in shares of the largest gradient of its parameter. And so what rounding does to ours:
    their difference from fp64's.
    """
    fields = {"hidden_size": 32, "max_position_embeddings": SEQ, **fields}
    model, batches = example(make_config(**fields), dtype, device)
    model.label_smoothing, model.z_loss = smoothing, z_loss
    expected, of_ours = passed(model, batches)
    _, exact = passed(model.double(), batches)
    model.to(dtype)  # nothing is lost on the way there and back
    with torch.no_grad():
        evaluated = model(batches[0], hits=True, within=5)
    model.loss_kernel, model.loss_chunk = kernel, chunk
    found, of_theirs = passed(model, batches)
    assert of_theirs.keys() == of_ours.keys()
    with torch.no_grad():
        again = model(batches[0], hits=True, within=5)
        alone = model(batches[0])
    return {
        "losses": _error(found, expected),
        "evaluated": max(_error(again, evaluated), _error(alone, evaluated[0])),
        "gradients": _gradients(of_theirs, of_ours),
        "rounding": _gradients(of_ours, exact),
    }


def _gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(
        _error(found[name], expected[name]) / float(expected[name].abs().max().clamp_min(1e-9))
        for name in expected
        if not name.endswith("key.bias")
    )


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max())
