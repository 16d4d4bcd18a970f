from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.errors import UserError
from pretrain.data.dataset_admin import verify_data
from tests.pretrain.small import small_data
from tools.text.data import app


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("good"))


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def forget(folder: Path, *keys: str) -> None:
    """Removes what later versions write of each split."""
    content = json.loads((folder / "dataset.json").read_text())
    for facts in content["splits"].values():
        for key in keys:
            del facts[key]
    (folder / "dataset.json").write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "token": (
        lambda data: flip(data / "train.bin", 100),
        "train.bin has another checksum than dataset.json says",
    ),
    "token beyond": (
        lambda data: flip(data / "train.bin", 103, 128),
        "token .* at 51, beyond the vocabulary",
    ),
    "validation": (lambda data: flip(data / "validation.bin", 9), "validation.bin has another checksum"),
    "index": (lambda data: flip(data / "train.idx", 200), "train.idx has another checksum"),
    "cut": (lambda data: os.truncate(data / "train.bin", 9), "train.bin has 9 bytes, by dataset.json it has"),
    "gone": (lambda data: (data / "validation.idx").unlink(), "validation.idx is missing"),
    "tokenizer": (lambda data: flip(data / "tokenizer.model", 50), "tokenizer.model is damaged or another"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify_finds_every_damage(good: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(good, tmp_path / "data")
    breaks, message = DAMAGES[name]
    breaks(tmp_path / "data")
    with pytest.raises(
        UserError, match=rf"data set .*data is damaged: .*{message}.*; prepare or copy the data set again"
    ):
        verify_data(tmp_path / "data")


def test_indexes_without_a_checksum_are_held_against_the_tokens(good: Path, tmp_path: Path) -> None:
    """Data sets of version 0.1.0: an index with any bit flipped no longer fits the tokens."""
    shutil.copytree(good, tmp_path / "data")
    forget(tmp_path / "data", "index_sha256", "sample_sha256")
    assert verify_data(tmp_path / "data").files == 8
    index = tmp_path / "data" / "train.idx"
    for at in range(0, index.stat().st_size, 11):
        flip(index, at)
        with pytest.raises(UserError, match="train.idx has"):
            verify_data(tmp_path / "data")
        flip(index, at)


def test_command(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "bad")
    flip(tmp_path / "bad" / "train.bin", 100)
    os.truncate(tmp_path / "bad" / "validation.bin", 2)
    runner = CliRunner()
    result = runner.invoke(app, ["verify", str(good)])
    assert (result.exit_code, result.output.strip()) == (
        0,
        f"{good}: 8 files and {verify_data(good).tokens:,} tokens are whole",
    )
    result = runner.invoke(
        app, ["verify", str(tmp_path / "bad"), str(tmp_path / "none"), str(good), "--json"]
    )
    assert isinstance(result.exception, UserError)
    assert "no readable dataset.json" in str(result.exception)
    found = json.loads(result.stdout)
    assert [one["folder"] for one in found["whole"]] == [str(good)]
    assert "train.bin has another checksum" in found["damaged"][0]
    assert "validation.bin has 2 bytes" in found["damaged"][0]
    assert "train.bin has another checksum" in result.stderr
