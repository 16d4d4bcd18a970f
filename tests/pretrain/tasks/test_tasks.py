"""Every family has a task, wrong pairs are told, and losses weigh labels alike."""

from __future__ import annotations

import pytest
import torch

from model.families.table import FAMILIES
from pretrain.tasks.table import TASKS, suited, task_of
from pretrain.tasks.task import label_sums, mean_loss
from pretrain.train.steps import shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_task_of_its_own(family: str) -> None:
    assert task_of(None, family) is TASKS[suited(family)[0]]


def test_every_task_suits_a_family() -> None:
    assert {name for family in FAMILIES for name in suited(family)} == set(TASKS)


def test_losses_are_means_over_the_labels_of_the_step_that_count() -> None:
    """Two ranks with two micro-batches each, of which one has no label that counts."""
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(2, 3, generator=generator) for _ in range(4)]
    weights = [torch.tensor(rows) for rows in ([[1.0, 0, 0]] * 2, [[1.0, 1, 1]] * 2, [[0.0] * 3] * 2)]
    weights.append(torch.tensor([[1.0, 1, 0], [0, 0, 1]]))
    labels = int(sum(weight.sum() for weight in weights))
    ranks = [
        shared([{"weights": weight} for weight in weights[first : first + 2]], labels, 2) for first in (0, 2)
    ]
    batches = [batch for rank in ranks for batch in rank]
    parts = [mean_loss(loss, batch) for loss, batch in zip(losses, batches, strict=True)]
    chosen = torch.cat([loss[weight > 0] for loss, weight in zip(losses, weights, strict=True)])
    torch.testing.assert_close(torch.stack(parts).mean(), chosen.mean(), rtol=1e-6, atol=0)
    named = [batch | {"labels": batch["weights"].long()} for batch in batches]
    both = [label_sums(loss, batch) for loss, batch in zip(losses, named, strict=True)]
    total, number = torch.stack(both).sum(0)
    assert number == labels == len(chosen)
    assert float(total) == pytest.approx(float(chosen.double().sum()), rel=1e-12)
    hits = [loss > 0.5 for loss in losses]
    measured = [torch.stack((loss, hit.float())) for loss, hit in zip(losses, hits, strict=True)]
    each = [label_sums(two, batch) for two, batch in zip(measured, named, strict=True)]
    assert torch.stack(each).sum(0).tolist() == [float(total), int((chosen > 0.5).sum()), labels]


def test_where_all_labels_count_the_loss_is_the_plain_mean() -> None:
    losses = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    assert shared([{"labels": losses}], None, 4) == [{"labels": losses}]
    assert torch.equal(mean_loss(losses, {}), losses.mean())
