"""`python -m benchmarks.documents`: what `data.document_mask` costs, and does to perplexity.

One model is trained twice on the docstrings of Python's library, of which a window holds several:
with the mask and without, on the same windows in the same order. Both are measured on held-out
windows as they were trained, and the one without also as if it had been. All three predict the
same tokens. The cost is that of one step of that model with the mask over one without, by turns.
"""

from __future__ import annotations

import ast
import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.results import write_results
from benchmarks.turns import spread, turns

SEQ, VOCAB = 256, 1024
MODEL = {
    "scheme": "deepscalelm_pre_ln",
    "scheme_options": {"alpha": 2.0, "k": 4.0},
    "init": {"unigram": True},
    "num_layers": 12,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
}


def docstrings() -> Iterator[str]:
    """Those of modules, classes and functions of the standard library, at least 20 characters."""
    from pretrain.data.reading.inputs import standard_library_files

    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in standard_library_files():
        try:
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and len(text) >= 20:
                yield text


def prepared(folder: Path) -> Path:
    """The data set."""
    from pretrain.data.prepare import PrepareOptions, prepare
    from pretrain.data.tokens.train import train_tokenizer

    texts = folder / "docstrings.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in docstrings()))
    train_tokenizer([str(texts)], folder / "tokenizer.model", VOCAB, "bpe")
    split = (0.95, 0.05, 0.0)
    prepare(PrepareOptions([str(texts)], folder / "data", folder / "tokenizer.model", split=split, workers=1))
    return folder / "data"


def run_of(data: Path, folder: Path, steps: int, masked: bool) -> Any:
    """The configuration of one of the two runs."""
    from pretrain.config.schema import RunConfig

    return RunConfig.model_validate(
        {
            "name": "with" if masked else "without",
            "runs_dir": str(folder / "runs"),
            "model": MODEL | {"max_position_embeddings": SEQ},
            "data": {"corpora": [{"path": str(data)}], "seq_length": SEQ, "document_mask": masked},
            "optimizer": {"lr": 8e-3, "factors": {"embedding": {"rate": "sqrt(hidden)"}}},
            "schedule": {"warmup_steps": 40},
            "train": {
                "steps": steps,
                "global_batch_size": 8,
                "micro_batch_size": 8,
                "eval_samples": 128,
                "precision": "fp32",
            },
            "log": {"signal_interval": 0, "progress": "none", "tensorboard": False},
        }
    )


def trained(config: Any) -> Path:
    """Trains it in this process; returns the run's folder."""
    from parallel.launch.one_process import single_process
    from pretrain.data.samples import open_samples
    from pretrain.train.build import build_engine
    from pretrain.train.loop import Trainer

    samples = [open_samples(config, "next_token", split) for split in ("train", "validation")]
    folder = Path(config.runs_dir) / config.name
    folder.mkdir(parents=True)
    engine = build_engine(config, single_process(), samples[0].blend.log_frequencies())
    Trainer(config, folder, engine, samples[0], samples[1], []).run()
    return folder


def nats(folder: Path, masked: bool) -> tuple[float, int]:
    """Loss of a run on the whole validation split, and how many tokens that are."""
    from pretrain.trained.measures.windows import Asked, open_windows
    from pretrain.trained.open import open_trained
    from pretrain.trained.scorer import Scorer

    found = open_trained(folder)
    windows = open_windows(found, None, Asked(batch_size=16))
    scorer = Scorer(found, "fp32")
    scorer.end_mark = 2 if masked else None  # of our tokenizers
    losses = [scorer.losses(batch).double() for batch, _ in windows.batches]
    return float(torch.cat(losses).mean()), sum(loss.numel() for loss in losses)


def cost(data: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Time of a step with the mask over one without, in the same round."""
    from parallel.launch.one_process import single_process
    from pretrain.data.samples import open_samples
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.build import build_engine
    from pretrain.train.steps import training_step

    actions = {}
    for masked in (False, True):
        config = run_of(data, folder, 100, masked)
        samples = open_samples(config, "next_token", "train")
        engine = build_engine(config, single_process(), samples.blend.log_frequencies())
        batches = [samples.batch(range(8))]
        actions[str(masked)] = functools.partial(
            engine.train_step, training_step(CAUSAL_LM), functools.partial(iter, batches), 1
        )
    seconds = turns(actions, rounds)
    return spread([a / b for a, b in zip(seconds["True"], seconds["False"], strict=True)])


def main(
    steps: int = typer.Option(400, min=50, help="Steps of each run."),
    rounds: int = typer.Option(9, min=3, help="Counted rounds of the cost."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print."""
    from parallel.launch.one_process import single_process

    torch.set_num_threads(1)
    single_process()
    with tempfile.TemporaryDirectory(prefix="fathom-documents-") as name:
        folder = Path(name)
        data = prepared(folder)
        manifest = json.loads((data / "dataset.json").read_text())["splits"]["train"]
        ratio = cost(data, folder, rounds)
        found: dict[str, float] = {}
        for masked in (False, True):
            run = trained(run_of(data, folder, steps, masked))
            for hidden in (False, True) if not masked else (True,):
                found[f"trained {run.name}, measured {'with' if hidden else 'without'}"], tokens = nats(
                    run, hidden
                )
    report = {
        "steps": steps,
        "tokens_per_document": manifest["tokens"] / manifest["documents"],
        "validation_tokens": tokens,
        "nats_per_token": found,
        "step_with_mask_over_without": ratio,
    }
    print(json.dumps(report, indent=1))
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
