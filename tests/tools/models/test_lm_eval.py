"""lm-evaluation-harness on exported folders, as users run it.

`lm_eval --model hf`, a local task, no network.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from model.config import ModelConfig
from model.hf.export import export
from model.hf.reference import Evaluation
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import train_tokenizer
from tests.forks import shell_environment
from tests.model.hf.tiny import LOGIT_SCALE, make_config, make_weights

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
        reason="lm_eval or accelerate is not installed",
    ),
]
SIZE, POSITIONS = 300, 32
QUESTIONS = [
    ("the deep", [" layer", " signal norm"], 0),
    ("norm of", [" a", " the deep layer", " residual"], 2),
    ("signal", [" deep", " norm"], 1),
]
PAGES = ["the deep layer\nhas a norm", "signal of the residual stream, deep", "layer"]
LLAMA = {"normalization": "rmsnorm", "position": "rotary", "activation": "swiglu", "num_query_groups": 2}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"scheme": "pre_ln"},
    "llama": {
        "scheme": "deepscalelm_pre_ln",
        "norm_epsilon": 1e-6,
        **LLAMA,
    },  # the fold moves logits in proportion to epsilon
    "opt": {"scheme": "deepscalelm_post_ln"},
    "fathom": {"scheme": "b2t"},
}


def write_tasks(folder: Path) -> None:
    """A multiple-choice task and a perplexity task over one local file."""
    rows = [
        {"question": q, "choices": c, "answer": a, "page": p}
        for (q, c, a), p in zip(QUESTIONS, PAGES, strict=True)
    ]
    (folder / "data.json").write_text("\n".join(map(json.dumps, rows)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.json")}},
        "test_split": "test",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
    }
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{page}}"}
    metrics = {"next_word": ["acc"], "pages": ["byte_perplexity", "word_perplexity"]}
    for name, task in (("next_word", choice), ("pages", rolling)):
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {"task": name, **common, **task, "metric_list": [{"metric": m} for m in metrics[name]]}
            )
        )


def export_model(folder: Path, architecture: str) -> tuple[dict[str, torch.Tensor], ModelConfig, Tokenizer]:
    """Writes a tokenizer and an export into a folder.

    Returns weights, configuration and tokenizer.
    """
    (folder / "text.txt").write_text("the deep layer has a norm of the signal in the residual stream\n" * 300)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", SIZE)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    config = make_config(**CASES[architecture], vocab_size=tokenizer.vocab_size)
    weights = make_weights(config, positions=POSITIONS)
    export(
        weights,
        config,
        folder / "hf",
        logit_scale=LOGIT_SCALE,
        tokenizer=folder / "tokenizer.model",
        seq_length=POSITIONS,
        architecture=architecture,
    )
    return weights, config, tokenizer


def harness(folder: Path, architecture: str) -> dict[str, Any]:
    """Results by task of `lm_eval` on the export in a folder."""
    arguments = f"pretrained={folder / 'hf'}" + (
        ",trust_remote_code=True" if architecture == "fathom" else ""
    )
    command = [
        "--model",
        "hf",
        "--model_args",
        arguments,
        "--tasks",
        "next_word,pages",
        "--include_path",
        str(folder),
        "--device",
        "cpu",
    ]
    env = shell_environment()  # other tests of this process may have made it a rank
    env |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    lm_eval = str(Path(sys.executable).with_name("lm_eval"))
    done = subprocess.run(
        [lm_eval, *command, "--batch_size", "1", "--output_path", str(folder / "out.json")],
        capture_output=True,
        text=True,
        env=env,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(next(folder.glob("out*.json")).read_text())["results"]
    return results


@pytest.mark.parametrize("architecture", CASES)
def test_the_harness_gives_what_our_own_logits_give(tmp_path: Path, architecture: str) -> None:
    weights, config, tokenizer = export_model(tmp_path, architecture)
    write_tasks(tmp_path)
    results = harness(tmp_path, architecture)

    def logprob(context: list[int], ids: list[int]) -> float:
        logits = Evaluation(weights, config, logit_scale=LOGIT_SCALE)(torch.tensor([context + ids[:-1]]))[
            0, len(context) - 1 :
        ]
        return float(logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())

    right = 0
    for question, choices, answer in QUESTIONS:
        context = tokenizer.encode(question)
        scores = [logprob(context, tokenizer.encode(question + choice)[len(context) :]) for choice in choices]
        right += scores.index(max(scores)) == answer
    nats = -sum(logprob([tokenizer.eod_id], tokenizer.encode(page)) for page in PAGES)
    assert results["next_word"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert results["pages"]["byte_perplexity,none"] == pytest.approx(
        math.exp(nats / sum(len(page.encode()) for page in PAGES)), rel=1e-4
    )
    assert results["pages"]["word_perplexity,none"] == pytest.approx(
        math.exp(nats / sum(len(page.split()) for page in PAGES)), rel=1e-3
    )
