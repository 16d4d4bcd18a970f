"""The numbers and facts of a run's report, for people and for programs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from model.cost.flops import flops_per_token
from model.words import duration, quantity
from parallel.hardware.gpus import mfu
from pretrain.config.sections.growth import BatchRampup, Growth, LengthWarmup, batch_growth, length_growth
from pretrain.report.run import RunRecord
from pretrain.report.style import SHORT, smoothing_window
from pretrain.rundir.metrics import End, Metrics, Start, Train


def numbers(run: RunRecord) -> dict[str, float | int | None]:
    """The headline numbers, for programs.

    None where unknown. Losses in nats per token, or per image, times in seconds, tokens_per_s (of
    images: images) the median over steps.
    """
    metrics = run.metrics
    losses = [event.loss for event in metrics.train if math.isfinite(event.loss)]
    window = smoothing_window(len(losses)) if len(losses) >= SHORT else 1
    validation = [
        event.loss for event in metrics.eval if event.split == "validation" and math.isfinite(event.loss)
    ]
    right = [event.accuracy for event in metrics.eval if event.split == "validation"]
    five = [event.top5 for event in metrics.eval if event.split == "validation"]
    test = [event.loss for event in metrics.eval if event.split == "test" and math.isfinite(event.loss)]
    speeds = [event.tokens_per_s for event in metrics.train if math.isfinite(event.tokens_per_s)]
    tokens = [event.tokens for event in metrics.train if math.isfinite(event.tokens)]
    speed = median(speeds) if speeds else None
    return {
        "step": metrics.step,
        "steps": run.config.count("train.steps"),
        "tokens": int(max(tokens)) if tokens else None,
        "train_loss": sum(losses[-window:]) / window if losses else None,
        "train_loss_steps": window,
        "validation_loss": validation[-1] if validation else None,
        "validation_loss_best": min(validation, default=None),
        "validation_perplexity": _perplexity(validation[-1]) if validation and run.task.of_text else None,
        "validation_accuracy": right[-1] if right and math.isfinite(right[-1]) else None,
        "validation_top5": five[-1] if five and math.isfinite(five[-1]) else None,
        "test_loss": test[-1] if test else None,
        "unigram_entropy": run.unigram_entropy if math.isfinite(run.unigram_entropy) else None,
        "tokens_per_s": speed,
        "mfu": _mfu(run, speed),
        "wall_seconds": metrics.busy_seconds,
        "resumes": len(metrics.resumes),
        "skipped": sum(event.skipped for event in metrics.train),
    }


def headlines(run: RunRecord) -> list[tuple[str, str, str]]:
    """(label, number, remark) of each headline number; an unknown one is a dash that says why."""
    n = numbers(run)
    return [*_losses(run, n), *_course(run, n)]


def _losses(run: RunRecord, n: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
    """The headlines on losses. n: from `numbers`."""
    mean = (
        f", mean of the last {n['train_loss_steps']} logged steps"
        if (n["train_loss_steps"] or 1) > 1
        else ", last step"
    )
    return [
        (
            "Training loss",
            _loss(n["train_loss"]),
            f"nats per {run.task.counted}{mean}" if n["train_loss"] is not None else "no finite loss yet",
        ),
        ("Validation loss", _loss(n["validation_loss"]), _validation_remark(run, n)),
        *_perplexity_line(run, n),
        *_accuracy(n),
        _entropy(run, n),
    ]


def _perplexity_line(run: RunRecord, n: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
    value = n["validation_perplexity"]
    line = ("Validation perplexity", "–" if value is None else f"{value:,.1f}", "per token, exp of the loss")
    return [line] if run.task.of_text else []


def _entropy(run: RunRecord, n: Mapping[str, float | int | None]) -> tuple[str, str, str]:
    value, of_text = n["unigram_entropy"], run.task.of_text
    remark = f"the loss of knowing {'token' if of_text else 'class'} frequencies alone"
    return (
        "Unigram entropy" if of_text else "Entropy of classes",
        _loss(value),
        "not recorded" if value is None else remark,
    )


def _accuracy(n: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
    share, five = n["validation_accuracy"], n["validation_top5"]
    told = "of the tokens to predict are the likeliest"
    if five is not None:
        told = f"of the images are of the likeliest class, {five:.1%} of one of the likeliest five"
    return [] if share is None else [("Validation accuracy", f"{share:.1%}", told)]


def _course(run: RunRecord, n: Mapping[str, float | int | None]) -> list[tuple[str, str, str]]:
    """The headlines on speed, time and steps. n: from `numbers`."""
    return [
        (
            "Throughput",
            "–" if n["tokens_per_s"] is None else f"{n['tokens_per_s']:,.0f}",
            _speed_remark(run, n),
        ),
        ("Wall time", duration(n["wall_seconds"] or 0.0), _span(run.metrics)),
        (
            "Steps",
            f"{n['step']:,}",
            (f"of {n['steps']:,}; " if n["steps"] else "")
            + f"{quantity(n['tokens']) if n['tokens'] else 'no'} {run.task.counted}s"
            + ("" if n["tokens"] else " yet"),
        ),
        (
            "Resumed",
            f"{n['resumes']}×",
            _skipped(run),
        ),
    ]


def _skipped(run: RunRecord) -> str:
    left_out = [event for event in run.metrics.train if event.skipped]
    spikes = sum(math.isfinite(event.loss) and math.isfinite(event.grad_norm) for event in left_out)
    parts = [
        f"{count} step{'' if count == 1 else 's'} skipped as {why}"
        for count, why in ((len(left_out) - spikes, "not finite"), (spikes, "spikes"))
        if count
    ]
    return ", ".join(parts) or "no step skipped"


def _validation_remark(run: RunRecord, n: Mapping[str, float | int | None]) -> str:
    if n["validation_loss"] is None:
        return "no evaluation logged"
    evaluations = [event for event in run.metrics.eval if event.split == "validation"]
    remark = f"nats per {run.task.counted}, step {evaluations[-1].step:,}"
    best = n["validation_loss_best"]
    if best is not None and best < n["validation_loss"] - 5e-4:
        remark += f"; lowest {best:.3f}"
    return remark


def _speed_remark(run: RunRecord, n: Mapping[str, float | int | None]) -> str:
    speed, share, world = n["tokens_per_s"], n["mfu"], _world_size(run)
    remark = f"{run.task.counted}s per second, median"
    if speed is not None and world > 1:
        remark += f"; {quantity(speed / world)} a device"
    if share is not None:
        remark += f"; {share:.1%} of the {run.metrics.starts[-1].precision} peak"
    return remark


def _loss(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def encoder_layers(run: RunRecord) -> int:
    """Layers of an encoder under a decoder; 0 without."""
    model = run.model
    return model.total_layers - model.num_layers if model is not None else 0


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of what defines the run; what is not known is left out."""
    model, start = run.model, run.metrics.starts[-1] if run.metrics.starts else None
    layers, width, heads = (
        run.config.count(f"model.{key}") or "?"
        for key in ("num_layers", "hidden_size", "num_attention_heads")
    )
    encoder = encoder_layers(run)
    sizes = f"{f'{encoder} + ' if encoder else ''}{layers} layers, width {width}, {heads} heads"
    if model is not None:
        sizes += f", feed-forward {model.ffn_size} ({model.activation})"
    planned, batch = _batch(run)
    of_text = run.task.of_text
    machine = ", ".join(part for part in (_devices(run), run.environment.word("host")) if part)
    commit = run.environment.word("git.commit") or ""
    found = [
        ("Model", sizes if run.config.get("model") else ""),
        ("Parameters", f"{start.parameters:,}" if start and start.parameters else ""),
        ("Vocabulary", f"{model.vocab_size:,} tokens" if model and model.vocab_size and of_text else ""),
        ("Classes", f"{model.vocab_size:,}" if model and model.vocab_size and not of_text else ""),
        ("Data", ", ".join(corpus.word("path") or "?" for corpus in run.config.rows("data.corpora"))),
        ("Batch", batch),
        (f"{run.task.counted.capitalize()}s planned", quantity(planned) if planned else ""),
        ("Precision", (start and start.precision) or run.config.word("train.precision") or ""),
        ("Layout", _layout(start.layout, start.world_size) if start else ""),
        ("Machine", machine),
        (
            "Commit",
            (commit[:12] + (" with local changes" if run.environment.get("git.dirty") else ""))
            if commit
            else "",
        ),
        ("Started", date(run.metrics.starts[0].time) if run.metrics.starts else ""),
    ]
    return [(label, value) for label, value in found if value]


