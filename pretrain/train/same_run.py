"""May a run go on from a checkpoint, and what has changed since that was written?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from model.config import ModelConfig
from model.errors import UserError
from model.hf.tokenizer.table import tokenizer_file
from model.records import Record, as_record
from model.words import printable, written
from parallel.checkpoint.reader import CheckpointReader
from pretrain.config.schema import OptimizerConfig, RunConfig, ScheduleConfig
from pretrain.config.sections.growth import BatchRampup
from pretrain.data.blend import Blend
from pretrain.train.learning_rate import learning_rate

FIXED = (
    "data.seq_length",
    "data.source_length",
    "masking.packed",
    "spans.density",
    "spans.mean_length",
    "schedule.batch_rampup",
    "train.global_batch_size",
    "train.seed",
)
"""Settings that say which samples a step takes.

With others, a run that goes on would leave out some of its data or see it twice.
"""
MISSING: dict[str, object] = {"schedule.batch_rampup": BatchRampup().model_dump(mode="json")}
"""What checkpoints have of versions that did not know a setting of `FIXED`."""
FREE = (
    "model.init",
    "model.hidden_dropout",
    "model.attention_dropout",
    "model.max_position_embeddings",
    "model.image.patch_correlation",
    "model.image.zero_head",
    "model.speech.moments",
)
"""Settings of a model with which loaded weights do not compute anything else."""
ELSEWHERE = "start a run with another name from it (checkpoint.load)"
UNSAID = (
    "name",
    "runs_dir",
    "parallel.",
    "checkpoint.",
    "log.",
    "data.cache",
    "data.changed_at_step",
    "train.stop_at_step",
    "train.micro_batch_size",
)
"""Settings that a start may change without changing what is trained, or what `FIXED` refuses."""
LOADED = ("model.hidden_dropout", "model.attention_dropout")
"""Settings of the model that may differ, and make a difference."""
ROUNDED = "parallel.grad_reduce"
"""A setting of the layout by which gradients are others."""


class CorpusIdentity(Record):
    """One data set of a blend, as a checkpoint remembers it."""

    fingerprint: str
    share: float


class _Images(Record):
    classes: list[str] = Field(default_factory=list)


class _Progress(Record):
    data: list[CorpusIdentity] | None = None
    images: _Images = _Images()


class _Corpus(Record):
    weight: Annotated[float, Field(gt=0)] = 1.0


class _Data(Record):
    corpora: list[_Corpus] = Field(default_factory=list)


def identity_of(blend: Blend) -> list[CorpusIdentity]:
    """What decides, beside the settings in `FIXED`, which samples a step takes."""
    total = sum(blend.weights)
    pairs = zip(blend.fingerprints, blend.weights, strict=True)
    return [CorpusIdentity(fingerprint=name, share=weight / total) for name, weight in pairs]


def check_goes_on(newest: Path, config: RunConfig) -> None:
    """Raises UserError where settings keep a run from going on from its newest checkpoint.

    What its data hold is compared when it starts.
    config: with the vocabulary of its data.
    """
    reader = CheckpointReader(newest)
    _check_fixed(reader, config)
    check_same_model(reader, config)
    check_steps(reader, config)


def check_same_model(reader: CheckpointReader, config: RunConfig) -> None:
    """Raises UserError naming the first model setting that differs from the checkpoint's."""
    ours, theirs = config.model.model_dump(mode="json"), dict(_section(reader, "model"))
    for key in set(ours) - set(theirs):  # of a version that did not have the setting yet
        default = ModelConfig.model_fields[key].get_default(call_default_factory=True)
        theirs[key] = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    for key in sorted(set(ours) | set(theirs)):
        name = f"model.{key}"
        if name not in FREE and _bound(ours.get(key), name) != _bound(theirs.get(key), name):
            differs = f"{name}={written(theirs.get(key))}, the configuration has {written(ours.get(key))}"
            advice = "change it back, or start a run with another name"
            raise UserError(f"{reader.folder} was trained with {differs}: {advice}")
    if config.model.position == "learned":
        _check_table(reader, config)


def _bound(value: object, name: str) -> object:
    """A setting of a model without what is free inside of it, where it is a section."""
    if not isinstance(value, dict):
        return value
    return {key: one for key, one in value.items() if f"{name}.{key}" not in FREE}


def _check_table(reader: CheckpointReader, config: RunConfig) -> None:
    """Raises UserError where a table of learned positions would have to change its length."""
    length = _section(reader, "data").get("seq_length")
    theirs = _section(reader, "model").get("max_position_embeddings") or length
    ours, wanted = config.model.max_position_embeddings or config.data.seq_length, config.data.seq_length
    if theirs == ours:
        return
    table = f"{reader.folder} has a table of {theirs} learned positions (model.position=learned)"
    if isinstance(theirs, int) and wanted > theirs:
        advice = "only rotary positions, or none, take longer sequences"
        raise UserError(f"{table}, too few for data.seq_length={wanted}: set {theirs} or less; {advice}")
    raise UserError(f"{table}, the configuration one of {ours}: set model.max_position_embeddings={theirs}")


def check_steps(reader: CheckpointReader, config: RunConfig) -> None:
    """Raises UserError for a run that is to end before the step it has reached."""
    steps = config.train.steps
    if steps < reader.step:
        done = f"the run has done {reader.step} steps ({reader.folder})"
        advice = "start a run with another name from an older checkpoint (checkpoint.load)"
        raise UserError(f"train.steps={steps}: {done}: set train.steps={reader.step} or more, or {advice}")


