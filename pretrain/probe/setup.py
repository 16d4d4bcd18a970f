"""From a configuration and a few choices to probes: the model, the tokens, the memory needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.parameters.size import parameter_count
from model.weights.bases import Lengths
from parallel.checkpoint.audit import saved_model
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint
from parallel.launch.one_process import single_process
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import DataConfig, RunConfig
from pretrain.config.scheme_choice import Variant, base_asked_for, parse_variant, parse_variants, validated
from pretrain.data.manifest import load_manifest, vocabulary_of
from pretrain.data.samples import open_samples
from pretrain.probe.measure import probe
from pretrain.probe.records import Probe
from pretrain.probe.synthetic import SYNTHETIC
from pretrain.tasks.table import TASKS
from pretrain.tasks.task import Batch
from pretrain.train.same_run import check_same_model

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Values that the backward pass of one layer keeps for each token: of the stream's width, and beside
# them of the feed-forward's; measured.
KEPT_WIDTHS, KEPT_FFN = 15, 3


@dataclass(frozen=True)
class Choices:
    """What the command line may say."""

    scheme: str | None = None
    layers: int | None = None
    """None means the configuration's."""
    seeds: int = 1
    batch: int = 2
    tokens: str = "auto"
    """auto, synthetic or data."""
    dtype: str = "float32"
    compare: str | None = None
    """Schemes, separated by commas."""
    checkpoint: Path | None = None


class _Tokens(NamedTuple):
    """What a probe reads."""

    source: str
    """Their origin in words."""
    of_seed: Callable[[int], Batch]
    """A micro-batch of the run's task."""
    log_frequencies: Callable[[], Tensor]
    """log p of every token, [v]."""


def probes(path: str, overrides: Sequence[str], choices: Choices) -> Iterator[Probe]:
    """Measures one model, or one for each scheme of `choices.compare`.

    path: a configuration, or a run folder or checkpoint, which is measured with its own.
    Raises UserError for what cannot work, before anything is built.
    """
    if Path(path).is_dir():
        path, choices = _of_run(Path(path), choices)
    config = load_config(path, overrides)
    _check_task(config)
    vocab, has_data = _vocabulary(config)
    if vocab is None and choices.checkpoint is not None:
        vocab = saved_model(open_checkpoint(_weights(choices.checkpoint))).config.vocab_size
    use_data = has_data if choices.tokens == "auto" else choices.tokens == "data"
    if use_data and not has_data:
        raise UserError(
            f"--tokens data: {config.data.corpora[0].path} is no prepared data set: "
            "run `fathom data prepare` first, or use --tokens synthetic"
        )
    synthetic = SYNTHETIC[config.task.samples]
    note = "" if vocab else f", {synthetic.assumed_words.format(synthetic.assumed)}"
    manifest = load_manifest(config.data.corpora[0].path) if has_data else None
    # Of synthetic frames nothing is measured.
    moments = manifest.moments if manifest is not None and use_data else None
    correlations = None if manifest is None else manifest.patch_correlations
    labels = vocab or config.model.vocab_size or synthetic.assumed
    model = _as_asked(complete_model(config, labels, correlations, moments), choices)
    reader = None if choices.checkpoint is None else _checkpoint(choices.checkpoint, config, model)
    models = _models(config, model, choices, base_asked_for(path, overrides))
    for _, chosen in models:
        check_memory(chosen, config.data, choices.batch, DTYPES[choices.dtype])
    source, batches, frequencies = (
        _data(config, choices.batch) if use_data else _synthetic(config, model, choices.batch)
    )
    log_p_v = frequencies() if model.init.unigram else None
    topology = single_process()
    for label, chosen in models:
        with _quiet():
            yield probe(
                chosen,
                topology,
                seq_length=config.data.seq_length,
                source_length=config.data.source_length,
                task=config.task,
                batches=batches,
                seeds=range(config.train.seed, config.train.seed + choices.seeds),
                dtype=DTYPES[choices.dtype],
                fp32_residual=choices.dtype == "bfloat16" and config.train.fp32_residual,
                source=source + note,
                label=label,
                checkpoint=reader,
                log_p_v=log_p_v,
            )


def _as_asked(model: ModelConfig, choices: Choices) -> ModelConfig:
    """The model as it is measured.

    Raises UserError for a depth that a scheme has no constants for.
    """
    if model.image is not None and choices.checkpoint is None:
        # A head of zeros hands no gradient down at the first step.
        unit = model.image.model_copy(update={"zero_head": False})
        model = model.model_copy(update={"image": unit})
    if choices.layers is None:
        return model
    return validated(
        {**model.model_dump(), "num_layers": choices.layers, "encoder_layers": None},
        f"--layers {choices.layers}: ",
        {"num_layers": "--layers"},
    )


def _models(
    config: RunConfig, model: ModelConfig, choices: Choices, base: str | None
) -> list[tuple[str, ModelConfig]]:
    """Label and configuration of each model to measure. base: weights asked for by name."""
    variants: list[Variant | None] = [None]
    if choices.compare:
        variants = list(parse_variants(choices.compare, "--compare"))
    elif choices.scheme:
        variants = [parse_variant(choices.scheme, "--scheme")]
    variants = [variant and variant.with_base(base) for variant in variants]
    return [
        (variant.text, _complete(config, variant.apply(model))) if variant else (model.scheme, model)
        for variant in variants
    ]


