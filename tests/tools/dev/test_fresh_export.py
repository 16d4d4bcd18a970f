"""Exports in an environment that has torch and transformers and no Fathom.

They give the same greedy text as `fathom generate`.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.generate import generate_text
from tests.tools.small_models import save_gpt2, save_llama, save_opt
from tools.dev.fresh_export import PROMPTS, continue_there, make_venv

TOKENS = 64
OLDEST = "4.51.3"
"""The oldest version of transformers that exports are promised to work with."""
MODELS = {"gpt2": save_gpt2, "llama": save_llama, "opt": save_opt, "fathom": save_gpt2}
POSITIONS = {"gpt2": "n_positions", "fathom": "n_positions"}
CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "opt": "OPTForCausalLM",
    "fathom": "FathomForCausalLM",
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(class, checkpoint, export) of a model with random weights and a tokenizer."""
    folder = tmp_path_factory.mktemp("fresh")
    positions = POSITIONS.get(request.param, "max_position_embeddings")
    MODELS[request.param](folder, **{positions: 128})
    import_checkpoint(str(folder), folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", folder / "hf", architecture=request.param)
    return CLASSES[request.param], folder / "checkpoint", folder / "hf"


@pytest.fixture(scope="module", params=[None, OLDEST], ids=["this version", OLDEST])
def there(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(version of transformers, interpreter) of an environment without Fathom.

    FATHOM_FRESH_VENVS names a folder that keeps them.
    Without it they are made anew, which downloads torch.
    """
    wanted = request.param or version("transformers")
    kept = os.environ.get("FATHOM_FRESH_VENVS")
    folder = Path(kept) if kept else tmp_path_factory.getbasetemp() / "fresh_venvs"
    try:
        return wanted, make_venv(folder / wanted, wanted)
    except UserError as error:
        pytest.skip(f"no fresh environment: {error}")


@pytest.mark.slow
def test_the_same_text_without_fathom(model: tuple[str, Path, Path], there: tuple[str, Path]) -> None:
    kind, checkpoint, exported = model
    found = continue_there(there[1], exported, PROMPTS, TOKENS)
    assert (found.kind, found.transformers, found.extra) == (kind, there[0], [])
    assert found.counts == [TOKENS] * len(PROMPTS)
    ours = ["".join(generate_text(checkpoint, prompt, TOKENS, temperature=0)) for prompt in PROMPTS]
    assert found.texts == ours


def test_a_failure_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(
        "#!/bin/sh\necho first >&2\necho 'no module named torch' >&2\nexit 1\n"
    )
    (tmp_path / "bin/python").chmod(0o755)
    with pytest.raises(UserError, match="does not work with .*: no module named torch"):
        continue_there(make_venv(tmp_path), tmp_path, PROMPTS, 1)
