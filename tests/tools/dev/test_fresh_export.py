"""Exports in an environment that has torch and transformers and no Fathom: the same greedy text as `fathom generate`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.trained.export import export_checkpoint
from pretrain.trained.generate import generate_text
from pretrain.trained.import_hf import import_checkpoint
from tests.tools.gpt2 import save_gpt2
from tools.dev.fresh_export import PROMPTS, continue_there, make_venv

TOKENS = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 as its configuration has it, with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("fresh")
    save_gpt2(folder, n_positions=128)
    import_checkpoint(str(folder), folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "fathom"])
def test_the_same_text_without_fathom(
    checkpoint: Path, tmp_path: Path, architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """FATHOM_FRESH_VENV names an environment to use again; without it one is made, which downloads torch."""
    try:
        python = make_venv(
            Path(os.environ.get("FATHOM_FRESH_VENV") or tmp_path_factory.getbasetemp() / "fresh_venv")
        )
    except UserError as error:
        pytest.skip(f"no fresh environment: {error}")
    export_checkpoint(checkpoint, tmp_path / "hf", architecture=architecture)
    there = continue_there(python, tmp_path / "hf", PROMPTS, TOKENS)
    assert there["class"] == {"gpt2": "GPT2LMHeadModel", "fathom": "FathomForCausalLM"}[architecture]
    assert there["extra"] == []
    assert there["counts"] == [TOKENS] * len(PROMPTS)
    assert there["texts"] == [
        "".join(generate_text(checkpoint, prompt, TOKENS, temperature=0)) for prompt in PROMPTS
    ]


def test_a_failure_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(
        "#!/bin/sh\necho first >&2\necho 'no module named torch' >&2\nexit 1\n"
    )
    (tmp_path / "bin/python").chmod(0o755)
    with pytest.raises(UserError, match="does not work with .*: no module named torch"):
        continue_there(make_venv(tmp_path), tmp_path, PROMPTS, 1)
