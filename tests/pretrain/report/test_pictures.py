"""The report of a run on images shows some of them with what the model takes them for."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.report.pictures import picture_charts
from pretrain.report.run import RunRecord
from pretrain.rundir.description import Facts
from pretrain.rundir.metrics import Metrics
from tests.pretrain.pictures import picture_data
from tests.pretrain.train.test_classification import config_of, trained


@pytest.mark.parametrize("kept", [True, False])
def test_images_are_shown_with_predictions(kept: bool, tmp_path: Path) -> None:
    config = config_of(picture_data(tmp_path), tmp_path / "runs", augment={}, train={"steps": 30})
    trainer, _ = trained(config)
    if not kept:
        (tmp_path / "data/dataset.json").unlink()
    run = RunRecord(
        trainer.run_dir, Metrics(), Facts({"model": config.model.model_dump(mode="json")}), Facts(), {}
    )
    (chart,) = picture_charts(run)
    if kept:
        count = min(40, trainer.validation.samples)
        assert chart.svg.count("<image ") == count
        assert "dark" in chart.svg or "<path" in chart.svg
    else:
        assert "no readable dataset.json" in chart.missing
        assert not chart.svg
