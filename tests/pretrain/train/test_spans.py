"""Span corruption from text to checkpoint: exact resumption, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.errors import UserError
from pretrain.config.compose import SHIPPED
from pretrain.config.load import load_config
from tests.pretrain.small import trained
from tests.pretrain.spans import span_config, span_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return span_data(tmp_path_factory.mktemp("spans"))


def test_a_run_that_stops_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, told = trained(span_config(data, tmp_path / "whole"))
    _, first = trained(span_config(data, tmp_path / "parts", "train.stop_at_step=2"))
    with pytest.raises(UserError, match=r"was trained with spans.density=0\.15, .* 0\.3: change it back"):
        trained(span_config(data, tmp_path / "parts", "spans.density=0.3"))
    parts, second = trained(span_config(data, tmp_path / "parts"))
    assert first.losses + second.losses == told.losses
    assert second.evaluations == told.evaluations
    for ours, theirs in zip(parts.engine.parameters, whole.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


def test_an_evaluation_counts_targets(data: Path, tmp_path: Path) -> None:
    """24 tokens of source: 4 of a text of 26 are hidden in one span; 4 + 1 + 1 labels a sample."""
    _, told = trained(span_config(data, tmp_path))
    evaluation = told.evaluations[-1]
    assert evaluation["samples"] > 1
    assert evaluation["tokens"] == evaluation["samples"] * 6
    assert 2 < evaluation["loss"] < 8


def test_lengths_that_leave_no_text_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"data\.source_length=2 is too short for train\.task=span_corruption"
    ):
        load_config(SHIPPED / "span_corruption.yaml", ["data.source_length=2"])