def _batch(run: RunRecord) -> tuple[float, str]:
    """Tokens that the run is to train on, and what a step takes; of pairs, targets alone count."""
    batch, length = run.config.count("train.global_batch_size"), run.config.count("data.seq_length")
    if not batch or not length:
        return 0, ""
    source, start = run.config.count("data.source_length"), run.metrics.starts[-1:]
    padding = start[0].padding if start else math.nan
    latest = run.metrics.train[-1:]
    sizes, lengths = _growth(run, batch, length)
    done = sizes.before(latest[0].step) * length if latest else 0
    share = latest[0].tokens / done if source and done else 1.0
    planned = sizes.before(run.config.count("train.steps") or 0) * length
    sides = f"{source} + {length}" if source else f"{lengths}"
    empty = f", {padding:.1%} of them padding" if math.isfinite(padding) else ""
    if not run.task.of_text:
        return planned / length, f"{sizes} {run.task.counted}s of {length} tokens"
    return planned * (share if math.isfinite(share) else 1.0), f"{sizes} × {sides} tokens{empty}"


def _growth(run: RunRecord, batch: int, length: int) -> tuple[Growth, Growth]:
    """Samples of a step and tokens of a sequence; as at the end where nothing else can be read."""
    ramp, warmup = (
        run.config.get(f"schedule.{name}") or {} for name in ("batch_rampup", "seq_length_warmup")
    )
    try:
        return (
            batch_growth(BatchRampup.model_validate(ramp), batch),
            length_growth(LengthWarmup.model_validate(warmup), length),
        )
    except ValueError:
        return Growth((batch,)), Growth((length,))


