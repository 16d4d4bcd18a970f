"""Models small enough for a test and large enough for FP8, and what one pass through them gives.

On whatever device there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.layers.one_pass import pass_at_once
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from parallel.config import Fp8Config
from parallel.hardware.precision import Machine, Numerics, check_sizes, numerics_for, this_machine
from parallel.launch.one_process import single_process
from pretrain.data.samples import next_tokens
from pretrain.train.build import build_chunks
from tests.parallel.training import forward_step

SEQ, BATCH, VOCAB, SEED = 128, 2, 512, 7
SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": SEQ,
}


def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tokens(seed: int = 0, batch: int = BATCH) -> Tensor:
    """Token ids [batch, SEQ + 1]: noisy counting, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCAB, (batch, 1), generator=generator)
    stride = torch.randint(1, 4, (batch, 1), generator=generator)
    return ((start + stride * torch.arange(SEQ + 1)) % VOCAB).to(device())


def numerics_of(
    precision: str,
    kernels: str,
    recipe: str = "none",
    *,
    first_last_bf16: bool = False,
    machine: Machine | None = None,
) -> Numerics:
    """As `resolve` has it on this machine."""
    return numerics_for(
        precision,
        kernels,
        Fp8Config(recipe=recipe, first_last_bf16=first_last_bf16),
        machine or this_machine(),
    )


def build(numerics: Numerics, **model: Any) -> LanguageModel:
    """A model with initial weights.

    Equal weights for equal arguments, whatever the kernels (rounded to the numerics' dtype).
    """
    config, topology = ModelConfig(**SHAPE | model), single_process()
    check_sizes(numerics, config, topology.layout, seq_length=SEQ, micro_batch_size=BATCH)
    fields: dict[str, Any] = numerics.core_fields()
    (chunk,) = build_chunks(
        config,
        topology,
        seq_length=SEQ,
        dtype=numerics.dtype,
        seed=SEED,
        kernels=numerics.kernels,
        **fields,
    )
    # Megatron-core makes the table of positions in fp32.
    # In training DeepSpeed converts the whole model.
    chunk = chunk.to(numerics.dtype).train()
    if numerics.joins is not None:
        pass_at_once([chunk], numerics.joins)
    return chunk


@dataclass
class Pass:
    """Per-token losses [BATCH, SEQ] and gradients by canonical name, in fp32."""

    losses: Tensor
    gradients: dict[str, Tensor]

    def difference(self, reference: Pass) -> tuple[float, float]:
        """Relative difference of the mean loss, and the gradients'.

        The latter is the norm of the gradients' difference over their norm.
        """
        assert self.gradients.keys() == reference.gradients.keys()
        loss = float(abs(self.losses.mean() - reference.losses.mean()) / reference.losses.mean())
        square = sum(
            float((self.gradients[name] - gradient).square().sum())
            for name, gradient in reference.gradients.items()
        )
        return loss, (
            square / sum(float(gradient.square().sum()) for gradient in reference.gradients.values())
        ) ** 0.5


def one_pass(chunk: LanguageModel, batch: Tensor) -> Pass:
    """Forward and backward through the mean loss, as the first micro-batch of a step."""
    chunk.set_is_first_microbatch()
    for parameter in chunk.parameters():
        parameter.grad = None
    losses, _ = forward_step(iter([next_tokens(batch)]), chunk)
    losses.float().mean().backward()
    gradients = {
        named.name: named.parameter.grad.float()
        for named in named_parameters(chunk, 0, 1)
        if named.parameter.grad is not None
    }
    return Pass(losses.detach().float(), gradients)


def round_weights(chunk: LanguageModel) -> LanguageModel:
    """Weights as bf16 holds them, so that two precisions differ in their arithmetic alone."""
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.bfloat16())
    return chunk
