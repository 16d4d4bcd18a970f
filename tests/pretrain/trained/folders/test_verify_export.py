"""Exports of trained models against their runs, loaded as a user of transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from pretrain.rundir.metrics import read_metrics
from pretrain.train.callbacks.metrics_log import MetricsFile
from pretrain.trained.fill import fill_text
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.folders.verify_export import CHECKS, verify_export
from pretrain.trained.folders.verify_masked import documents_of
from pretrain.trained.measures.masked import masked_samples
from pretrain.trained.open import open_trained
from tests.pretrain.small import small_config, small_data, small_trainer
from tests.pretrain.trained.encoders import SIZE, save_encoder

PROMPT = "the [MASK] layers"
"""Shorter than the models' tables of positions."""
CASES: dict[str, dict[str, Any]] = {
    # Rotary: a sample is longer than the positions of a learned table here.
    "decoder": {"position": "rotary"},
    "packed encoder with types and learned positions": {"token_types": 2},
    "rotary encoder of padded documents": {"position": "rotary", "packed": False},
}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with its export in `hf`."""
    folder, fields = tmp_path_factory.mktemp("verify"), dict(CASES[request.param])
    packed = fields.pop("packed", True)
    if request.param == "decoder":
        config = small_config(small_data(folder), folder, 2, **fields)
    else:
        save_encoder(folder)
        config = small_config(folder / "data", folder, 2, family="bert", vocab_size=SIZE, **fields)
        config.masking.packed = packed
    trainer = small_trainer(config)
    trainer.callbacks.append(MetricsFile(1))
    trainer.run()
    export_checkpoint(folder / "small", folder / "small/hf")
    return folder / "small"


def test_losses_and_logits_are_the_runs(run: Path) -> None:
    found = verify_export(run, run / "hf", PROMPT)
    assert found.trained_loss == read_metrics(run / "metrics.jsonl").eval[-1].loss
    assert found.exported_loss == pytest.approx(found.trained_loss, rel=2e-6)
    assert found.logit_difference < 1e-4
    assert found.samples == 4
    assert found.agrees
    assert len(found.shown) >= 2


def test_another_models_weights_do_not_agree(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in (run / "hf").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = {name: 3 * tensor for name, tensor in load_file(run / "hf/model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = verify_export(run, tmp_path, PROMPT)
    assert not found.agrees
    assert found.logit_difference > 0.1


@pytest.mark.parametrize("run", [name for name in CASES if name != "decoder"], indirect=True)
def test_an_encoder_fills_places_as_fathom_fill_does(run: Path) -> None:
    _, text, place = verify_export(run, run / "hf", PROMPT).shown
    filled = fill_text(run, PROMPT)
    assert text == filled.text
    assert place.startswith(f"place 1: {filled.places[0][0].text!r} ")
    with pytest.raises(UserError, match=r"write \[MASK\] where one is"):
        verify_export(run, run / "hf", "no place")


@pytest.mark.parametrize("run", list(CASES)[1:], indirect=True)
def test_documents_of_a_sample_are_rows_of_their_own(run: Path) -> None:
    source, _ = masked_samples(open_trained(run), None, "validation")
    batch = source.batch(range(4))
    rows = documents_of(batch)
    assert rows.inputs.keep is not None
    assert int(rows.inputs.keep.sum()) == int((batch["documents"] > 0).sum())
    assert len(rows.inputs.tokens) > 4 or not bool((batch["documents"] > 1).any())
    # Every hidden token is found where it stood, in the order of the batch.
    counted = batch["weights"] > 0
    seen = batch["tokens"].gather(1, batch["targets"])[counted]
    assert torch.equal(rows.inputs.tokens[rows.rows, rows.columns], seen)
    assert torch.equal(rows.labels, batch["labels"][counted])
    assert bool(rows.inputs.keep[rows.rows, rows.columns].all())


@pytest.mark.parametrize("run", list(CASES)[1:2], indirect=True)
def test_a_task_without_a_check_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHECKS, "masked")
    with pytest.raises(UserError, match=r"train\.task=masked_lm, whose exports have no check yet"):
        verify_export(run, run / "hf", PROMPT)
