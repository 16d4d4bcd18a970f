"""The recipe of docs/finetune.md runs as it stands, on a folder of a tiny BERT."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from model.hf.tokenizer.convert import write_tokenizer
from pretrain.data.reading.inputs import standard_library_files
from pretrain.data.tokens.train import special_names, train_tokenizer

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "finetune.py"


@pytest.mark.slow
def test_the_recipe_learns_to_tell_packages_apart(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    files = [str(path) for path in standard_library_files() if path.parent.name in ("asyncio", "email")]
    tokenizer = tmp_path / "t.model"
    train_tokenizer(files, tokenizer, vocab_size=500, max_bytes=50_000, special=special_names("all"))
    write_tokenizer(tokenizer, tmp_path, 64)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"padding_side": "right"}))
    config = BertConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    options = [
        *("--packages", "asyncio,email", "--snippets", "150", "--length", "48"),
        *("--steps", "120", "--lr", "3e-3", "--seeds", "2"),
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    largest = float(re.findall(r"largest class: ([\d.]+)", done.stdout)[0])
    found = re.findall(r"(pretrained|random) weights: ([\d.]+) .*\+- [\d.]+ over 2 seeds", done.stdout)
    assert [name for name, _ in found] == ["pretrained", "random"]
    assert all(float(right) > largest + 0.1 for _, right in found)
