"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import UserError
from pretrain.trained.open import Trained, open_trained

if TYPE_CHECKING:
    from model.hf.result import Export


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
    known = _environment(trained.reader.folder).get("git")
    git = known if isinstance(known, dict) else {}
    commit = git.get("commit") and str(git["commit"]) + (" with local changes" if git.get("dirty") else "")
    tokens = progress.get("consumed_tokens")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items() if version)
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
