"""The state that FP8 with delayed scaling carries from step to step, a small file by a checkpoint.

Delayed scaling chooses scales by the largest values of past steps.
A run that continues without them computes differently for a while.
The other recipes have no state.
Names are canonical.
Values are equal over tensor- and data-parallel ranks (Transformer Engine reduces them there),
so the file fits every layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from model.errors import UserError
from model.files import inside
from model.parameters.names import canonical_name, layer_offset
from parallel.exchange import gather_bytes
from parallel.topology import Topology

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from model.depth.placed import PlacedLayer

FILE = "fp8_state.safetensors"
SCALING_PARTS = {
    "scale_fwd": ("scaling_fwd", "scale"),
    "amax_history_fwd": ("scaling_fwd", "amax_history"),
    "scale_bwd": ("scaling_bwd", "scale"),
    "amax_history_bwd": ("scaling_bwd", "amax_history"),
}
FORWARD_TENSORS = 3
"""FP8 tensors of one matrix product in the forward pass: input, weight, output."""


def has_state(chunks: Sequence[nn.Module]) -> bool:
    """Whether a model computes in FP8 with delayed scaling; the same on every rank."""
    config: TransformerConfig = chunks[0].config
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _linear_modules(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, TransformerEngineBaseModule]]:
    for chunk in chunks:
        offset = layer_offset(chunk)
        placed: tuple[PlacedLayer, ...] = chunk.placed  # type: ignore[assignment]
        for name, module in chunk.named_modules():
            if hasattr(module, "fp8_meta") and name.rpartition(".")[2].startswith("linear_"):
                yield canonical_name(name, offset, placed), module


def fp8_state(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Scales [tensors] and histories of largest values [steps, tensors] of this rank's layers.

    fp32 on the CPU; empty before the first FP8 step.
    """
    state = {}
    for name, module in _linear_modules(chunks):
        for part, (key, attribute) in SCALING_PARTS.items():
            if key in module.fp8_meta:
                state[f"{name}.{part}"] = (
                    getattr(module.fp8_meta[key], attribute).detach().cpu().contiguous().clone()
                )
    return state


def set_fp8_state(chunks: Sequence[nn.Module], state: Mapping[str, Tensor]) -> None:
    """Puts a state into this rank's layers; layers that it does not name start afresh.

    Raises RuntimeError for histories of another length.
    """
    from megatron.core.fp8_utils import get_fp8_recipe

    recipe = get_fp8_recipe(chunks[0].config)
    for name, module in _linear_modules(chunks):
        if f"{name}.scale_fwd" not in state:
            continue
        module.fp8_meta["num_gemms"] = state[f"{name}.scale_fwd"].numel() // FORWARD_TENSORS
        module.fp8_meta["recipe"] = recipe
        module.init_fp8_meta_tensors(recipe)
        for part, (key, attribute) in SCALING_PARTS.items():
            getattr(module.fp8_meta[key], attribute).copy_(state[f"{name}.{part}"])


def checkpoint_file(chunks: Sequence[nn.Module], topology: Topology) -> dict[str, bytes]:
    """The file for a checkpoint, by name: on rank 0, and only for a model that has such a state.

    Collective where the model has it.
    """
    if not has_state(chunks):
        return {}
    own = fp8_state(chunks) if topology.tensor_rank == 0 and topology.replica_rank == 0 else {}
    merged: dict[str, Tensor] = {}
    for part in gather_bytes(to_bytes(own) if own else b""):
        if dist.get_rank() == 0:
            merged |= from_bytes(part)
    return {FILE: to_bytes(merged)} if merged else {}


def restore(chunks: Sequence[nn.Module], folder: Path) -> bool:
    """Reads the file of a checkpoint folder into this rank's layers.

    Returns whether there was one and the model has use for it.
    Raises UserError for a file that cannot be read.
    """
    path = inside(folder, FILE)
    if not has_state(chunks) or not path.is_file():
        return False
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read ({error}): use an older checkpoint") from None
    with torch.no_grad():
        set_fp8_state(chunks, state)
    return True
