"""Muon: its update is PyTorch's own, and its momentum survives a checkpoint.

That every layout sees whole matrices: tests/parallel/engine/test_layouts.py.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.errors import UserError
from parallel.engine.muon import Muon, newton_schulz, scale
from parallel.optimizers import newton_schulz_operations
from pretrain.tasks.masked_lm import MASKED_LM
from pretrain.train.steps import training_step
from tests.distributed import Group, launch
from tests.parallel.checkpoint.states import bring, keep
from tests.parallel.layouts import LLAMA
from tests.parallel.training import batches_of, engine_of, forward_step, given, run_config

SETTINGS = given(kind="muon", clip_grad=0.0, momentum=0.9, weight_decay=0.1, lr=1e-2)
STEPS = 3


def own_matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices in a tensor of the grouped, gated model.

    By index and not by the product's views.
    The model has 2 groups of 2 queries, key, value of 8 rows.
    """
    if "linear_qkv" in name:
        rows = torch.arange(tensor.shape[0]).view(2, 4, 8)
        return [tensor[rows[:, part].flatten()] for part in (slice(0, 2), slice(2, 3), slice(3, 4))]
    if "linear_fc1" in name:
        half = tensor.shape[0] // 2
        return [tensor[:half], tensor[half:]]
    return [tensor]


def against_pytorch() -> dict[str, Any]:
    """Runs inside one rank: PyTorch's Muon and AdamW get the engine's gradients.

    Returns where the two end.
    """
    config = run_config(LLAMA, **SETTINGS)
    engine = engine_of(config)
    optimizer = engine.optimizer.optimizer
    assert isinstance(optimizer, Muon)
    for one in optimizer.orthogonalizers.values():
        one.dtype = torch.bfloat16  # PyTorch's iteration knows no other
    hidden = {named.name for group in engine.groups if group.update.whole for named in group.parameters}
    twins, theirs = their_side(engine, hidden)
    engine.set_lr(1e-2)

    def copy_gradients() -> None:
        for buffer in engine.buffers:
            for piece in buffer.pieces():
                gradient = (
                    buffer.partition[piece.offset : piece.offset + piece.length].view(piece.shape).clone()
                )
                for twin, part in zip(
                    twins[piece.named.name], own_matrices(piece.named.name, gradient), strict=True
                ):
                    twin.grad = part.contiguous()

    for step in range(STEPS):
        batches = batches_of(config, engine, step)
        engine.train_step(
            forward_step, functools.partial(iter, batches), len(batches), inspect=copy_gradients
        )
        for their in theirs:
            their.step()
    apart = {
        named.name: max(
            float((a - b).abs().max())
            for a, b in zip(
                own_matrices(named.name, named.parameter.detach()), twins[named.name], strict=True
            )
        )
        for named in engine.parameters
    }
    return {"apart": apart, "hidden": sorted(hidden), "refused": other_optimizer(config, engine)}


def their_side(
    engine: Any, hidden: set[str]
) -> tuple[dict[str, list[torch.nn.Parameter]], list[torch.optim.Optimizer]]:
    """Copies of the engine's parameters as matrices, by name, and PyTorch's optimizers of them.

    hidden: names of those that Muon has.
    """
    copies = {
        named.name: own_matrices(named.name, named.parameter.detach().clone()) for named in engine.parameters
    }
    twins = {
        name: [torch.nn.Parameter(part.contiguous()) for part in parts] for name, parts in copies.items()
    }
    others = {name: parts for name, parts in twins.items() if name not in hidden}
    decayed = [p for name, parts in others.items() if name == "output_layer.weight" for p in parts]
    plain = [p for name, parts in others.items() if name != "output_layer.weight" for p in parts]
    theirs: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            [p for name in hidden for p in twins[name]],
            lr=1e-2,
            momentum=0.9,
            weight_decay=0.1,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    return twins, theirs


def other_optimizer(config: Any, engine: Any) -> str:
    """What is said when AdamW is to go on from Muon's checkpoint."""
    folder = Path(tempfile.mkdtemp(prefix="fathom-muon-"))
    keep(engine, config, folder, STEPS)
    try:
        bring(engine_of(run_config(LLAMA)), folder)
    except UserError as error:
        return str(error)
    return ""


def dense_layer_of_a_head() -> dict[str, Any]:
    """Inside one rank: the first update of an encoder's head, beside what its gradient asks for."""
    encoder = given(family="bert", num_layers=2, position="rotary")
    engine = engine_of(run_config(encoder, kind="muon", clip_grad=0.0, weight_decay=0.0))
    (dense,) = (named for named in engine.parameters if named.name == "head.dense.weight")
    before = dense.parameter.detach().clone()
    gradients: list[Tensor] = []

    def keep_gradient() -> None:
        gradients.extend(
            buffer.partition[piece.offset : piece.offset + piece.length].view(piece.shape).clone()
            for buffer in engine.buffers
            for piece in buffer.pieces()
            if piece.named is dense
        )

    tokens = torch.randint(0, 120, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": tokens, "labels": tokens.roll(1, 1)}
    engine.set_lr(1e-2)
    engine.train_step(training_step(MASKED_LM), lambda: iter([batch]), 1, inspect=keep_gradient)
    wanted = 1e-2 * scale(before.shape) * newton_schulz(gradients[0])
    return {"moved": before - dense.parameter.detach(), "wanted": wanted}


def test_the_dense_layer_of_a_head_is_a_hidden_matrix() -> None:
    found = launch(Group(1, dense_layer_of_a_head))[0][0]
    assert float(found["wanted"].abs().max()) > 1e-3
    torch.testing.assert_close(found["moved"], found["wanted"], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return launch(Group(1, against_pytorch))[0][0]


def test_updates_are_those_of_pytorch(found: dict[str, Any]) -> None:
    # A step moves a weight by about 2e-3 (a fifth of the learning rate).
    # bf16 rounds the update to 4e-3 of itself.
    assert max(found["apart"].values()) < 2e-5


def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(found: dict[str, Any]) -> None:
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    assert found["hidden"] == sorted(
        f"decoder.layers.{layer}.{part}.weight" for layer in range(4) for part in parts
    )


def test_another_optimizer_cannot_go_on(found: dict[str, Any]) -> None:
    assert "was written with optimizer.kind=muon" in found["refused"]


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_operations_are_those_that_pytorch_counts(shape: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counted:
        newton_schulz(torch.randn(shape))
    assert newton_schulz_operations(*shape) == counted.get_total_flops()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_singular_values_become_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = newton_schulz(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.linalg.svdvals(result)
    # The coefficients trade exactness for speed.
    # Values end between 0.7 and 1.2 (Jordan et al. 2024), directions stay.
    assert 0.6 < values.min() <= values.max() < 1.3
    diagonal = left.mT @ result @ right.mT
    assert torch.allclose(diagonal, torch.diag(diagonal.diagonal()), atol=1e-9)
    assert scale(shape) == pytest.approx(0.2 * max(shape) ** 0.5)
