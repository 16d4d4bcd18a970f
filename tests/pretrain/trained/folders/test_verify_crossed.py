"""What an export of an encoder-decoder is compared on is what the trainer evaluated."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.hf.crossed_reference import CrossedEvaluation
from pretrain.trained.folders.verify_crossed import Rows, compare, span_rows
from pretrain.trained.open import Trained, open_trained
from tests.pretrain.small import trained
from tests.pretrain.spans import span_config, span_data


class AsTransformers:
    """Canonical weights behind the interface of an encoder-decoder of transformers."""

    def __init__(self, run: Trained, scale: float = 1.0) -> None:
        self.own, self.scale = CrossedEvaluation(run.weights, run.config, logit_scale=run.logit_scale), scale

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **given: Any) -> SimpleNamespace:
        memory = self.own.encode(input_ids, attention_mask)
        return SimpleNamespace(logits=self.scale * self.own.decode(given["decoder_input_ids"], memory))


def test_losses_are_those_of_the_trainer(tmp_path: Path) -> None:
    _, told = trained(span_config(span_data(tmp_path), tmp_path / "runs", "spans.density=0.3"))
    run = open_trained(tmp_path / "runs" / "span_corruption")
    evaluation = told.evaluations[-1]
    loss, difference = compare(span_rows, run, AsTransformers(run), evaluation["samples"])
    assert loss == pytest.approx(evaluation["loss"], rel=1e-5)
    assert difference < 1e-6
    assert compare(span_rows, run, AsTransformers(run, 1.1), 4)[1] > 0.01


def test_pairs_of_a_row_are_rows_of_their_own() -> None:
    batch = {
        "source": torch.tensor([[5, 6, 2, 7, 2, 0], [8, 2, 0, 0, 0, 0]]),
        "source_documents": torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]]),
        "tokens": torch.tensor([[2, 9, 2, 10, 11], [2, 12, 0, 0, 0]]),
        "labels": torch.tensor([[9, 2, 10, 11, 2], [12, 2, 0, 0, 0]]),
        "documents": torch.tensor([[1, 1, 2, 2, 2], [1, 1, 0, 0, 0]]),
    }
    rows = Rows.of(batch)
    assert rows.source.tolist() == [[5, 6, 2], [7, 2, 0], [8, 2, 0]]
    assert rows.source_keep.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert rows.tokens.tolist() == [[2, 9, 0], [2, 10, 11], [2, 12, 0]]
    assert rows.keep.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    assert rows.labels.tolist() == [9, 2, 10, 11, 2, 12, 2]