def check_same_data(reader: CheckpointReader, config: RunConfig, blend: Blend) -> str:
    """Returns what is new about the data, where the configuration allows it; else nothing.

    Raises UserError naming the first setting by which the run would lose its place in the data,
    and for another tokenizer, or other classes of images.
    """
    ours_at, theirs_at = tokenizer_file(config.data.corpora[0].path), reader.tokenizer_path
    if theirs_at is not None and ours_at.is_file() and ours_at.read_bytes() != theirs_at.read_bytes():
        advice = "name data prepared with that one, or start a run with another name"
        other = f"{ours_at} is not the tokenizer the run was trained with, {theirs_at}"
        raise UserError(f"data.corpora: {other}: {advice}")
    _check_classes(reader, blend)
    _check_fixed(reader, config)
    changed = _other_data(reader, config, identity_of(blend))
    if changed and config.data.changed_at_step != reader.step:
        allow = f"set data.changed_at_step={reader.step} to go on with the new data from here"
        lost = "the run would leave out samples or see some twice"
        other = f"{reader.folder} was trained with other data ({changed})"
        raise UserError(f"{other}: {lost}; {allow}, or {ELSEWHERE}")
    return changed


def _check_fixed(reader: CheckpointReader, config: RunConfig) -> None:
    """Raises UserError naming the first setting of `FIXED` that differs from the checkpoint's."""
    ours = config.model_dump(mode="json")
    for name in FIXED:
        section, key = name.split(".")
        theirs = _section(reader, section).get(key, MISSING.get(name))
        if theirs is not None and theirs != ours[section][key]:
            differs = f"{name}={written(theirs)}, the configuration has {ours[section][key]!r}"
            raise UserError(f"{reader.folder} was trained with {differs}: change it back, or {ELSEWHERE}")


def _check_classes(reader: CheckpointReader, blend: Blend) -> None:
    """Raises UserError for images of other classes: they are what a tokenizer is to text."""
    facts, theirs = blend.manifests[0].images, _progress(reader).images.classes
    if facts is None or not theirs or list(facts.classes) == theirs:
        return
    differ = next(iter(sorted(set(facts.classes) ^ set(theirs))), "their order")
    other = f"the images have other classes than {reader.folder} ({printable(differ)})"
    advice = "prepare images with the same class folders, or start a run with another name"
    raise UserError(f"data.corpora: {other}: {advice}")


def _progress(reader: CheckpointReader) -> _Progress:
    source = f"{reader.folder}, progress"
    return as_record(reader.manifest.progress, _Progress, source, "use another checkpoint")


def _other_data(reader: CheckpointReader, config: RunConfig, ours: list[CorpusIdentity]) -> str:
    """How the data differ from the checkpoint's; empty for the same, or where nothing is known."""
    theirs = _progress(reader).data
    shares = [corpus.share for corpus in ours]
    if theirs is None:  # of version 0.1.0, which kept the configuration only
        source = f"{reader.folder}, config.data"
        data = as_record(_section(reader, "data"), _Data, source, "use another checkpoint")
        total = sum(corpus.weight for corpus in data.corpora)
        old = [corpus.weight / total for corpus in data.corpora]
        return "" if old in ([], shares) else f"shares {_percent(old)}, now {_percent(shares)}"
    if len(theirs) != len(ours):
        return f"{len(theirs)} data sets, now {len(ours)}"
    for number, (before, now) in enumerate(zip(theirs, ours, strict=True)):
        if before.fingerprint != now.fingerprint:
            return f"data.corpora.{number}.path={config.data.corpora[number].path} holds other tokens"
    old = [corpus.share for corpus in theirs]
    return "" if old == shares else f"shares {_percent(old)}, now {_percent(shares)}"


def differences(reader: CheckpointReader, config: RunConfig) -> list[str]:
    """What is trained otherwise than before the checkpoint, a phrase each.

    Settings that a checkpoint of an earlier version does not know are left out.
    """
    ours, theirs = dict(_flat(config.model_dump(mode="json"))), dict(_flat(reader.manifest.config))
    found = [
        f"{key} {written(theirs[key])} -> {written(ours[key])}"
        for key in ours
        if key in theirs and ours[key] != theirs[key] and _said(key)
    ]
    rates = _rates(reader, config)
    if rates is not None and not math.isclose(*rates, rel_tol=1e-6):
        found.append(f"learning rate of step {reader.step + 1} {rates[0]:.3g} -> {rates[1]:.3g}")
    return found


def _said(key: str) -> bool:
    if key == ROUNDED:
        return True
    if key.startswith(FIXED) or (key.startswith("model.") and key not in LOADED):
        return False
    return not any(key == one or (one.endswith(".") and key.startswith(one)) for one in UNSAID)


def _rates(reader: CheckpointReader, config: RunConfig) -> tuple[float, float] | None:
    """The learning rate of the next step by the old settings and by the new; None if not known."""
    step = reader.step + 1
    if step > config.train.steps:
        return None
    try:
        schedule = ScheduleConfig.model_validate(_section(reader, "schedule"))
        optimizer = OptimizerConfig.model_validate(_section(reader, "optimizer"))
    except ValidationError:
        return None
    steps = reader.sections.train.steps
    if steps is None:
        return None
    before = learning_rate(schedule, optimizer.lr, step, steps)
    return before, learning_rate(config.schedule, config.optimizer.lr, step, config.train.steps)


def _section(reader: CheckpointReader, name: str) -> dict[str, object]:
    section = reader.manifest.config.get(name)
    return section if isinstance(section, dict) else {}


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in nested sections and lists of sections."""
    items: list[tuple[str, object]] | None = None
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        items = [(str(number), one) for number, one in enumerate(value)]
    if items is None:
        yield prefix, value
        return
    for key, one in items:
        yield from _flat(one, f"{prefix}.{key}" if prefix else str(key))


def _percent(shares: list[float]) -> str:
    return " : ".join(f"{100 * share:.4g} %" for share in shares)
