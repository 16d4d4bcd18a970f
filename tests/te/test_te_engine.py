"""Training over both kinds of layers, without a GPU: a checkpoint of one goes on in the other, and FP8's state goes through a file."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("exchange", ["local to te", "te to local"])
def test_a_checkpoint_goes_on_in_the_other_kind_of_layers(exchange: str, engines: dict[str, Any]) -> None:
    losses = engines[exchange]
    assert losses["reader"] == pytest.approx(losses["writer"], rel=1e-6)
    assert losses["reader"] != pytest.approx(losses["before"], rel=1e-3)


@pytest.mark.parametrize("fact", ["restored", "ignored", "equal", "in force"])
def test_the_state_of_delayed_scaling_goes_through_a_file(fact: str, engines: dict[str, Any]) -> None:
    """restored: the file is read; ignored: other recipes write and read none; equal: every number; in force: the quantizers hold what was read."""
    assert engines["fp8 state"][fact] is True
    assert engines["fp8 state"]["tensors"] == 4 * 2 * 4
