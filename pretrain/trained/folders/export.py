"""A checkpoint as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from model.folders import check_target
from model.hf.settings.records import Special
from model.records import Record, as_record, read_record
from parallel.checkpoint.folders import MANIFEST
from pretrain.data.speech.filterbanks import RATE
from pretrain.rundir.metrics import read_metrics
from pretrain.trained.folders.pictures import image_facts
from pretrain.trained.heard import speech_facts
from pretrain.trained.open import Trained, open_trained

BICUBIC = 3
"""Pillow's number of it."""

if TYPE_CHECKING:
    from torch import Tensor

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
    """Verifies a checkpoint's files and writes it as a Hugging Face folder.

    tokenizer: auto for the checkpoint's own, none, or a Hugging Face folder to copy one from.
    Other arguments and errors as `model.hf.export.export`.
    """
    from model.hf.export import EXPORT, export

    if tokenizer not in ("auto", "none") and not Path(tokenizer).is_dir():
        raise UserError(
            f"--tokenizer {tokenizer} is no folder: name a Hugging Face folder whose tokenizer is copied, "
            "auto or none"
        )
    check_target(out, EXPORT, overwrite)  # before every weight is read
    trained = open_trained(checkpoint)
    trained.check_warm()
    trained.reader.verify()
    half = trained_in_16_bits(trained)
    special, processor = _described(trained, stock=architecture != "fathom")
    return export(
        trained.weights,
        trained.config,
        out,
        logit_scale=trained.logit_scale,
        tokenizer={"auto": trained.tokenizer, "none": None}.get(tokenizer, Path(tokenizer)),
        special=special,
        processor=processor,
        seq_length=trained.positions,
        source_length=trained.source_positions,
        architecture=architecture,
        dtype=dtype,
        provenance=provenance(trained),
        prove_trained=partial(_logits_in_bf16, trained) if half else None,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def trained_in_16_bits(trained: Trained) -> bool:
    """Whether a run computed in bf16 or FP8.

    So it did where `auto` was asked for and nothing tells what that was.
    """
    wish = trained.reader.sections.train.precision
    if wish != "auto":
        return wish == "bf16"
    metrics = trained.reader.folder.parent.parent / "metrics.jsonl"
    starts = read_metrics(metrics).starts if metrics.is_file() else []
    return not starts or starts[-1].precision != "float32"


def _logits_in_bf16(trained: Trained, tokens: Tensor, **given: Tensor | None) -> Tensor:
    from pretrain.trained.scorer import Scorer

    return Scorer(trained, "bf16", verified=True).logits(tokens, **given)


def provenance(trained: Trained) -> dict[str, object]:
    """Where a checkpoint comes from, for the model card; what is not recorded is left out."""
    manifest, sections = trained.reader.manifest, trained.reader.sections
    tokens = trained.reader.progress.consumed_tokens
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items() if version)
    rows = {
        "name": trained.name,
        "run": sections.name,
        "source": manifest.progress.get("imported_from"),
        "training step": trained.reader.step,
        "training tokens": f"{tokens:,}" if tokens else None,
        "training sequence length": sections.data.seq_length,
        "seed": manifest.progress.get("seed"),
        "code commit": _commit(trained.reader.folder),
        "packages": versions,
    }
    return {label: value for label, value in rows.items() if value not in (None, "")}


def _special(trained: Trained) -> dict[str, int | None]:
    """Special token ids that an import left in the checkpoint.

    Of an encoder-decoder those of its tokenizer, which holds where a target starts whichever
    tokenizer the export gets.
    Raises UserError where they are no ids.
    """
    if trained.config.blueprint.crossed and trained.tokenizer is not None:
        from pretrain.data.tokens.tokenizer import Tokenizer

        pieces = Tokenizer(trained.tokenizer)
        end, pad = pieces.eod_id, pieces.codec.padding_id
        return {"eos_token_id": end, "pad_token_id": pad, "decoder_start_token_id": end}
    given = trained.reader.manifest.progress.get("special_tokens") or {}
    source = str(trained.reader.folder / MANIFEST)
    return as_record(given, Special, f"{source}, special_tokens", "use another checkpoint").model_dump()


def _described(trained: Trained, *, stock: bool) -> tuple[Mapping[str, object], Mapping[str, object] | None]:
    """Special tokens, or the classes of images, and how images and recordings are processed.

    stock: a class of transformers may be chosen.
    """
    image = trained.config.image
    if trained.config.speech is not None:
        return _special(trained), _of_speech(trained, stock=stock)
    if image is None:
        return _special(trained), None
    facts = image_facts(trained)
    grey = 3 if image.channels == 1 else 1
    classes = {
        "id2label": {str(number): name for number, name in enumerate(facts.classes)},
        "label2id": {name: number for number, name in enumerate(facts.classes)},
    }
    return classes, {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": image.channels in (1, 3),
        "do_resize": True,
        "size": {"height": image.height, "width": image.columns},
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean) * grey,
        "image_std": list(facts.std) * grey,
    }


def _of_speech(trained: Trained, *, stock: bool) -> dict[str, object]:
    """How transformers makes frames.

    stock: a class of transformers may read them.
    Raises UserError for frames that it does not make, and for ids that such a class has not.
    """
    from model.hf.settings.read_speech import EXTRACTOR
    from pretrain.data.tokens.tokenizer import Tokenizer

    facts, unread = speech_facts(trained), trained.config.blueprint.sinusoid.first - 1
    if facts.normalise != "utterance":
        raise UserError(
            f"{trained.reader.folder} hears frames normalised over all of its data, and Speech2Text of "
            "transformers each clip over its own: prepare data with --normalise utterance"
        )
    if stock:
        pieces = Tokenizer(trained.needed_tokenizer())
        if not pieces.is_control()[unread] or pieces.eod_id == unread:
            raise UserError(
                f"{trained.needed_tokenizer()} has a piece of text as id {unread}, which Speech2Text of "
                "transformers takes for padding: use --architecture fathom, or a tokenizer of "
                "`fathom tokenizer train`"
            )
    return {
        "feature_extractor_type": EXTRACTOR,
        "feature_size": facts.filters,
        "num_mel_bins": facts.filters,
        "sampling_rate": RATE,
        "padding_value": 0.0,
        "do_ceptral_normalize": True,
        "normalize_means": True,
        "normalize_vars": True,
        "return_attention_mask": True,
    }


class Git(Record):
    """State of the code that a run was started from."""

    commit: str | None = None
    dirty: bool | None = None


class Environment(Record):
    """What is read of environment.json."""

    git: Git | None = None


def _commit(step_folder: Path) -> str | None:
    """The code of the run that a step folder lies in.

    None where it is not recorded, or not readable.
    """
    try:
        git = read_record(step_folder.parent.parent / "environment.json", Environment, "").git
    except (OSError, UserError):
        return None
    if git is None or not git.commit:
        return None
    return git.commit + (" with local changes" if git.dirty else "")
