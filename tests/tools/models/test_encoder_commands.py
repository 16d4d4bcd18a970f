"""`fathom fill`, `fathom eval` and `fathom import` of encoders, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForPreTraining

from tests.pretrain.trained.encoders import save_encoder
from tools.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, position="rotary")
    return folder


def fathom(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert (left.value.code or 0) == code


def test_fill(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fathom("fill", str(folder / "run"), "the [MASK] layers", "--top", "2")
    place, text = capsys.readouterr().out.splitlines()
    assert place.startswith("place 1: ")
    assert text.startswith("the")
    assert text.endswith(" layers")
    fathom("fill", str(folder / "run"), "the [MASK] layers", "--json")
    assert len(json.loads(capsys.readouterr().out)["places"][0]) == 5


def test_chat_is_for_other_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fathom("chat", str(folder / "run"), code=2)
    assert "use `fathom fill`" in capsys.readouterr().err


def test_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, data = str(folder / "run"), str(folder / "data")
    fathom("eval", run, "--data", data, "--samples", "3")
    assert "pseudo-perplexity" in capsys.readouterr().out
    fathom("eval", run, "--data", data, "--samples", "3", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert 0 <= facts["accuracy"] <= 1
    assert facts["samples"] == 3
    fathom("eval", run, "--text", data, code=2)
    assert "--text: has no effect on an encoder" in capsys.readouterr().err


def test_an_import_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForPreTraining(config).save_pretrained(tmp_path / "source")
    capsys.readouterr()
    fathom("import", str(tmp_path / "source"), str(tmp_path / "checkpoint"))
    told = capsys.readouterr().out
    assert "bert.pooler.dense.weight" in told
    assert "cls.seq_relationship.bias" in told
