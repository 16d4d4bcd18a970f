"""llama.cpp's converter takes exports, and its file holds their weights, settings and tokenizer.

The file is read by transformers. FATHOM_LLAMA_CPP names a checkout of llama.cpp.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.forks import shell_environment
from tests.model.hf.clients import DECODERS, PROMPTS, exported, make_tokenizer

CONVERTER = Path(os.environ.get("FATHOM_LLAMA_CPP", ""), "convert_hf_to_gguf.py")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTER.is_file(), reason="FATHOM_LLAMA_CPP names no checkout of llama.cpp"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed"),
]


@pytest.mark.parametrize("target", ["llama", "mistral"])
def test_a_converted_export_is_the_same_model(target: str, tmp_path: Path) -> None:
    made = exported(tmp_path / "hf", target, make_tokenizer(tmp_path), **DECODERS[target])
    command = [sys.executable, str(CONVERTER), str(made.folder), "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", str(tmp_path / "model.gguf")],
        capture_output=True,
        text=True,
        env=shell_environment(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(made.folder)
    codec = AutoTokenizer.from_pretrained(made.folder)
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for prompt in PROMPTS:
        ids = codec(prompt)["input_ids"]
        assert other(prompt, add_special_tokens=False)["input_ids"] == ids
        with torch.no_grad():
            wanted, found = (model.eval()(torch.tensor([ids])).logits for model in (ours, theirs))
        assert torch.equal(wanted, found)
