"""Counts of tokens: prepared with the data, made up for where they are not, mixed by weight."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.errors import UserError
from pretrain.config.schema import Corpus
from pretrain.data.blend import open_blend
from pretrain.data.dataset_admin import verify_data
from pretrain.data.frequencies import COUNTS, count_tokens, token_counts
from pretrain.data.manifest import load_manifest
from tests.pretrain.data.sets import blend, documents, write_sets


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("sets"))


def expected(sets: Path, name: str) -> np.ndarray:
    """Counted from the documents."""
    counts = np.zeros(load_manifest(sets / name).vocab_size, dtype=np.int64)
    for document in documents(sets, name):
        for token in document:
            counts[token] += 1
    return counts


def older(sets: Path, folder: Path, name: str = "red") -> Path:
    """The data set as version 0.1.0 has it."""
    shutil.copytree(sets / name, folder / name)
    (folder / name / COUNTS).unlink()
    path = folder / name / "dataset.json"
    content = json.loads(path.read_text())
    del content["token_counts_sha256"]
    path.write_text(json.dumps(content))
    return folder / name


def test_prepared_counts_are_those_of_train(sets: Path, tmp_path: Path) -> None:
    manifest, counts = load_manifest(sets / "red"), expected(sets, "red")
    assert np.array_equal(token_counts(sets / "red", manifest, tmp_path, alone=False), counts)
    assert np.array_equal(count_tokens(sets / "red", manifest), counts)
    assert not list(tmp_path.iterdir()), "counts that are there were kept a second time"


def test_a_blend_weighs_data_sets_and_not_their_sizes(sets: Path) -> None:
    red, blue = (expected(sets, name).astype(float) for name in ("red", "blue"))
    alone = blend(sets, "red").log_frequencies().exp().numpy()
    np.testing.assert_allclose(alone, (red + 1) / (red + 1).sum(), rtol=1e-12)
    mixed = blend(sets, "red", "blue", weights=(1.0, 3.0)).log_frequencies().exp().numpy()
    share = red / red.sum() / 4 + 3 * blue / blue.sum() / 4
    whole = share * (red.sum() + blue.sum()) + 1
    np.testing.assert_allclose(mixed, whole / whole.sum(), rtol=1e-12)


def test_older_data_are_counted_once_and_left_as_they_are(
    sets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = older(sets, tmp_path), tmp_path / "cache"
    before = sorted(path.name for path in folder.iterdir())
    manifest = load_manifest(folder)
    for _ in range(2):
        assert np.array_equal(token_counts(folder, manifest, cache, False), expected(sets, "red"))
    (record,) = caplog.records
    assert record.message == f"counting the tokens of {folder}, which was prepared by an earlier version"
    assert sorted(path.name for path in folder.iterdir()) == before
    (kept,) = cache.iterdir()
    content = bytearray(kept.read_bytes())
    content[-20] ^= 1
    kept.write_bytes(content)
    assert np.array_equal(token_counts(folder, manifest, cache, False), expected(sets, "red"))


def test_where_nothing_can_be_kept_a_process_by_itself_counts_each_time_and_says_so(
    sets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = older(sets, tmp_path), Path("/proc/nobody writes here")
    for times in (1, 2):
        counts = token_counts(folder, load_manifest(folder), cache, True)
        assert np.array_equal(counts, expected(sets, "red"))
        assert len(caplog.records) == times
    with pytest.raises(UserError, match=r"data\.cache"):
        token_counts(folder, load_manifest(folder), cache, False)


@pytest.mark.parametrize("damage", ["flip", "gone", "fifo", "other"])
def test_damaged_counts_are_one_line(sets: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "red"
    shutil.copytree(sets / "red", folder)
    path = folder / COUNTS
    content = bytearray(path.read_bytes())
    path.unlink()
    problem = "has another checksum than dataset.json says"
    if damage == "flip":
        content[200] ^= 1
        path.write_bytes(content)
    elif damage == "gone":
        problem = r"cannot be read \(No such file or directory\)"
    elif damage == "fifo":
        os.mkfifo(path)
        problem = "is no regular file"
    else:
        shutil.copy(sets / "blue" / COUNTS, path)
    with pytest.raises(UserError, match=f"data set .*red: {COUNTS} {problem}; prepare or copy"):
        open_blend([Corpus(path=str(folder))], "train", 32, 1, tmp_path).log_frequencies()
    with pytest.raises(UserError, match=f"is damaged: {COUNTS} {problem}; prepare or copy"):
        verify_data(folder)


def test_a_token_beyond_the_vocabulary_is_found_by_counting(sets: Path, tmp_path: Path) -> None:
    folder = older(sets, tmp_path)
    content = bytearray((folder / "train.bin").read_bytes())
    content[101] = 255
    (folder / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train\.bin or train\.idx is damaged \(token \d+ in a vocabulary"):
        count_tokens(folder, load_manifest(folder))
