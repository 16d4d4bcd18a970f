"""Fine-tunes an exported encoder as a classifier of text: which package is a piece of code from?

    python docs/examples/finetune.py runs/NAME/hf

Nothing is fetched: the texts are those of Python's standard library, some lines at a time, with the
package's own name taken out. Files are either for training or for the test, never for both. The
same model with other weights is trained beside it, which shows what pretraining was good for:
random ones as transformers draws them, or those of `--against`, an export of an untrained run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import statistics
import sysconfig
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

LINES = 12
"""Of one snippet."""


@dataclass(frozen=True)
class Snippet:
    """Some lines of one file."""

    text: str
    label: int
    test: bool


def snippets(packages: list[str], most: int) -> list[Snippet]:
    """At most `most` of each package for training, and a quarter of that for the test."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), []
    for label, package in enumerate(packages):
        files = sorted(path for path in (root / package).rglob("*.py") if "__pycache__" not in path.parts)
        if not files:
            raise SystemExit(f"--packages {package}: no files in {root / package}")
        own = [part for path in files for part in _parts(path, root, label, package)]
        random.Random(0).shuffle(own)
        found += [part for part in own if not part.test][:most]
        found += [part for part in own if part.test][: max(most // 4, 1)]
    return found


def _parts(path: Path, root: Path, label: int, package: str) -> list[Snippet]:
    name = path.relative_to(root).as_posix()
    test = hashlib.sha256(name.encode()).digest()[0] < 64  # of a quarter of all files
    text = re.sub(rf"\b{package}\b", "this", path.read_text(encoding="utf-8", errors="ignore"))
    lines = [line for line in text.splitlines(keepends=True) if line.strip()]
    groups = ["".join(lines[at : at + LINES]) for at in range(0, len(lines), LINES)]
    return [Snippet(group, label, test) for group in groups]


def accuracy(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, data: list[Snippet], seed: int
) -> float:
    """Trains a model and returns the share of test snippets that it tells right."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    def encoded(test: bool) -> list[dict[str, Any]]:
        return [
            {**tokenizer(each.text, truncation=True, max_length=arguments.length), "labels": each.label}
            for each in data
            if each.test == test
        ]

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=arguments.steps,
                learning_rate=arguments.lr,
                warmup_steps=arguments.steps // 10,
                per_device_train_batch_size=arguments.batch,
                per_device_eval_batch_size=arguments.batch,
                weight_decay=0.01,
                seed=seed,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
            ),
            train_dataset=encoded(test=False),
            eval_dataset=encoded(test=True),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda result: {
                "right": float((result.predictions.argmax(-1) == result.label_ids).mean())
            },
        )
        trainer.train()
        return float(trainer.evaluate()["eval_right"])


def main() -> None:
    """Reads the command line, trains, and prints a line for each kind of weights."""
    parser = argparse.ArgumentParser(description="Fine-tune an exported encoder as a classifier.")
    parser.add_argument("folder", help="folder written by `fathom export`")
    parser.add_argument("--packages", default="asyncio,email,importlib,multiprocessing,unittest,xml")
    parser.add_argument("--snippets", type=int, default=400, help="for training, of each package")
    parser.add_argument("--length", type=int, default=128, help="tokens of a snippet at most")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each kind")
    parser.add_argument("--against", help="folder of the same model untrained; default: random weights")
    parser.add_argument("--trust", action="store_true", help="run the modelling code in the folder")
    arguments = parser.parse_args()

    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    packages = arguments.packages.split(",")
    data = snippets(packages, arguments.snippets)
    classes = Counter(each.label for each in data if each.test)
    if len(classes) < len(packages):
        raise SystemExit("--packages: one of them has no file for the test; name larger ones")
    largest = max(classes.values()) / sum(classes.values())
    known = {"trust_remote_code": arguments.trust}
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder, **known)
    config = AutoConfig.from_pretrained(arguments.folder, num_labels=len(packages), **known)
    print(f"{len(data) - sum(classes.values())} snippets for training, {sum(classes.values())} for the test")
    print(f"share of the largest class: {largest:.3f}")
    auto = AutoModelForSequenceClassification
    if arguments.against:
        other = ("untrained weights", lambda: auto.from_pretrained(arguments.against, config=config, **known))
    else:
        other = ("random weights", lambda: auto.from_config(config, **known))
    for name, make in (
        ("pretrained weights", lambda: auto.from_pretrained(arguments.folder, config=config, **known)),
        other,
    ):
        right = []
        for seed in range(arguments.seeds):
            set_seed(seed)  # of the classifier's weights, before the model is made
            right.append(accuracy(arguments, make(), tokenizer, data, seed))
        spread = f" +- {statistics.stdev(right):.3f} over {len(right)} seeds" if len(right) > 1 else ""
        print(f"{name}: {statistics.mean(right):.3f} of the test snippets told right{spread}")


if __name__ == "__main__":
    main()
