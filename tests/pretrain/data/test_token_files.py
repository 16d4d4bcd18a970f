"""Damaged data sets: refused at the start, or before they reach the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from pretrain.data.dataset_admin import inspect_dataset
from tests.pretrain.data.sets import blend, documents, write_sets


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def damage(path: Path, at: int, new: bytes) -> None:
    content = bytearray(path.read_bytes())
    assert content[at : at + len(new)] != new
    content[at : at + len(new)] = new
    path.write_bytes(content)


def edit(folder: Path, **fields: object) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut index": (lambda red: os.truncate(red / "train.idx", 10), "train.idx has 10 bytes, by dataset.json"),
    "no index": (lambda red: (red / "train.idx").unlink(), "train.idx is missing"),
    "other kind of index": (
        lambda red: damage(red / "train.idx", 17, b"\4"),
        "train.idx has a damaged beginning",
    ),
    "cut tokens": (lambda red: os.truncate(red / "train.bin", 10), "train.bin has 10 bytes"),
    "one token": (lambda red: damage(red / "train.bin", 100, b"\7"), "train.bin or train.idx is damaged"),
    "token beyond": (
        lambda red: damage(red / "train.bin", 100, b"\xff\xff"),
        "train.bin or train.idx is damaged",
    ),
    "one length": (
        lambda red: damage(red / "train.idx", 40, b"\xff\xff"),
        "train.bin or train.idx is damaged",
    ),
    "no tokenizer": (lambda red: (red / "tokenizer.model").unlink(), "tokenizer.model cannot be read"),
    "empty tokenizer": (lambda red: os.truncate(red / "tokenizer.model", 0), "tokenizer.model is damaged"),
    "cut manifest": (lambda red: os.truncate(red / "dataset.json", 10), "dataset.json is damaged"),
    "no splits": (lambda red: edit(red, splits=None), "dataset.json is damaged .splits:"),
    "huge vocabulary": (lambda red: edit(red, vocab_size=10**30), "dataset.json is damaged .vocab_size:"),
    "other format": (lambda red: edit(red, format=[]), "dataset.json has format"),
    "foreign split": (lambda red: edit(red, splits={"../x": {}}), "dataset.json is damaged .splits.../x"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data_sets_are_refused_in_one_line(sets: Path, tmp_path: Path, name: str) -> None:
    """At every start, before anything is computed; so does `inspect`."""
    shutil.copytree(sets / "red", tmp_path / "red")
    breaks, message = DAMAGES[name]
    breaks(tmp_path / "red")
    for look in (lambda: blend(tmp_path, "red"), lambda: inspect_dataset(tmp_path / "red")):
        with pytest.raises(UserError, match=rf"red.*{message}") as caught:
            look()
        assert "\n" not in str(caught.value)
        assert "prepare" in str(caught.value)


def old_manifest(folder: Path) -> None:
    """As version 0.1.0 wrote it."""
    splits = json.loads((folder / "dataset.json").read_text())["splits"]
    keys = ("documents", "tokens", "bytes", "sha256")
    edit(folder, splits={name: {key: facts[key] for key in keys} for name, facts in splits.items()})


def test_data_sets_of_the_first_version_give_the_same_samples(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "red", tmp_path / "red")
    old_manifest(tmp_path / "red")
    np.testing.assert_array_equal(
        blend(tmp_path, "red").batch(range(90)), blend(sets, "red").batch(range(90))
    )
    # The name that the order of samples depends on, as version 0.1.0 computed it.
    assert blend(sets, "red").fingerprints == [
        hashlib.sha256(
            json.dumps(
                [
                    json.loads((tmp_path / "red" / "dataset.json").read_text())["tokenizer_sha256"],
                    "train",
                    json.loads((tmp_path / "red" / "dataset.json").read_text())["splits"]["train"],
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()
    ]


@pytest.mark.parametrize("token", [290, 65535])
def test_tokens_beyond_the_vocabulary_never_leave_the_reader(sets: Path, tmp_path: Path, token: int) -> None:
    """Where the comparison at the start has not seen them, as in a large file."""
    shutil.copytree(sets / "red", tmp_path / "red")
    old_manifest(tmp_path / "red")
    data = blend(tmp_path, "red")
    damage(tmp_path / "red" / "train.bin", 100, token.to_bytes(2, "little"))
    with pytest.raises(
        UserError, match=f"red: train.bin or train.idx is damaged .token {token} in a vocabulary of 290"
    ):
        data.batch(range(data.samples_per_epoch[0]))
    with pytest.raises(UserError, match=f"token {token} in a vocabulary of 290"):
        blend(tmp_path, "red")


def test_an_index_that_does_not_fit_is_refused_before_it_is_used(sets: Path, tmp_path: Path) -> None:
    shutil.copytree(sets / "red", tmp_path / "red")
    old_manifest(tmp_path / "red")
    first_place = 34 + 4 * len(documents(sets, "red"))
    damage(tmp_path / "red" / "train.idx", first_place + 8, b"\xff\xff\xff")
    with pytest.raises(UserError, match="train.idx has documents that do not follow each other"):
        blend(tmp_path, "red")