def commands(run: RunRecord) -> list[str]:
    """Shell lines that would do the run again."""
    commit, started = run.environment.word("git.commit"), run.environment.words("command")
    lines = [f"git checkout {shlex.quote(commit)}"] if commit else []
    if started:
        lines += [
            shlex.join(_typed(started)),
            "# or, from the resolved configuration kept with the run:",
        ]
    config = Path(run.config.word("runs_dir") or "runs") / run.name / "config.yaml"
    return [*lines, f"fathom pretrain {shlex.quote(str(config))} name={shlex.quote(run.name + '-again')}"]


def _mfu(run: RunRecord, tokens_per_s: float | None) -> float | None:
    model, length = run.model, run.config.count("data.seq_length")
    start = run.metrics.starts[-1] if run.metrics.starts else None
    if tokens_per_s is None or model is None or model.vocab_size is None or not length or start is None:
        return None
    source = run.config.count("data.source_length") if model.blueprint.crossed else None
    if model.blueprint.crossed and not source:
        return None
    share = _target_share(run)
    flops = flops_per_token(model, length, targets=share, source_length=source).model
    # The speed of images is in whole images.
    positions = 1 if model.image is None else model.image.tokens
    return mfu(tokens_per_s * positions, flops, _gpu(run), _world_size(run), start.precision or "")


def _target_share(run: RunRecord) -> float:
    """Share of a sample's positions that have labels."""
    masks = "masking" in run.task.sections
    return (run.config.number("masking.rate") or 1.0) if masks else 1.0


def _world_size(run: RunRecord) -> int:
    return (run.metrics.starts[-1].world_size if run.metrics.starts else None) or 1


def _gpu(run: RunRecord) -> str | None:
    """Name of the GPUs of the first host, where it has GPUs of one kind and they were not hidden
    from the run.
    """
    names = {gpu.word("name") for gpu in run.environment.rows("gpus")}
    hidden = run.environment.get("variables.CUDA_VISIBLE_DEVICES") in ("", "-1")
    return names.pop() if len(names) == 1 and not hidden else None


def _devices(run: RunRecord) -> str:
    gpu = _gpu(run)
    if gpu is not None:
        return f"{len(run.environment.rows('gpus'))} × {gpu} a host"
    cores = run.environment.count("cpu.usable_cores")
    return (run.environment.word("cpu.model") or "") + (f" ({cores} cores)" if cores else "")


def _typed(argv: list[str]) -> list[str]:
    """What a user types for a process that was started with `argv`: interpreter and module paths
    replaced by the command.
    """
    for word in ("pretrain.train.run", "pretrain.run", "pretrain"):  # the second is of earlier versions
        if word in argv:
            return ["fathom", "pretrain", *argv[argv.index(word) + 1 :]]
    return argv


def _layout(layout: Mapping[str, object], world_size: int | None) -> str:
    names = {"tp": "tensor", "pp": "pipeline", "vp": "virtual stages", "cp": "context", "dp": "data"}
    parts = [f"{words} {layout[key]}" for key, words in names.items() if key in layout and layout[key] != 1]
    parts += [f"ZeRO-{layout['zero']}"] if "zero" in layout else []
    return (
        (f"{world_size} process{'' if world_size == 1 else 'es'}" if world_size else "")
        + (": " if world_size and parts else "")
        + ", ".join(parts)
    )


def _span(metrics: Metrics) -> str:
    events: list[Start | Train | End] = [*metrics.starts, *metrics.train, *metrics.end]
    times = [event.time for event in events if math.isfinite(event.time)]
    if not times:
        return "times not recorded"
    idle = max(times) - min(times) - metrics.busy_seconds
    return (
        f"of running, plus {duration(idle)} between stop and resume"
        if len(metrics.starts) > 1 and idle >= 1
        else "from start to the last line"
    )


def date(seconds: float) -> str:
    """A moment in words; empty where it is not known."""
    if not math.isfinite(seconds):
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%-d %B %Y, %H:%M UTC")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))
