"""`fathom config` on a shipped configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.depth.schemes import SCHEMES
from model.errors import UserError
from pretrain.config.schema import RunConfig
from tools.runs.config import command


def test_json_has_the_configuration_its_meaning_and_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    command("configs/gpt2_xl.yaml", ["train.seed=3"], as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert RunConfig.model_validate_json(json.dumps(answer["config"])).train.seed == 3
    assert 1.55e9 < answer["parameters"]["total"] < 1.57e9
    seed = next(field for field in answer["fields"] if field["key"] == "train.seed")
    assert (seed["value"], seed["default"], seed["source"]) == (3, 1234, "command line")


def test_table_marks_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    command("configs/gpt2_xl.yaml", ["train.seed=3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line[:1] for line in lines if "train.seed " in line] == ["*"]
    assert [line[:1] for line in lines if "train.steps " in line] == ["!"]
    assert [line[:1] for line in lines if "log.tensorboard " in line] == [" "]
    assert any(line.startswith("Parameters 1,5") for line in lines)


def test_vocabulary_of_prepared_data_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override = f"data.corpora.0.path={tmp_path}"
    command("configs/quickstart.yaml", [override])
    assert "without the vocabulary" in capsys.readouterr().out
    (tmp_path / "dataset.json").write_text('{"vocab_size": 1000}')
    command("configs/quickstart.yaml", [override], as_json=True)
    assert json.loads(capsys.readouterr().out)["parameters"]["word_embeddings"] == 1024 * 64
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="dataset.json is damaged"):
        command("configs/quickstart.yaml", [override])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quiet_checks_and_prints_nothing(scheme: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("configs/quickstart.yaml", [f"+include=configs/scheme/{scheme}.yaml"], quiet=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="train.steps=0 must be at least 1"):
        command("configs/quickstart.yaml", ["train.steps=0"], quiet=True)


def test_layouts_are_checked_with_the_vocabulary_of_the_data(tmp_path: Path) -> None:
    sizes = ["model.num_attention_heads=3", "model.hidden_size=48", f"data.corpora.0.path={tmp_path}"]
    command("configs/quickstart.yaml", [*sizes, "parallel.tensor=3"], quiet=True)
    (tmp_path / "dataset.json").write_text('{"vocab_size": 1000}')
    with pytest.raises(
        UserError, match=r"is not divisible by parallel\.tensor=3: set model\.vocab_multiple="
    ):
        command("configs/quickstart.yaml", [*sizes, "parallel.tensor=3"], quiet=True)
    with pytest.raises(UserError, match=r"sequence_parallel=true has no effect with parallel\.tensor=1"):
        command("configs/quickstart.yaml", [*sizes, "parallel.sequence_parallel=true"], quiet=True)
