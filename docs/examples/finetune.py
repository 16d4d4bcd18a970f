"""Fine-tunes an exported encoder as a tagger: what is each token of a piece of Python?

    python docs/examples/finetune.py runs/NAME/hf --against runs/UNTRAINED/hf

Nothing is fetched: the texts are those of Python's standard library, some lines at a time, and the
library's own `tokenize` says what is a keyword, a name, an attribute, a string and so on. Files are
either for training or for the test, never for both. The same model with other weights is trained
beside it, with the same rates, which shows what pretraining was good for: random ones as
transformers draws them, or those of `--against`, an export of an untrained run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import keyword
import os
import random
import statistics
import sysconfig
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

LINES = 8
"""Of one snippet."""
TAGS = ("keyword", "name", "attribute", "called", "defined", "operator", "number", "string", "comment")
"""called: a name before a bracket; defined: one after def or class."""
NONE = -100
"""The label of what is not told: white space and special tokens."""


@dataclass(frozen=True)
class Snippet:
    """Some lines of one file."""

    text: str
    tags: tuple[int, ...]
    """Of each character."""


def snippets(training: int, testing: int, seed: int) -> tuple[list[Snippet], list[Snippet]]:
    """So many for training, drawn by a seed, and so many for the test, the same for all seeds."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[Path]] = {True: [], False: []}
    for path in sorted(root.glob("*.py")):
        parts[hashlib.sha256(path.name.encode()).digest()[0] < 64].append(path)  # a quarter is for the test
    found = []
    for test, count in ((False, training), (True, testing)):
        chance = random.Random(0 if test else seed)
        found.append([_snippet(chance.choice(parts[test]), chance) for _ in range(count)])
    return found[0], found[1]


def _snippet(path: Path, chance: random.Random) -> Snippet:
    text = path.read_text(encoding="utf-8")
    tags = _tags(text)
    starts = [0, *(at + 1 for at, character in enumerate(text) if character == "\n")]
    first = chance.randrange(max(len(starts) - LINES, 1))
    begin, end = starts[first], starts[min(first + LINES, len(starts) - 1)]
    return Snippet(text[begin:end], tuple(tags[begin:end]))


@cache
def _tags(text: str) -> list[int]:
    """The tag of each character of a file."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    tags = [NONE] * len(text)
    for name, token in _named(text):
        (row, column), (last, end) = token.start, token.end
        begin = starts[row - 1] + column
        tags[begin : starts[last - 1] + end] = [TAGS.index(name)] * (starts[last - 1] + end - begin)
    return tags


def _named(text: str) -> Iterator[tuple[str, tokenize.TokenInfo]]:
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    kinds = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string"}
    kinds[tokenize.COMMENT] = "comment"
    # Parts of a formatted string, from Python 3.12 on.
    parts = ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    kinds |= {getattr(tokenize, name): "string" for name in parts if hasattr(tokenize, name)}
    for before, token, after in zip([tokens[0], *tokens], tokens, [*tokens[1:], tokens[-1]], strict=False):
        if token.type in kinds:
            yield kinds[token.type], token
        elif token.type == tokenize.NAME:
            if keyword.iskeyword(token.string):
                yield "keyword", token
            elif before.string in ("def", "class"):
                yield "defined", token
            elif before.string == ".":
                yield "attribute", token
            else:
                yield ("called" if after.string == "(" else "name"), token


def encoded(tokenizer: Any, snippet: Snippet, length: int) -> dict[str, Any]:
    """Ids of a snippet with their labels: the tag of the last character that is no white space."""
    given = tokenizer(snippet.text, truncation=True, max_length=length, return_offsets_mapping=True)
    labels = []
    for begin, end in given.pop("offset_mapping"):
        piece = snippet.text[begin:end].rstrip()
        labels.append(snippet.tags[begin + len(piece) - 1] if piece else NONE)
    return {**given, "labels": labels}


def accuracy(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, data: list[list[Any]], rate: float, seed: int
) -> float:
    """Trains a model and returns the share of the test's tokens that it tells right."""
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    def right(result: Any) -> dict[str, float]:
        counted = result.label_ids != NONE
        return {"right": float((result.predictions == result.label_ids)[counted].mean())}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=arguments.steps,
                learning_rate=rate,
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
            train_dataset=data[0],
            eval_dataset=data[1],
            data_collator=DataCollatorForTokenClassification(tokenizer),
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
            compute_metrics=right,
        )
        trainer.train()
        return float(trainer.evaluate()["eval_right"])


def main() -> None:
    """Reads the command line, trains, and prints a line for each kind of weights and rate."""
    parser = argparse.ArgumentParser(description="Fine-tune an exported encoder as a tagger of Python.")
    parser.add_argument("folder", help="folder written by `fathom export`")
    parser.add_argument("--snippets", type=int, default=16, help="for training")
    parser.add_argument("--test", type=int, default=100, help="snippets for the test")
    parser.add_argument("--length", type=int, default=64, help="tokens of a snippet at most")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lrs", default="3e-3,1e-2,3e-2", help="rates to train with")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind and rate")
    parser.add_argument("--against", help="folder of the same model untrained; default: random weights")
    parser.add_argument("--trust", action="store_true", help="run the modelling code in the folder")
    arguments = parser.parse_args()

    from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, set_seed

    known = {"trust_remote_code": arguments.trust}
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder, **known)
    config = AutoConfig.from_pretrained(arguments.folder, num_labels=len(TAGS), **known)
    auto = AutoModelForTokenClassification
    kinds = {"pretrained weights": lambda: auto.from_pretrained(arguments.folder, config=config, **known)}
    if arguments.against:
        kinds["untrained weights"] = lambda: auto.from_pretrained(arguments.against, config=config, **known)
    else:
        kinds["random weights"] = lambda: auto.from_config(config, **known)
    sets = []
    for seed in range(arguments.seeds):
        training, test = snippets(arguments.snippets, arguments.test, seed)
        sets.append(
            [[encoded(tokenizer, each, arguments.length) for each in some] for some in (training, test)]
        )
    counts = Counter(label for each in sets[0][1] for label in each["labels"] if label != NONE)
    print(f"{arguments.snippets} snippets for training, {sum(counts.values())} tokens for the test")
    print(f"share of the most frequent tag: {max(counts.values()) / sum(counts.values()):.3f}")
    for rate in map(float, arguments.lrs.split(",")):
        for name, make in kinds.items():
            right = []
            for seed, data in enumerate(sets):
                set_seed(seed)  # of the classifier's weights, before the model is made
                right.append(accuracy(arguments, make(), tokenizer, data, rate, seed))
            spread = f" +- {statistics.stdev(right):.3f} over {len(right)} seeds" if len(right) > 1 else ""
            print(
                f"{name}, rate {rate:g}: {statistics.mean(right):.3f} of the tokens told right{spread}",
                flush=True,
            )


if __name__ == "__main__":
    main()
