"""A small model, its losses and gradients against an independent reference's, in fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.rotary import frequencies
from model.weights.init import logit_scale
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import reference


def random_model(config: ModelConfig, seq_length: int, source_length: int | None = None) -> LanguageModel:
    """A model on one process, of weights that hide nothing."""
    single_process()
    core = transformer_config(config, dtype=torch.float64)
    chunk = LanguageModel(config, core, seq_length=seq_length, source_length=source_length).double()
    if config.position == "rotary":  # Megatron-core's angles are in fp32
        chunk.angles.bases[0].inv_freq = frequencies(config, dtype=torch.float64)
        if config.rotary_base_local is not None:
            chunk.angles.bases[1].inv_freq = frequencies(config, local=True, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.4, generator=generator)
    return chunk


def copies(chunk: LanguageModel) -> dict[str, Tensor]:
    """A model's parameters by canonical name, to take gradients of a reference by."""
    return {
        one.name: one.parameter.detach().clone().requires_grad_() for one in named_parameters(chunk, 0, 1)
    }


def gradients_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of those that have one."""
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def assert_gradients(chunk: LanguageModel, gradients: Mapping[str, Tensor], part: float = 1e-9) -> None:
    """gradients: the reference's. part: of a tensor's largest entry, by which any may differ."""
    for one in named_parameters(chunk, 0, 1):
        ours, theirs = one.parameter.grad, gradients[one.name]
        assert ours is not None, one.name
        # A shift of all keys moves no probability: their bias has no gradient but for rounding.
        atol = part * float(theirs.abs().max()) + 1e-14
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol, msg=one.name)


def assert_equals_reference(
    chunk: LanguageModel, given: Mapping[str, Tensor], losses: Tensor, gradients: Mapping[str, Tensor]
) -> None:
    """given: a batch with the weights of its labels.

    losses [b, s]: the reference's. gradients: of their weighted sum, by canonical name.
    """
    ours = chunk({name: value for name, value in given.items() if name != "weights"})
    (ours * given["weights"]).sum().backward()
    counted = given["weights"] > 0
    torch.testing.assert_close(ours[counted], losses[counted], rtol=1e-10, atol=1e-10)
    assert_gradients(chunk, gradients)


def assert_same_logits(chunk: LanguageModel, config: ModelConfig, tokens: Tensor) -> None:
    """Logits of a decoder or an encoder are the reference's, and gradients of their squares too."""
    weights = copies(chunk)
    ours = chunk({"tokens": tokens})
    theirs = reference(config, weights, logit_scale(config), torch.float64)(tokens)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    assert_gradients(chunk, gradients_of(weights), 1e-10)
