"""Exports of checkpoints whose surroundings others wrote.

Provenance that is damaged is left out, ids are typed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from model.errors import UserError
from parallel.checkpoint.format import manifest_text
from pretrain.trained.folders.export import export_checkpoint, provenance
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.open import open_trained
from tests.tools.small_models import save_gpt2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "source").mkdir()
    save_gpt2(folder / "source", n_positions=32)
    (folder / "source/tokenizer.model").unlink()
    import_checkpoint(str(folder / "source"), folder / "checkpoints")
    return folder


@pytest.mark.parametrize(
    ("content", "commit"),
    [
        ('{"git": {"commit": "abc", "dirty": true}}', "abc with local changes"),
        ('{"git": {"commit": "abc"}}', "abc"),
        ('{"git": null}', None),
        ('{"git": 5}', None),
        ('{"git": {"commit": 7}}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_a_damaged_environment_is_left_out(run: Path, content: str | None, commit: str | None) -> None:
    path = run / "environment.json"
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    else:
        path.write_text(content)
    try:
        assert provenance(open_trained(run)).get("code commit") == commit
    finally:
        path.unlink()


@pytest.mark.parametrize("special", [5, [], {"eos_token_id": "x"}, {"eos_token_id": [1, None]}])
def test_special_tokens_that_are_no_ids_are_one_line(run: Path, tmp_path: Path, special: object) -> None:
    path = run / "checkpoints/step_00000000/manifest.json"
    before = path.read_text()
    manifest = json.loads(before)
    manifest["progress"]["special_tokens"] = special
    path.write_text(manifest_text(manifest))
    try:
        if special == []:  # none, as where there are none
            assert export_checkpoint(run, tmp_path / "out").path == tmp_path / "out"
            return
        with pytest.raises(UserError, match=r"manifest\.json, special_tokens is damaged"):
            export_checkpoint(run, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    finally:
        path.write_text(before)


def test_a_target_that_is_taken_is_said_before_anything_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    weights = run / "checkpoints/step_00000000/rank_00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    before = weights.read_bytes()
    weights.write_bytes(bytes(content))
    try:
        with pytest.raises(UserError, match="something else than an exported model"):
            export_checkpoint(run, tmp_path)
    finally:
        weights.write_bytes(before)
