"""`fathom import`, `fathom export` and `fathom generate` on real files, from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.config import ModelConfig
from parallel.checkpoint.reader import open_checkpoint
from pretrain.trained.folders import import_hf
from tests.tools.small_models import save_gpt2
from tools.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face GPT-2 with a SentencePiece model beside it."""
    folder = tmp_path_factory.mktemp("source")
    save_gpt2(folder, n_positions=32, activation_function="gelu")
    return folder


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    limit, import_hf.FILE_BYTES = import_hf.FILE_BYTES, 20_000
    try:
        fathom("import", str(source), str(folder), "--quiet")
    finally:
        import_hf.FILE_BYTES = limit
    assert len(list(folder.glob("step_00000000/*.safetensors"))) > 3
    model = yaml.safe_load((folder / "model.yaml").read_text())["model"]
    assert ModelConfig(**model) == ModelConfig.model_validate(open_checkpoint(folder).sections.model)
    return folder


def fathom(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert not left.value.code


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_model_comes_back_bit_by_bit(
    source: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom("export", str(checkpoint), str(tmp_path / "hf"), "--json", "--max-shard-size", "100KB")
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (facts["architecture"], facts["dtype"], facts["tokenizer_ties"]) == ("gpt2", "float32", 0)
    assert facts["logit_difference"] <= facts["allowed"] <= 1e-4
    assert sum(name.endswith(".safetensors") for name in facts["files"]) > 1
    stored = {
        name: tensor
        for path in (tmp_path / "hf").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    original = load_file(source / "model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in stored)
    card = (tmp_path / "hf/README.md").read_text()
    assert "| training step | 0 |" in card
    assert str(source) in card
    fathom(
        "export",
        str(checkpoint),
        str(tmp_path / "hf"),
        "--overwrite",
        "--dtype",
        "bfloat16",
        "--architecture",
        "gpt2",
    )
    text = capsys.readouterr().out
    assert "gpt2, " in text
    assert "bfloat16" in text
    assert "proved: largest logit difference" in text


def test_the_tokenizer_can_be_left_out_or_copied(
    checkpoint: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom("export", str(checkpoint), str(tmp_path / "own"))
    fathom("export", str(checkpoint), str(tmp_path / "none"), "--tokenizer", "none")
    assert capsys.readouterr().out.endswith("the export has no tokenizer\n")
    assert not list((tmp_path / "none").glob("tokenizer*"))
    ids = [
        json.loads((tmp_path / "none" / "config.json").read_text())[f"{mark}_token_id"]
        for mark in ("bos", "eos", "pad")
    ]
    assert ids == [
        json.loads((source / "config.json").read_text()).get(f"{mark}_token_id")
        for mark in ("bos", "eos", "pad")
    ]
    fathom("export", str(checkpoint), str(tmp_path / "copied"), "--tokenizer", str(tmp_path / "own"))
    assert f"tokenizer: copied from {tmp_path / 'own'}, not proved" in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        assert (tmp_path / "copied" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    assert (tmp_path / "copied" / "generation_config.json").read_bytes() == (
        tmp_path / "own" / "generation_config.json"
    ).read_bytes()
    assert "copied from" in (tmp_path / "copied" / "README.md").read_text()
    for given, reason in (
        ("nowhere", "--tokenizer nowhere is no folder"),
        (str(tmp_path), "is no folder with a tokenizer_config.json"),
    ):
        assert reason in refused(
            capsys, "export", str(checkpoint), str(tmp_path / "no"), "--tokenizer", given
        )
    assert not (tmp_path / "no").exists()


def test_batches_are_continued_with_the_exports_own_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fathom("export", str(checkpoint), str(tmp_path / "hf"), "--quiet")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval(),
    )
    texts = ["a", "a longer text than that"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    together = model.generate(**batch, max_new_tokens=4, do_sample=False)
    for text, row in zip(texts, together, strict=True):
        alone = tokenizer(text, return_tensors="pt")
        assert (
            row[-4:].tolist() == model.generate(**alone, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        )


def test_greedy_text_equals_that_of_the_export(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom("export", str(checkpoint), str(tmp_path / "hf"), "--quiet")
    assert capsys.readouterr().out == ""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        AutoTokenizer.from_pretrained(tmp_path / "hf"),
    )
    for prompt in ("the signal", ""):
        fathom(
            "generate",
            str(checkpoint),
            "--prompt",
            prompt,
            "--max-new-tokens",
            "12",
            "--temperature",
            "0",
            "--json",
        )
        ours = json.loads(capsys.readouterr().out)
        ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eos_token_id]])
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert ours["continuation"] == tokenizer.decode(new, skip_special_tokens=True)
    fathom("generate", str(checkpoint), "--prompt", "the signal", "--max-new-tokens", "12", "--seed", "3")
    assert capsys.readouterr().out.startswith("the signal")


def test_mistakes_are_one_line(
    checkpoint: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no checkpoint" in refused(capsys, "export", str(tmp_path), str(tmp_path / "x"))
    assert "the model LayerNorm" in refused(
        capsys, "export", str(checkpoint), str(tmp_path / "x"), "--architecture", "llama"
    )
    long = refused(capsys, "generate", str(checkpoint), "--prompt", "the", "--max-new-tokens", "64")
    assert "--max-new-tokens 64 does not fit" in long
    assert "--temperature -1.0" in refused(
        capsys, "generate", str(checkpoint), "--temperature", "-1", "--max-new-tokens", "4"
    )
    for greedy, useless in (
        (("--temperature", "0"), ("--top-p", "0.5")),
        (("--temperature", "0"), ("--top-k", "3")),
        (("--temperature", "0"), ("--seed", "3")),
        (("--top-k", "1"), ("--temperature", "0.5")),
    ):
        line = refused(capsys, "generate", str(checkpoint), *greedy, *useless)
        assert f"{' '.join(useless)} has no effect with {' '.join(greedy)}, which" in line
    assert "--seed -1 must be at least 0" in refused(capsys, "generate", str(checkpoint), "--seed", "-1")
    assert "is there already" in refused(capsys, "import", str(source), str(checkpoint))
    assert "has no config.json" in refused(capsys, "import", str(tmp_path), str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_not_exported(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fathom("import", str(source), str(tmp_path / "c"), "--quiet")
    path = tmp_path / "c/step_00000000/rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    assert "is damaged" in refused(capsys, "export", str(tmp_path / "c"), str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
