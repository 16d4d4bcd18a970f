"""Gradients that are sent in bf16: every rank's is rounded once, and no sum is."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from parallel.engine import gradients
from parallel.engine.gradients import sum_of_bf16
from tests.distributed import Group, gather, launch
from tests.parallel.training import Curve, given, run, run_config

STEPS = 4
SIZE = 100
"""Elements of a partition, of which a block has fewer."""


def summed() -> bool:
    """Runs inside ranks: whether this rank's partition is the sum in fp32 of what was rounded."""
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    flats = [torch.randn(world * SIZE, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    expected = torch.stack([flat.bfloat16() for flat in flats]).double().sum(0).view(world, SIZE)[rank]
    partition = flats[rank].view(world, SIZE)[rank]
    group = torch.distributed.group.WORLD
    assert group is not None
    with patch.object(gradients, "BLOCK", 32 * world):
        sum_of_bf16(flats[rank], partition, group)
    return bool(torch.allclose(partition.double(), expected, rtol=3e-7, atol=3e-7))


def curves() -> tuple[list[bool], dict[str, Curve]]:
    """Runs inside ranks: the sum, and trainings with both formats."""
    found = {}
    for form in ("fp32", "bf16"):
        config = run_config(
            {}, given(zero=2, grad_reduce=form, overlap_grad_reduce=False if form == "fp32" else None)
        )
        found[form] = run(config, STEPS)
    return gather(summed()), found


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_partitions_are_sums_of_rounded_gradients(world: int) -> None:
    sums, found = launch(Group(world, curves))[0][0]
    assert sums == [True] * world
    narrow, wide = found["bf16"], found["fp32"]
    assert not narrow.unequal
    assert narrow.losses[0] == wide.losses[0]  # before the first reduction
    assert narrow.losses != wide.losses
    assert narrow.losses == pytest.approx(wide.losses, rel=1e-3)
    assert narrow.norms == pytest.approx(wide.norms, rel=2**-8)
