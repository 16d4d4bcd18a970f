"""`fathom export`: a checkpoint as a Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[
        Path, typer.Argument(help="Run folder, its checkpoints folder, or one step folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    architecture: Annotated[
        str,
        typer.Option(
            help="auto; of a decoder gpt2, llama, mistral, qwen2, qwen3, gpt_neox, gemma, gemma2, "
            "gemma3_text or opt; of an encoder bert, megatron-bert, eurobert or modernbert; of both together "
            "marian, bart, blenderbot or mbart; of images vit; of speech speech_to_text; or fathom (with its "
            "modelling files). auto takes a stock one where it is exact."
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16 or float16; the proof is made in float32 before the weights are rounded."
        ),
    ] = "float32",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, e.g. 500MB or 5GB.")] = "5GB",
    tokenizer: Annotated[
        str,
        typer.Option(
            help="auto: the checkpoint's own, proved equal; none; or a Hugging Face folder, "
            "whose tokenizer is copied as it is."
        ),
    ] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a checkpoint as a folder that transformers' Auto classes load.

    Before it is put in place, it is loaded with transformers
    and its logits are compared with the checkpoint's.
    """
    from pretrain.trained.folders.export import export_checkpoint

    options = {
        "architecture": architecture,
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "tokenizer": tokenizer,
    }
    result = export_checkpoint(checkpoint, out, overwrite=overwrite, **options)
    proof = result.proof
    if as_json:
        facts = {
            "path": str(result.path),
            "architecture": result.architecture,
            "dtype": result.dtype,
            "parameters": result.parameters,
            "files": list(result.files),
            "logit_difference": proof.difference,
            "allowed": proof.tolerance,
            "tokens": proof.tokens,
            "epsilon_effect": proof.epsilon_effect,
            "trained_cosine": proof.trained,
            "dtype_difference": result.dtype_difference,
            "tokenizer_ties": result.tokenizer.ties if result.tokenizer else None,
            "skipped": list(result.skipped),
        }
        typer.echo(json.dumps(facts))
    elif not quiet:
        for reason in result.skipped:
            typer.echo(f"not used: {reason}")
        typer.echo(f"{result.path}: {result.architecture}, {result.parameters:,} parameters, {result.dtype}")
        typer.echo(f"proved: {proof}")
        if proof.trained is not None:
            typer.echo(f"in 16 bits, as trained: cosine of the logits {proof.trained:.5f}")
        if result.copied_tokenizer:
            typer.echo(f"tokenizer: copied from {result.copied_tokenizer}, not proved")
        elif result.tokenizer is None and "preprocessor_config.json" not in result.files:
            typer.echo(
                "the export has no tokenizer"
                + ("" if tokenizer == "none" else ": the checkpoint has none either")
            )
