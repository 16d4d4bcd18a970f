"""Checkpoints as models: opened without Megatron and without a process group, exported to Hugging Face, or asked to continue a text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import ModelConfig
from model.errors import UserError
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from model.hf.export import Export


@dataclass(frozen=True)
class Trained:
    """A model from a checkpoint. weights: canonical names, fp32, read at each access. positions: the longest sequence."""

    reader: CheckpointReader
    config: ModelConfig
    weights: Mapping[str, Tensor]
    logit_scale: float
    positions: int
    tokenizer: Path | None

    @property
    def name(self) -> str:
        """Name of the run, or of the folder where the checkpoint names none."""
        return str(self.reader.config.get("name") or self.reader.folder.name)


def open_trained(checkpoint: Path | str) -> Trained:
    """Opens a run folder, a `checkpoints` folder or a step folder.

    Raises UserError where there is no checkpoint, it is damaged, or its vocabulary size is not known.
    """
    from model.weights.init import logit_scale

    reader = open_checkpoint(checkpoint)
    config = ModelConfig(**reader.config["model"])
    tokenizer = reader.tokenizer_path
    if config.vocab_size is None:
        if tokenizer is None:
            raise UserError(
                f"{reader.folder} has neither model.vocab_size nor a tokenizer.model: put the tokenizer of its data there"
            )
        from sentencepiece import SentencePieceProcessor

        config = config.model_copy(
            update={"vocab_size": SentencePieceProcessor(model_file=str(tokenizer)).get_piece_size()}
        )
    positions = config.max_position_embeddings or reader.config["data"]["seq_length"]
    return Trained(reader, config, reader.weights(), logit_scale(config), positions, tokenizer)


def export_checkpoint(
    checkpoint: Path | str,
    out: Path | str,
    *,
    architecture: str = "auto",
    dtype: str = "float32",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    tokenizer: str = "auto",
) -> Export:
    """Verifies a checkpoint's files and writes it as a Hugging Face folder; arguments and errors as `model.hf.export.export`.

    tokenizer: auto for the checkpoint's own, none, or a Hugging Face folder to copy one from.
    """
    from model.hf.export import export

    if tokenizer not in ("auto", "none") and not Path(tokenizer).is_dir():
        raise UserError(
            f"--tokenizer {tokenizer} is no folder: name a Hugging Face folder whose tokenizer is copied, auto or none"
        )
    trained = open_trained(checkpoint)
    trained.reader.verify()
    return export(
        trained.weights,
        trained.config,
        out,
        logit_scale=trained.logit_scale,
        tokenizer={"auto": trained.tokenizer, "none": None}.get(tokenizer, Path(tokenizer)),
        special=trained.reader.progress.get("special_tokens"),
        seq_length=trained.positions,
        architecture=architecture,
        dtype=dtype,
        provenance=provenance(trained),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def provenance(trained: Trained) -> dict[str, Any]:
    """Where a checkpoint comes from, for the model card; what is not recorded is left out."""
    manifest, progress = trained.reader.manifest, trained.reader.progress
    git = _environment(trained.reader.folder).get("git") or {}
    commit = git.get("commit") and git["commit"] + (" with local changes" if git.get("dirty") else "")
    tokens = progress.get("consumed_tokens")
    versions = ", ".join(
        f"{name} {version}" for name, version in (manifest.get("versions") or {}).items() if version
    )
    rows = {
        "name": trained.name,
        "run": trained.reader.config.get("name"),
        "source": progress.get("imported_from"),
        "training step": trained.reader.step,
        "training tokens": f"{tokens:,}" if tokens else None,
        "training sequence length": (trained.reader.config.get("data") or {}).get("seq_length"),
        "seed": progress.get("seed"),
        "code commit": commit,
        "packages": versions,
    }
    return {label: value for label, value in rows.items() if value not in (None, "")}


def _environment(step_folder: Path) -> dict[str, Any]:
    """environment.json of the run that a step folder lies in; empty where there is none."""
    try:
        facts = json.loads((step_folder.parent.parent / "environment.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def generate_text(
    checkpoint: Path | str,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """Continues a prompt with the model of a checkpoint, piece of text by piece of text; ends at the end of a document.

    An empty prompt starts a document. Raises UserError as `open_trained` does, and for settings out of range or no tokenizer, before the first piece.
    """
    from model.hf.reference import generate
    from pretrain.data.tokenizer import Tokenizer

    trained = open_trained(checkpoint)
    if trained.tokenizer is None:
        raise UserError(
            f"{trained.reader.folder} has no tokenizer.model: put the tokenizer of its data there"
        )
    tokenizer = Tokenizer(trained.tokenizer)
    # Documents follow each other with nothing but the end mark between them, so that mark is what the first token of one is predicted from.
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]
    room = trained.positions - len(ids)
    if trained.config.position == "learned" and max_new_tokens > room:
        raise UserError(
            f"max_new_tokens={max_new_tokens} does not fit: the prompt has {len(ids)} tokens and the model {trained.positions} positions"
        )
    new = generate(
        dict(trained.weights),
        trained.config,
        ids,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        seed,
        logit_scale=trained.logit_scale,
        stop_id=tokenizer.eod_id,
    )
    return _pieces(tokenizer, ids, new)


def _pieces(tokenizer: Any, ids: list[int], new: Iterator[int]) -> Iterator[str]:
    """Text of new ids as it becomes certain: a character may need several byte tokens."""
    all_ids, shown = list(ids), len(tokenizer.decode(ids))
    text = ""
    for token in new:
        all_ids.append(token)
        text = tokenizer.decode(all_ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    if text[shown:]:
        yield text[shown:]
