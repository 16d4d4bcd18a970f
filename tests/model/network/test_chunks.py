"""Losses in chunks of positions against losses of all at once, in fp64, and how many exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.layers.transformer_config import transformer_config
from model.network.chunks import in_chunks
from model.network.language_model import LanguageModel
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import make_config

SEQ, BATCH = 12, 3


class Largest(TorchDispatchMode):
    """The most rows that any tensor of so many columns has had."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == self.columns:
            self.rows = max(self.rows, out.numel() // self.columns)
        return out


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and the gradients of their sum where each has a weight of its own."""
    model.zero_grad()
    losses = model(batch)
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).view(losses.shape)
    (losses * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return losses.detach(), found


@pytest.mark.parametrize("size", [1, 5, 6])
@pytest.mark.parametrize(
    "fields",
    [
        {"logit_soft_cap": 1.5},
        {"tie_embeddings": False, "scheme": "pre_ln", "logit_bias": True},
        {"family": "bert"},
    ],
    ids=["capped", "untied, a bias", "an encoder's head"],
)
def test_chunks_equal_the_whole(fields: dict[str, Any], size: int) -> None:
    single_process()
    config = make_config(**{"hidden_size": 32, "max_position_embeddings": SEQ, **fields})
    model = LanguageModel(config, transformer_config(config, dtype=torch.float64), seq_length=SEQ).double()
    model.label_smoothing, model.z_loss = 0.1, 0.02
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    shape = (BATCH, SEQ)
    batch = {
        name: torch.randint(0, config.padded_vocab // 2, shape, generator=generator)
        for name in ("tokens", "labels")
    }
    if config.blueprint.head.targets:
        batch["targets"] = torch.stack([torch.randperm(SEQ, generator=generator)[:8] for _ in range(BATCH)])
        batch["labels"] = batch["labels"][:, :8]
    whole, of_whole = gradients(model, batch)
    with torch.no_grad():
        evaluated = model(batch, hits=True, within=5)
    model.loss_chunk = size
    with Largest(config.padded_vocab) as seen:
        told, of_chunks = gradients(model, batch)
    assert 0 < seen.rows <= max(size * BATCH, config.hidden_size)  # the projection's gradient has those rows
    torch.testing.assert_close(told, whole, rtol=1e-13, atol=1e-13)
    assert of_chunks.keys() == of_whole.keys()
    for name, expected in of_whole.items():
        torch.testing.assert_close(of_chunks[name], expected, rtol=1e-11, atol=1e-12, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(batch, hits=True, within=5), evaluated, rtol=1e-6, atol=0)


def test_shorter_sequences_come_as_more_rows() -> None:
    """As under a warm-up of lengths: four rows of a quarter have as many logits at once as one."""
    single_process()
    config = make_config(hidden_size=32, max_position_embeddings=SEQ)
    model = LanguageModel(config, transformer_config(config), seq_length=SEQ)
    model.loss_chunk = 8
    for rows in (1, 2, 4):
        tokens = torch.zeros(6 * rows, SEQ // rows, dtype=torch.long)
        with Largest(config.padded_vocab) as seen, torch.no_grad():
            model({"tokens": tokens, "labels": tokens})
        assert seen.rows == 8 * 6  # above the 32 of the projection's weight


def test_parts_of_ranks_keep_their_places() -> None:
    """Under sequence parallelism a chunk is the same rows of all ranks, which `measure` gathers."""
    labels = torch.arange(2 * 12).view(2, 12)
    own = torch.arange(6.0)[:, None, None].expand(6, 2, 4)
    sizes = []

    def measure(hidden_sbh: Tensor, labels_bs: Tensor) -> Tensor:
        rows = torch.cat([hidden_sbh, hidden_sbh + 6])[..., 0].t()  # what a gather of two ranks gives
        sizes.append(rows.shape[1])
        return torch.stack((rows, labels_bs.float()))

    told = in_chunks(measure, own, labels, 5, ranks=2)
    assert sizes == [4, 4, 4]
    assert torch.equal(told[0], torch.arange(12.0).expand(2, 12))
    assert torch.equal(told[1], labels.float())
