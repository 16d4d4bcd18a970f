"""The recipe of docs/finetune.md runs as it stands, on a folder of a tiny BERT."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from model.hf.tokenizer.convert import write_tokenizer
from pretrain.data.reading.inputs import standard_library_files
from pretrain.data.tokens.train import special_names, train_tokenizer

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "finetune.py"


@pytest.mark.slow
def test_the_recipe_learns_to_tell_tokens_apart(tmp_path: Path) -> None:
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
        *("--snippets", "64", "--test", "40", "--length", "48", "--batch", "16"),
        *("--steps", "120", "--lrs", "3e-3,1e-2", "--seeds", "2"),
    ]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    largest = float(re.findall(r"most frequent tag: ([\d.]+)", done.stdout)[0])
    lines = r"(pretrained|random) weights, rate ([\d.]+): ([\d.]+) .*\+- [\d.]+ over 2 seeds"
    found = re.findall(lines, done.stdout)
    assert [(name, rate) for name, rate, _ in found] == [
        (name, rate) for rate in ("0.003", "0.01") for name in ("pretrained", "random")
    ]
    assert all(float(right) > largest + 0.1 for *_, right in found)


def test_tags_are_those_of_the_library_itself() -> None:
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["finetune"] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    text = 'def f(x):\n    return x.y(1) + "a"  # no\n'
    named = [("" if tag < 0 else recipe.TAGS[tag]) for tag in recipe._tags(text)]
    told = [
        (name, "".join(c for _, c in group))
        for name, group in groupby(zip(named, text, strict=True), lambda one: one[0])
    ]
    assert [(name, part) for name, part in told if name] == [
        ("keyword", "def"),
        ("defined", "f"),
        ("operator", "("),
        ("name", "x"),
        ("operator", "):"),
        ("keyword", "return"),
        ("name", "x"),
        ("operator", "."),
        ("attribute", "y"),
        ("operator", "("),
        ("number", "1"),
        ("operator", ")"),
        ("operator", "+"),
        ("string", '"a"'),
        ("comment", "# no"),
    ]
