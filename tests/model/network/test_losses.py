"""Our cross-entropy against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor

from model.network.losses import VocabularyPart, cross_entropy, cut_cross_entropy, smoothing_gradient
from parallel.launch.one_process import single_process
from tests.model.cost.saved import saved_bytes

ROWS, VOCAB, PADDED = 50, 37, 40


def example(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_nv = (
        (3 * torch.randn(ROWS, PADDED, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    )
    return (
        logits_nv,
        torch.randint(0, VOCAB, (ROWS,), generator=generator),
        torch.rand(ROWS, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_loss_and_gradient_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    logits_nv, labels_n, weights_n = example(dtype)
    loss_n = cross_entropy(logits_nv, labels_n, VOCAB)
    wide = logits_nv.detach().double().requires_grad_()
    expected_n = F.cross_entropy(wide[:, :VOCAB], labels_n, reduction="none")
    assert loss_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        loss_n.double(), expected_n, rtol=min(tolerance, 1e-6), atol=0
    )  # the logits are what they are, in any format
    (loss_n * weights_n).sum().backward()
    (expected_n * weights_n).sum().backward()
    assert logits_nv.grad is not None
    assert wide.grad is not None
    assert logits_nv.grad.dtype == dtype
    torch.testing.assert_close(logits_nv.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)


def test_padding_takes_no_part() -> None:
    logits_nv, labels_n, _ = example(torch.float32)
    cross_entropy(logits_nv, labels_n, VOCAB).sum().backward()
    assert logits_nv.grad is not None
    assert not logits_nv.grad[:, VOCAB:].any()
    assert logits_nv.grad[:, :VOCAB].all()
    with torch.no_grad():
        logits_nv[:, VOCAB:] = 1e9
        assert cross_entropy(logits_nv, labels_n, VOCAB).max() < 100


def test_logits_stay_as_they_are() -> None:
    logits_nv, labels_n, _ = example(torch.float32)
    before = logits_nv.detach().clone()
    cross_entropy(logits_nv, labels_n, VOCAB).sum().backward()
    assert torch.equal(logits_nv, before)


def test_a_second_backward_pass_is_refused() -> None:
    logits_nv, labels_n, _ = example(torch.float32)
    loss = cross_entropy(logits_nv, labels_n, VOCAB).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_smoothing_is_in_the_gradient_alone_and_is_that_of_torch() -> None:
    """Also where the vocabulary, 11 tokens and 5 of padding, is cut over two ranks."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 3, 7, 8, 10, 10]), torch.rand(6, generator=generator)
    theirs = F.cross_entropy(logits[:, :11], labels, reduction="none", label_smoothing=0.1)
    plain = F.cross_entropy(logits[:, :11], labels, reduction="none")
    (wanted,) = torch.autograd.grad((theirs * weights).sum(), logits, retain_graph=True)
    (unsmoothed,) = torch.autograd.grad((plain * weights).sum(), logits, retain_graph=True)
    ours = cross_entropy(logits, labels, 11, 0.1)
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)
    (found,) = torch.autograd.grad((ours * weights).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-15)

    added = []
    for rank, valid in ((0, 8), (1, 3)):
        own = logits.detach()[:, None, 8 * rank : 8 * rank + 8].requires_grad_()
        zeros = smoothing_gradient(own, labels[:, None], VocabularyPart(8 * rank, valid, 11, 0.1))
        assert not zeros.any()
        added.append(torch.autograd.grad((zeros * weights[:, None]).sum(), own)[0][:, 0])
    torch.testing.assert_close(unsmoothed + torch.cat(added, dim=1), wanted, rtol=0, atol=2e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_z_loss_is_in_the_gradient_alone(smoothing: float) -> None:
    """Of 11 tokens and 13 of padding."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 3, 7, 8, 10, 10]), torch.rand(6, generator=generator)
    kept = logits[:, :11]
    plain = F.cross_entropy(kept, labels, reduction="none")
    smoothed = F.cross_entropy(kept, labels, reduction="none", label_smoothing=smoothing)
    squared = 0.3 * kept.exp().sum(-1).log().square()
    (wanted,) = torch.autograd.grad(((smoothed + squared) * weights).sum(), logits, retain_graph=True)
    ours = cross_entropy(logits, labels, 11, smoothing, 0.3)
    torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
    (found,) = torch.autograd.grad((ours * weights).sum(), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_z_loss_of_cut_logits_keeps_nothing_as_large_as_they_are() -> None:
    """One process in the place of ranks; layouts are compared in tests/parallel/engine."""
    single_process()
    group = get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(4)
    given = torch.randn(5, 2, 11, generator=generator)
    labels = torch.randint(0, 11, (5, 2), generator=generator)
    weights = torch.rand(5, 2, generator=generator)
    narrow = given.clone().requires_grad_()

    def loss(z_loss: float) -> Tensor:
        return cut_cross_entropy(narrow * 1.0, labels, group, z_loss)  # it computes in their memory

    without, with_it = (saved_bytes(torch.nn.Module(), lambda z=z: loss(z)) for z in (0.0, 0.3))  # type: ignore[misc]
    assert without == with_it > given.nbytes
    logits = given.double().requires_grad_()
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(5, 2)
    (wanted,) = torch.autograd.grad(
        ((plain + 0.3 * logits.logsumexp(-1).square()) * weights).sum(), logits, retain_graph=True
    )
    ours = loss(0.3)
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad((ours * weights).sum(), narrow)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
