"""Kernels for losses on machines; what they refuse is in `tests/parallel/refusals.py`."""

from __future__ import annotations

import sys

import pytest
import torch

from model.errors import UserError
from parallel.hardware.fused_losses import check_loss_kernel


def test_a_library_that_cannot_be_loaded_is_named_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UserError) as told:
        check_loss_kernel("liger", torch.bfloat16, "0.8.5", gpu=True)
    assert "train.loss_kernel=liger: liger-kernel 0.8.5 cannot be imported (" in str(told.value)
    assert str(told.value).count("\n") == 0


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="an older torch")
def test_local_suffixes_count_as_what_they_stand_for() -> None:
    check_loss_kernel("torch", torch.float32, "2.13.0+cu130", gpu=False)
    check_loss_kernel("local", torch.bfloat16, None, gpu=False)
