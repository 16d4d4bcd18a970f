"""`fathom import`: a Hugging Face model as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[str, typer.Argument(help="Folder, or name of a model on the Hub.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="Folder to write step_00000000 into; name it in checkpoint.load to start a run from it."
        ),
    ],
    vocab_multiple: Annotated[
        int,
        typer.Option(
            min=1, max=65536, help="Pad the vocabulary to a multiple of this, as model.vocab_multiple."
        ),
    ] = 128,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print folder and model section as JSON.")] = False,
) -> None:
    """Read a model of transformers, or an export of ours, as a checkpoint.

    GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3, Gemma, post-LN OPT; BERT, MegatronBERT,
    EuroBERT, ModernBERT; BART, MBart, Blenderbot, Marian; ViT.
    What cannot be represented exactly is refused with the reason.
    """
    from parallel.checkpoint.reader import open_checkpoint
    from pretrain.trained.folders.import_hf import import_checkpoint

    folder = import_checkpoint(source, out, vocab_multiple=vocab_multiple)
    checkpoint = open_checkpoint(folder)
    model, left_out = checkpoint.sections.model or {}, checkpoint.manifest.progress.get("left_out")
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(folder), "model": model, "left_out": left_out}))
    elif not quiet:
        typer.echo(
            f"{folder}: {model['num_layers']} layers, hidden size {model['hidden_size']}, "
            f"vocabulary {model['vocab_size']}"
        )
        if isinstance(left_out, list) and left_out:
            typer.echo(f"left out, of another task than the model's own: {', '.join(map(str, left_out))}")
        if checkpoint.manifest.progress.get("imported_layout") == "marian" and not checkpoint.tokenizer_path:
            typer.echo(
                "its tokenizer is not read: a Marian tokenizer is two SentencePiece models and a table of "
                "ids (source.spm, target.spm, vocab.json), and data need one model; give the checkpoint's "
                "export the folder's own with `fathom export --tokenizer FOLDER`"
            )
        typer.echo(
            f"start from it: fathom pretrain CONFIG +include={out / 'model.yaml'} checkpoint.load={out}"
        )
