"""`python -m benchmarks.data`: `fathom data prepare` against Megatron-LM's usual preprocessing.

Both have the same text, tokenizer and worker count. And the same with a tokenizer.json.
The usual way, written anew: a pool of processes, each of which encodes one document at a time
and sends its ids back; the parent appends them one by one to Megatron-core's IndexedDatasetBuilder.
Text: the Python standard library, one JSON line a file.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import typer
from rich.console import Console

from benchmarks.results import write_results
from benchmarks.turns import ratio_table, spread, turns

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


@functools.cache
def _model(path: str) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=path)


def encode_line(line: str, tokenizer: str) -> list[int]:
    """One JSON line -> its ids and the end of the document."""
    model = _model(tokenizer)
    return [*model.encode(json.loads(line)["text"]), model.eos_id()]


def append_per_document(text: Path, tokenizer: Path, out: Path, workers: int) -> int:
    """The usual way. Returns the number of tokens."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder, tokens = IndexedDatasetBuilder(f"{out}.bin", dtype=np.uint16), 0
    with multiprocessing.get_context("fork").Pool(workers) as pool, text.open(encoding="utf-8") as lines:
        for ids in pool.imap(functools.partial(encode_line, tokenizer=str(tokenizer)), lines, 32):
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            tokens += len(ids)
    builder.finalize(f"{out}.idx")
    return tokens


def corpus(path: Path, limit: int) -> int:
    """Writes JSON lines of the standard library's files, up to `limit` bytes; returns the bytes."""
    from pretrain.data.reading.inputs import standard_library_files

    size = 0
    with path.open("w", encoding="utf-8") as file:
        for source in standard_library_files():
            text = source.read_text(encoding="utf-8", errors="ignore")
            if text and size < limit:
                size += file.write(json.dumps({"text": text}) + "\n")
    return size


class Report(TypedDict):
    """What was measured."""

    bytes: int
    workers: int
    tokens: dict[str, int]
    tokens_per_s_per_core: dict[str, float]
    ratios: dict[str, dict[str, float]]
    seconds: dict[str, list[float]]


def measure(megabytes: float, workers: int, rounds: int) -> Report:
    """Seconds of each, and the ratio in tokens per second."""
    from pretrain.data.prepare import PrepareOptions, prepare
    from pretrain.data.tokens.train import train_tokenizer

    with tempfile.TemporaryDirectory(prefix="fathom-data-") as name:
        folder = Path(name)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer.model"
        size = corpus(text, int(megabytes * 1e6))
        train_tokenizer([str(text)], tokenizer, 2048, max_bytes=1_000_000)
        train_tokenizer([str(text)], folder / "bytes", 2048, "bpe-bytes", max_bytes=1_000_000)
        counts: dict[str, int] = {}

        def prepared(name: str, path: Path) -> None:
            options = PrepareOptions(
                [str(text)],
                folder / name,
                path,
                split=(1.0, 0.0, 0.0),
                workers=workers,
                overwrite=True,
            )
            counts[name] = prepare(options).splits["train"].tokens

        def usual() -> None:
            counts["usual"] = append_per_document(text, tokenizer, folder / "usual", workers)

        seconds = turns(
            {
                "usual": usual,
                "fathom": lambda: prepared("fathom", tokenizer),
                "tokenizer.json": lambda: prepared("tokenizer.json", folder / "bytes"),
            },
            rounds,
        )
    ratios = [
        counts["fathom"] / b / (counts["usual"] / a)
        for a, b in zip(seconds["usual"], seconds["fathom"], strict=True)
    ]
    # Their tokens differ, so that text is what is compared.
    kinds = [a / b for a, b in zip(seconds["fathom"], seconds["tokenizer.json"], strict=True)]
    rates = {key: counts[key] / statistics.median(seconds[key]) / workers for key in seconds}
    return {
        "bytes": size,
        "workers": workers,
        "tokens": counts,
        "tokens_per_s_per_core": rates,
        "ratios": {
            "fathom data prepare": spread(ratios),
            "its text per second with a tokenizer.json over SentencePiece": spread(kinds),
        },
        "seconds": seconds,
    }


def main(
    megabytes: float = typer.Option(8.0, help="Text."),
    workers: int = typer.Option(1, min=1, help="Processes of each."),
    rounds: int = typer.Option(4, min=2, help="Counted rounds."),
    out: Path | None = typer.Option(None, help="File for the JSON."),
) -> None:
    """Measure and print."""
    report = measure(megabytes, workers, rounds)
    Console().print(
        ratio_table(
            "Data preparation, tokens per second over one document at a time", "ratio", report["ratios"]
        )
    )
    print(
        "tokens/s per core:",
        ", ".join(f"{name} {rate:,.0f}" for name, rate in report["tokens_per_s_per_core"].items()),
    )
    if out is not None:
        write_results(out, report)


if __name__ == "__main__":
    typer.run(main)
