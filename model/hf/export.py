"""Canonical weights -> a Hugging Face folder that is proved before it is put in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.folders import FolderKind, check_target, whole_folder
from model.hf.card import model_card
from model.hf.folding.obstacles import targets
from model.hf.folding.pre_ln import Fold, fold
from model.hf.mapping import check_weights, entries
from model.hf.names.conversions import Target
from model.hf.packaging import REMOTE, packaging
from model.hf.proof import LIMIT, Inputs, change, epsilon_effect, logits, proof_inputs, prove
from model.hf.reference import Weights
from model.hf.result import Export
from model.hf.settings.write import SPECIAL, START, write_config
from model.hf.tokenizer.convert import TokenIds
from model.hf.tokenizer.copy import copy_tokenizer
from model.hf.tokenizer.proof import TokenizerProofError
from model.hf.tokenizer.settings import Use
from model.hf.tokenizer.table import read_tokenizer
from model.hf.weight_files import DTYPES, parse_size, round_weights, write_json, write_weights
from model.parameters.table import parameter_table
from model.words import printable

EXPORT = FolderKind(
    "an exported model", marker="config.json", advice="choose another folder, or replace it with --overwrite"
)


@dataclass(frozen=True)
class _Job:
    """The arguments of one export, checked."""

    weights: Weights
    config: ModelConfig
    logit_scale: float
    tokenizer: Path | None
    positions: int
    dtype: str
    provenance: Mapping[str, object]
    prove_with: Callable[..., Tensor] | None
    prove_trained: Callable[..., Tensor] | None
    inputs: Inputs
    texts: tuple[str, ...]
    shard_bytes: int
    special: Mapping[str, object]
    processor: Mapping[str, object]


def export(
    weights: Weights,
    config: ModelConfig,
    out_dir: Path | str,
    *,
    logit_scale: float,
    tokenizer: Path | str | None,
    seq_length: int,
    source_length: int | None = None,
    architecture: str = "auto",
    dtype: str = "float32",
    provenance: Mapping[str, object] | None = None,
    prove_with: Callable[..., Tensor] | None = None,
    prove_trained: Callable[..., Tensor] | None = None,
    prove_tokens: Tensor | None = None,
    sample_texts: Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    special: Mapping[str, object] | None = None,
    processor: Mapping[str, object] | None = None,
) -> Export:
    """Writes a folder that transformers' Auto classes load, after proving it.

    weights: canonical name -> whole fp32 tensor, read one at a time.
    seq_length: positions, where the configuration names none; source_length: of an encoder under a
        decoder, seq_length where None.
    tokenizer: a SentencePiece model, of which an equal fast tokenizer is made and proved;
        a tokenizer.json, which is copied and proved;
        a Hugging Face folder, whose tokenizer is copied; or None.
    special: bos_token_id, eos_token_id and pad_token_id where there is no tokenizer, and of an
        encoder-decoder decoder_start_token_id; unknown without.
        Of a model of images all that its classes are called.
    processor: how images are made ready, preprocessor_config.json.
    prove_with: token ids [b, s] -> our model's logits [b, s, at least v];
        the plain evaluation of `weights` where None.
        An encoder's also gets `keep` [b, s], 0 for padding, and `types` [b, s] or None,
        an encoder-decoder's `source` [b, t], `source_keep` [b, t] and `keep` [b, s].
    prove_trained: the same in the precision of the training, where that was not fp32.
    prove_tokens [b, s], sample_texts: real data for the proofs of model and tokenizer,
        on top of random tokens and fuzz texts.
    max_shard_size: bytes, or text such as 5GB.
    Memory stays within the largest shard in fp32,
    except for the proof, which loads the whole model.
    Raises UserError for a target that is not exact, weights that do not fit the configuration,
    a tokenizer that cannot be reproduced, a folder that holds something or cannot be written,
    or a proof that fails; then nothing is left behind.
    """
    out, positions = Path(out_dir), config.max_position_embeddings or seq_length
    if dtype not in DTYPES:
        raise UserError(f"--dtype {printable(dtype, 60)} is not supported; choose one of {', '.join(DTYPES)}")
    if config.vocab_size is None:
        raise UserError("model.vocab_size is not known: take it from the tokenizer before exporting")
    source = None
    if config.blueprint.crossed:
        source = config.max_source_positions or source_length or seq_length
        known = {"max_position_embeddings": positions, "max_source_positions": source}
        config = config.model_copy(update=known)
    names = [row.name for row in parameter_table(config, positions=positions)]
    check_weights(weights, names)
    inputs = proof_inputs(config, positions, prove_tokens, source)
    job = _Job(
        weights=weights,
        config=config,
        logit_scale=logit_scale,
        tokenizer=Path(tokenizer) if tokenizer else None,
        positions=positions,
        dtype=dtype,
        provenance=provenance or {},
        prove_with=prove_with,
        prove_trained=prove_trained,
        inputs=inputs,
        texts=tuple(sample_texts),
        shard_bytes=parse_size(max_shard_size),
        special=special or {},
        processor=processor or {},
    )
    check_target(out, EXPORT, overwrite)
    return _first_exact(job, architecture, out, overwrite)


def _first_exact(job: _Job, architecture: str, out: Path, overwrite: bool) -> Export:
    """Writes the first target whose epsilons and whose tokenizer are exact enough.

    Raises UserError where none of those asked for is.
    """
    skipped: list[str] = []
    able = targets(architecture, job.config)
    for target in able:
        plan = fold(target, job.config, job.logit_scale)
        effect = epsilon_effect(job.weights, job.config, job.inputs, job.logit_scale, plan)
        if effect > LIMIT:
            skipped.append(
                f"{target} has one epsilon for all norms; folding the residual constants "
                f"({plan.epsilon:.3g} for norm_epsilon={job.config.norm_epsilon:.3g}) "
                f"would move the logits by {effect:.1e} standard deviations, more than {LIMIT:.0e}"
            )
            continue
        try:
            with whole_folder(out, EXPORT, overwrite) as folder:
                return _build(job, target, plan, effect, folder, out, tuple(skipped))
        except TokenizerProofError as error:
            if target == able[-1]:
                raise
            skipped.append(f"in a folder of {target}, {error.fact}")
    raise UserError(
        f"--architecture {architecture} cannot compute this model: {skipped[0]}; use auto or fathom"
    )


def _build(
    job: _Job, target: Target, plan: Fold, effect: float, folder: Path, out: Path, skipped: tuple[str, ...]
) -> Export:
    config = job.config
    ids, special = _write_tokenizer(job, folder)
    settings = _write_settings(job, target, plan, special, folder)
    for name in packaging(config).code if target == "fathom" else ():
        shutil.copyfile(REMOTE / name, folder / name)
    if job.tokenizer is not None and ids is not None:
        kind, _, _ = read_tokenizer(job.tokenizer)
        ids = replace(ids, ties=kind.prove(job.tokenizer, folder, job.texts, target == "fathom"))
    parameters = write_weights(
        folder,
        entries(target, config, job.positions),
        job.weights,
        config,
        plan,
        job.shard_bytes,
        DTYPES[job.dtype].itemsize,
    )
    proof = prove(
        folder,
        target,
        job.weights,
        config,
        job.inputs,
        logit_scale=job.logit_scale,
        fold=plan,
        effect=effect,
        reference=job.prove_with,
        trained=job.prove_trained,
    )
    moved = _store_as_asked(job, target, settings, folder)
    files = tuple(sorted([path.name for path in folder.iterdir()] + ["README.md"]))
    result = Export(
        path=out,
        architecture=target,
        dtype=job.dtype,
        proof=proof,
        epsilon=plan.epsilon,
        folded=bool(plan.factors),
        parameters=parameters,
        files=files,
        dtype_difference=moved,
        tokenizer=ids,
        copied_tokenizer=None if ids else job.tokenizer,
        skipped=skipped,
    )
    (folder / "README.md").write_text(model_card(config, result, job.provenance), encoding="utf-8")
    return result


def _write_settings(
    job: _Job, target: Target, plan: Fold, special: Mapping[str, object], folder: Path
) -> dict[str, object]:
    """Writes config.json, of weights in fp32, and generation_config.json; returns the first.

    Only a decoder generates, by itself or over an encoder.
    """
    settings = write_config(
        target,
        job.config,
        plan,
        positions=job.positions,
        logit_scale=job.logit_scale,
        dtype="float32",
        special=special,
    )
    write_json(folder / "config.json", settings)
    if job.processor:
        write_json(folder / "preprocessor_config.json", dict(job.processor))
    known = {key: value for key, value in special.items() if value is not None}
    if job.config.blueprint.crossed:
        # transformers would stop after 20 tokens.
        write_json(folder / "generation_config.json", {**known, "max_length": job.positions})
    elif job.config.stack.causal:
        write_json(folder / "generation_config.json", {"_from_model_config": True, **known})
    return settings


def _store_as_asked(job: _Job, target: Target, settings: Mapping[str, object], folder: Path) -> float:
    """Rounds a folder's fp32 weights to the format that was asked for.

    Returns how far that moves the logits, in their standard deviations; 0 for float32.
    """
    if job.dtype == "float32":
        return 0.0
    exact = logits(folder, target, job.config, job.inputs)
    round_weights(folder, DTYPES[job.dtype])
    write_json(folder / "config.json", {**settings, "dtype": job.dtype, "torch_dtype": job.dtype})
    return change(logits(folder, target, job.config, job.inputs), exact)


def _write_tokenizer(job: _Job, folder: Path) -> tuple[TokenIds | None, Mapping[str, object]]:
    """(ids of a tokenizer made from the checkpoint's, special ids of the configuration)."""
    size = job.config.vocab_size
    if job.config.image is not None:
        return None, job.special
    crossed = job.config.blueprint.crossed
    use = Use(
        encoder=not job.config.blueprint.stacks[-1].causal,
        token_types=job.config.token_types > 0,
        pairs=crossed,
    )
    names = (*SPECIAL, START) if crossed else SPECIAL
    if job.tokenizer is None:
        return None, {key: job.special.get(key) for key in names}
    if job.tokenizer.is_dir():
        assert size is not None
        found = copy_tokenizer(job.tokenizer, folder, size, use)
        return None, {key: found.get(key, job.special.get(key)) for key in names}
    kind, _, _ = read_tokenizer(job.tokenizer)
    ids = kind.write(job.tokenizer, folder, job.config.max_source_positions or job.positions, use)
    if ids.size != size:
        raise UserError(
            f"tokenizer {job.tokenizer} has {ids.size} pieces, but model.vocab_size={size}: "
            "is it the tokenizer of this model?"
        )
    return ids, dict(ids.special)
