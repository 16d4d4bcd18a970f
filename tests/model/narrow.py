"""Deep, narrow models in several formats with the same weights, and what one pass shows.

Rounding of constants adds up over hundreds of layers.
A test of a scheme in 16 bits that is not deep shows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth import folded as units
from model.depth.folded import FoldedSublayer
from model.depth.sublayer import Sublayer
from model.network.language_model import LanguageModel
from model.network.parts import Kernels
from parallel.launch.one_process import single_process
from pretrain.train.build import build_chunks

SEQ, BATCH, VOCAB = 32, 2, 256
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Seen:
    """One pass, in fp64 on the CPU and in the units of the scheme's equation."""

    logits: Tensor
    """[b, s, v]"""
    bottom: Tensor
    """The stream that enters the first layer, [s, b, h]."""
    top: Tensor
    """The stream that leaves the last."""

    @property
    def share(self) -> float:
        """How much of the bottom stream is left in the top one: the factor of a regression."""
        return float((self.bottom * self.top).sum() / self.bottom.square().sum())

    @property
    def likeness(self) -> float:
        """Correlation of both, near 0 where branches have covered the bottom stream."""
        return cosine(self.bottom, self.top)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors."""
    return float((a * b).sum() / a.norm() / b.norm())


def open_gates(model: nn.Module) -> None:
    """Gives gates of the stream, which start at 0 and do nothing, something to do."""
    for name, parameter in model.named_parameters():
        if name.endswith("gpas.gate"):
            nn.init.constant_(parameter, 0.3)


def tokens() -> Tensor:
    """Token ids [b, s]."""
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))


def narrow_config(scheme: str, layers: int, **model: Any) -> ModelConfig:
    """Of `narrow`. model: other fields."""
    shape = {"hidden_size": 64, "num_attention_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": SEQ}
    return ModelConfig(scheme=scheme, num_layers=layers, **shape | model)


def narrow(
    scheme: str,
    layers: int,
    dtype: torch.dtype = torch.float32,
    *,
    kernels: Kernels = "local",
    core: dict[str, Any] | None = None,
    **model: Any,
) -> LanguageModel:
    """A model with initial weights that bf16 holds: formats differ in their arithmetic alone.

    core: further fields of Megatron-core's configuration.
    """
    (chunk,) = build_chunks(
        narrow_config(scheme, layers, **model),
        single_process(),
        seq_length=SEQ,
        dtype=dtype,
        seed=1,
        kernels=kernels,
        **core or {},
    )
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(parameter.to(BF16))
    # Megatron-core makes the table of positions in fp32.
    # In training DeepSpeed converts the whole model.
    return chunk.to(dtype).train()


def seen(chunk: LanguageModel) -> Seen:
    """A pass without gradients through a model as it is, on its device."""
    streams: list[Tensor] = []
    first, last = chunk.decoder.layers[0], chunk.decoder.layers[-1]

    def entering(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).detach().double().cpu())

    def leaving(module: Any, args: Any, output: tuple[Tensor, Any]) -> None:
        streams.append(output[0].detach().double().cpu() * last.plan.leaving)

    handles = [
        first.register_forward_pre_hook(entering, with_kwargs=True),
        last.register_forward_hook(leaving),
    ]
    device = next(chunk.parameters()).device
    with torch.no_grad():
        logits = chunk({"tokens": tokens().to(device)})
    for handle in handles:
        handle.remove()
    return Seen(logits.double().cpu(), *streams)


def rounding(chunk: LanguageModel) -> LanguageModel:
    """The same model, whose activations are rounded to bf16 while it computes in fp32.

    What any computation in bf16 has to bear, constants aside.
    """

    def to_bf16(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(to_bf16(module, args, part) for part in output)
        return output.to(BF16).to(output.dtype) if isinstance(output, Tensor) else output

    for part in chunk.modules():
        part.register_forward_hook(to_bf16)
    return chunk


def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes models built from here on compute the scheme's equation as it is written.

    The residual is multiplied by its factor.
    """

    def written(plan: Sublayer, unit: float, given: float) -> FoldedSublayer:
        return FoldedSublayer(**vars(plan))

    monkeypatch.setattr(units, "_sublayer", written)


def compared(
    scheme: str, layers: int, *, core: dict[str, Any] | None = None, **model: Any
) -> tuple[Seen, Seen]:
    """What fp32 shows, and what bf16 does.

    core: further fields of Megatron-core's configuration for the second.
    """
    return seen(narrow(scheme, layers, **model)), seen(narrow(scheme, layers, BF16, core=core, **model))


def rounded(scheme: str, layers: int, **model: Any) -> Seen:
    """What fp32 shows whose activations are rounded."""
    return seen(rounding(narrow(scheme, layers, **model)))