def _check_task(config: RunConfig) -> None:
    """Raises UserError for a task that has no probe."""
    if config.task.samples not in SYNTHETIC:
        probed = " or ".join(task.name for task in TASKS.values() if task.samples in SYNTHETIC)
        raise UserError(
            f"train.task={config.task.name} has no probe yet: name a configuration of another task, "
            f"such as {probed}"
        )


def _of_run(folder: Path, choices: Choices) -> tuple[str, Choices]:
    """(configuration, choices) for the weights of a run, a `checkpoints` or a step folder.

    Raises UserError where no configuration lies beside them, or other choices do not fit.
    """
    if choices.checkpoint is not None:
        raise UserError(
            f"{folder} is a folder, whose weights are measured: leave out --checkpoint {choices.checkpoint}"
        )
    if choices.scheme or choices.layers or choices.compare:
        raise UserError(
            f"{folder} is a folder, whose weights are measured: leave out --scheme, --layers and --compare"
        )
    whole = folder.resolve()
    found = [place / "config.yaml" for place in (whole, whole.parent, whole.parent.parent)]
    config = next((file for file in found if file.is_file()), None)
    if config is None:
        raise UserError(
            f"{folder}: there is no config.yaml of a run in it or above it: "
            f"name the run's configuration, and the weights with --checkpoint {folder}"
        )
    return str(config), replace(choices, checkpoint=folder)


def check_memory(model: ModelConfig, data: DataConfig, batch: int, dtype: torch.dtype) -> None:
    """Checks that weights and activations of one pass fit into the memory that is free.

    Raises UserError where they would not.
    """
    needed = memory_needed(model, data.seq_length, batch, dtype, data.source_length)
    free = _free_memory()
    if free and needed > 0.9 * free:
        raise UserError(
            f"the probe would need about {needed / 2**30:.0f} GiB and {free / 2**30:.0f} GiB are free: "
            f"lower --batch={batch}, data.seq_length={data.seq_length}, "
            f"model.hidden_size={model.hidden_size} or --layers (signals hardly depend on the width)"
        )


def memory_needed(
    model: ModelConfig, seq_length: int, batch: int, dtype: torch.dtype, source_length: int | None = None
) -> int:
    """Bytes of weights, one layer's gradients and all that the backward pass keeps (estimate)."""
    lengths, kept = Lengths(seq_length, source_length), 0
    for stack in model.blueprint.stacks:
        own, length = model.of(stack), lengths.of(model, stack)
        ffn, tokens = own.ffn_size * (2 if own.gated else 1), batch * length
        # Cross-attention keeps half as much as the two sublayers that a layer has at least.
        widths = KEPT_WIDTHS * (3 if stack.cross else 2) / 2
        layer = tokens * (widths * own.hidden_size + KEPT_FFN * ffn)
        # With attention dropout the probabilities are kept, and their mask.
        seen = length + (source_length or 0 if stack.cross else 0)
        probabilities = 3 * tokens * seen * own.num_attention_heads if own.attention_dropout else 0
        kept += int(own.num_layers * (layer + probabilities))
    logits = 4 * batch * seq_length * model.padded_vocab
    return dtype.itemsize * (parameter_count(model)["total"] + kept + logits)


def _free_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)


def _vocabulary(config: RunConfig) -> tuple[int | None, bool]:
    """(vocabulary, whether all data sets are there).

    The vocabulary is that of the first data set or of the configuration.
    """
    known = [vocabulary_of(corpus.path) for corpus in config.data.corpora]
    if all(known):
        return known[0], True
    return config.model.vocab_size, False


def _complete(config: RunConfig, model: ModelConfig) -> ModelConfig:
    """A model under another scheme, which may take more from the data than the configured one."""
    return complete_model(config.model_copy(update={"model": model}), model.vocab_size)


def _data(config: RunConfig, batch: int) -> _Tokens:
    samples = open_samples(config, config.task.samples, "train", alone=True)

    def batches(seed: int) -> Batch:
        first = (seed - config.train.seed) * batch
        return samples.batch(range(first, first + batch))

    paths = ", ".join(corpus.path for corpus in config.data.corpora)
    what = "tokens" if config.task.inputs == "tokens" else config.task.unit
    return _Tokens(f"{what} of {paths}", batches, samples.blend.log_frequencies)


def _synthetic(config: RunConfig, model: ModelConfig, batch: int) -> _Tokens:
    made = SYNTHETIC[config.task.samples]
    vocab = model.vocab_size or made.assumed
    whole = config.model_copy(update={"model": model})
    return _Tokens(
        made.words,
        lambda seed: made.batch(whole, vocab, batch, seed),
        lambda: made.log_frequencies(vocab),
    )


def _checkpoint(path: Path, config: RunConfig, model: ModelConfig) -> CheckpointReader:
    reader = open_checkpoint(_weights(path))
    check_same_model(reader, config.model_copy(update={"model": model}))
    return reader


def _weights(path: Path) -> Path:
    """The folder of checkpoints of a run, or the path itself."""
    inside = path / "checkpoints"
    return inside if inside.is_dir() else path


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences a warning that Megatron-core repeats once a layer.

    It warns when its GPU random stream is the CPU's, which on a CPU it always is.
    """

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
