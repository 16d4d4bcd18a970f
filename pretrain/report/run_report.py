"""report.html: one self-contained page that shows a run to someone who was not there.

Read are metrics.jsonl (needed), and config.yaml, environment.json (as `pretrain/rundir/environment.py` writes it) and state.json where they are there.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from markupsafe import Markup, escape

from model.config import ModelConfig
from model.cost.flops import flops_per_token
from model.depth.scheme import SCHEMES
from model.errors import UserError
from model.files import atomic_write_text
from parallel.hardware.gpus import mfu
from pretrain.report.run_charts import Context, all_charts
from pretrain.report.style import SHORT, compact, smoothing_window
from pretrain.rundir.metrics import End, Metrics, Start, Train, read_metrics
from pretrain.train.callbacks.progress import duration

TEMPLATE = Path(__file__).with_name("templates") / "report.html"
MOST_WARNINGS = 100


@dataclass(frozen=True)
class Run:
    """Everything a run directory says about itself. config: as YAML gives it, for a page must not fail over a key of another version."""

    folder: Path
    metrics: Metrics
    config: Mapping[str, Any]
    config_text: str
    environment: Mapping[str, Any]
    state: Mapping[str, Any]

    def setting(self, key: str, default: Any = None) -> Any:
        """A dotted key of the configuration."""
        return _dig(self.config, key, default)

    def fact(self, key: str) -> Any:
        """A dotted key of environment.json; None where there is none."""
        return _dig(self.environment, key, None)

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.setting("name") or self.folder.resolve().name)

    @property
    def model(self) -> ModelConfig | None:
        """The model's configuration, where this version still reads it."""
        try:
            return ModelConfig.model_validate(self.setting("model"))
        except ValueError:
            return None

    @property
    def unigram_entropy(self) -> float:
        """Nats per token; nan where no start says it."""
        return next(
            (
                start.unigram_entropy
                for start in reversed(self.metrics.starts)
                if math.isfinite(start.unigram_entropy)
            ),
            math.nan,
        )


def read_run(run_dir: Path) -> Run:
    """Reads a run directory. Raises UserError where it is none, or where its metrics are damaged."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(
            f"{run_dir} is no folder: give the folder of a run (it holds config.yaml and metrics.jsonl)"
        )
    metrics = read_metrics(run_dir / "metrics.jsonl").settled()
    text = _text(run_dir / "config.yaml")
    return Run(
        run_dir,
        metrics,
        _mapping(text, yaml.safe_load),
        text,
        _mapping(_text(run_dir / "environment.json"), json.loads),
        _mapping(_text(run_dir / "state.json"), json.loads),
    )


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page, to `run_dir`/report.html unless `out` is given, and returns its path. May be called while the run goes on.

    Raises UserError where `run_dir` is no run directory or its metrics are damaged, OSError where the page cannot be written.
    """
    run = read_run(run_dir)
    target = Path(out) if out is not None else run.folder / "report.html"
    atomic_write_text(target, render(run))
    return target


def render(run: Run) -> str:
    """The page as HTML, with every picture inside."""
    from jinja2 import Environment, StrictUndefined

    context = Context(run.metrics, float(run.setting("optimizer.clip_grad") or 0.0), run.unigram_entropy)
    page = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    warnings = grouped_warnings(run)
    return page.render(
        name=run.name,
        status=status(run),
        scheme=_scheme(run),
        facts=facts(run),
        headlines=headlines(run),
        charts=all_charts(context),
        commands=commands(run),
        dirty=bool(run.fact("git.dirty")),
        warnings=warnings[:MOST_WARNINGS],
        hidden_warnings=max(0, len(warnings) - MOST_WARNINGS),
        config_text=run.config_text,
        environment_text=json.dumps(run.environment, indent=2) if run.environment else "",
        written=_date(datetime.now(timezone.utc).timestamp()),
    )


def numbers(run: Run) -> dict[str, float | int | None]:
    """The headline numbers, for programs; None where unknown. Losses in nats per token, times in seconds, tokens_per_s the median over steps."""
    metrics = run.metrics
    losses = [event.loss for event in metrics.train if math.isfinite(event.loss)]
    window = smoothing_window(len(losses)) if len(losses) >= SHORT else 1
    validation = [
        event.loss for event in metrics.eval if event.split == "validation" and math.isfinite(event.loss)
    ]
    test = [event.loss for event in metrics.eval if event.split == "test" and math.isfinite(event.loss)]
    speeds = [event.tokens_per_s for event in metrics.train if math.isfinite(event.tokens_per_s)]
    tokens = [event.tokens for event in metrics.train if math.isfinite(event.tokens)]
    speed = median(speeds) if speeds else None
    return {
        "step": metrics.step,
        "steps": run.setting("train.steps"),
        "tokens": int(max(tokens)) if tokens else None,
        "train_loss": sum(losses[-window:]) / window if losses else None,
        "train_loss_steps": window,
        "validation_loss": validation[-1] if validation else None,
        "validation_loss_best": min(validation, default=None),
        "validation_perplexity": _perplexity(validation[-1]) if validation else None,
        "test_loss": test[-1] if test else None,
        "unigram_entropy": run.unigram_entropy if math.isfinite(run.unigram_entropy) else None,
        "tokens_per_s": speed,
        "mfu": _mfu(run, speed),
        "wall_seconds": metrics.busy_seconds,
        "resumes": len(metrics.resumes),
        "skipped": sum(event.skipped for event in metrics.train),
    }


def headlines(run: Run) -> list[tuple[str, str, str]]:
    """(label, number, remark) of each headline number; an unknown one is a dash that says why."""
    n = numbers(run)
    world = _world_size(run)

    def loss(value: float | int | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    best = n["validation_loss_best"]
    evaluations = [event for event in run.metrics.eval if event.split == "validation"]
    if n["validation_loss"] is None:
        remark = "no evaluation logged"
    elif best is not None and best < n["validation_loss"] - 5e-4:
        remark = f"nats per token, step {evaluations[-1].step:,}; lowest {best:.3f}"
    else:
        remark = f"nats per token, step {evaluations[-1].step:,}"
    share = n["mfu"]
    speed_remark = "tokens per second, median" + (
        f"; {compact(n['tokens_per_s'] / world)} a device"
        if n["tokens_per_s"] is not None and world > 1
        else ""
    )
    speed_remark += (
        f"; {share:.1%} of the {run.metrics.starts[-1].precision} peak" if share is not None else ""
    )
    mean = (
        f", mean of the last {n['train_loss_steps']} logged steps"
        if (n["train_loss_steps"] or 1) > 1
        else ", last step"
    )
    return [
        (
            "Training loss",
            loss(n["train_loss"]),
            f"nats per token{mean}" if n["train_loss"] is not None else "no finite loss yet",
        ),
        ("Validation loss", loss(n["validation_loss"]), remark),
        (
            "Validation perplexity",
            "–" if n["validation_perplexity"] is None else f"{n['validation_perplexity']:,.1f}",
            "per token, exp of the loss",
        ),
        (
            "Unigram entropy",
            loss(n["unigram_entropy"]),
            "the loss of knowing token frequencies alone"
            if n["unigram_entropy"] is not None
            else "not recorded",
        ),
        ("Throughput", "–" if n["tokens_per_s"] is None else f"{n['tokens_per_s']:,.0f}", speed_remark),
        ("Wall time", duration(n["wall_seconds"] or 0.0), _span(run.metrics)),
        (
            "Steps",
            f"{n['step']:,}",
            (f"of {n['steps']:,}; " if n["steps"] else "")
            + (f"{compact(n['tokens'])} tokens" if n["tokens"] else "no tokens yet"),
        ),
        (
            "Resumed",
            f"{n['resumes']}×",
            f"{n['skipped']} step{'' if n['skipped'] == 1 else 's'} skipped as not finite"
            if n["skipped"]
            else "no step skipped",
        ),
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """(name, value) of what defines the run; what is not known is left out."""
    model, start = run.model, run.metrics.starts[-1] if run.metrics.starts else None
    sizes = f"{run.setting('model.num_layers', '?')} layers, width {run.setting('model.hidden_size', '?')}, {run.setting('model.num_attention_heads', '?')} heads"
    if model is not None:
        sizes += f", feed-forward {model.ffn_size} ({model.activation})"
    batch, length = run.setting("train.global_batch_size"), run.setting("data.seq_length")
    planned = batch * length * (run.setting("train.steps") or 0) if batch and length else 0
    machine = ", ".join(part for part in (_devices(run), str(run.fact("host") or "")) if part)
    commit = str(run.fact("git.commit") or "")
    found = [
        ("Model", sizes if run.setting("model") else ""),
        ("Parameters", f"{start.parameters:,}" if start and start.parameters else ""),
        ("Vocabulary", f"{model.vocab_size:,} tokens" if model is not None and model.vocab_size else ""),
        ("Data", ", ".join(str(corpus.get("path")) for corpus in run.setting("data.corpora", []))),
        ("Batch", f"{batch} × {length} tokens" if batch and length else ""),
        ("Tokens planned", compact(planned) if planned else ""),
        ("Precision", str((start and start.precision) or run.setting("train.precision") or "")),
        ("Layout", _layout(start.layout, start.world_size) if start else ""),
        ("Machine", machine),
        (
            "Commit",
            (commit[:12] + (" with local changes" if run.fact("git.dirty") else "")) if commit else "",
        ),
        ("Started", _date(run.metrics.starts[0].time) if run.metrics.starts else ""),
    ]
    return [(label, value) for label, value in found if value]


def status(run: Run) -> tuple[str, str]:
    """(kind, words): kind is good, open or bad, for the colour of the mark beside the title."""
    end, state = run.metrics.finished, run.state
    if end is None:
        if state.get("state") in ("failed", "cancelled"):
            return "bad", f"{state['state']} at step {run.metrics.step:,}" + (
                f": {state['reason']}" if state.get("reason") else ""
            )
        return "open", f"at step {run.metrics.step:,}; the run has not ended, or was killed"
    if end.reason == "finished" or (
        end.reason != "not_finite" and end.step >= (run.setting("train.steps") or math.inf)
    ):
        return "good", f"finished at step {end.step:,}"
    words = {
        "stop_at_step": "stopped as asked (train.stop_at_step)",
        "not_finite": "stopped: a loss or gradient was not finite",
    }
    return (
        "bad" if end.reason == "not_finite" else "open",
        f"{words.get(end.reason, f'stopped ({end.reason})')} at step {end.step:,}",
    )


def commands(run: Run) -> list[str]:
    """Shell lines that would do the run again."""
    commit, started = run.fact("git.commit"), run.fact("command")
    lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
    if isinstance(started, list) and started:
        lines += [
            shlex.join(_typed([str(word) for word in started])),
            "# or, from the resolved configuration kept with the run:",
        ]
    config = Path(str(run.setting("runs_dir", "runs"))) / run.name / "config.yaml"
    return [*lines, f"fathom pretrain {shlex.quote(str(config))} name={shlex.quote(run.name + '-again')}"]


def grouped_warnings(run: Run) -> list[tuple[str, str]]:
    """(steps, message) of each different warning, in order of their first step."""
    steps: dict[str, list[int]] = {}
    for warning in run.metrics.warning:
        steps.setdefault(warning.message, []).append(warning.step)
    return [
        (f"{found[0]:,}" + (f" – {found[-1]:,} ({len(found)}×)" if len(found) > 1 else ""), message)
        for message, found in steps.items()
    ]


def _scheme(run: Run) -> tuple[str, Markup]:
    """(name with options, what it does and where it is from)."""
    name = str(run.setting("model.scheme") or ("deepscalelm_pre_ln" if run.setting("model") else ""))
    options = run.setting("model.scheme_options") or {}
    title = name + (
        " (" + ", ".join(f"{key} {value}" for key, value in options.items()) + ")" if options else ""
    )
    known = SCHEMES.get(name)
    words = str(escape(f"{known.summary}. {known.source}.")) if known else ""
    return title, Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", words))  # escaped above


def _mfu(run: Run, tokens_per_s: float | None) -> float | None:
    model, length = run.model, run.setting("data.seq_length")
    start = run.metrics.starts[-1] if run.metrics.starts else None
    if tokens_per_s is None or model is None or model.vocab_size is None or not length or start is None:
        return None
    return mfu(
        tokens_per_s, flops_per_token(model, length).model, _gpu(run), _world_size(run), start.precision or ""
    )


def _world_size(run: Run) -> int:
    return (run.metrics.starts[-1].world_size if run.metrics.starts else None) or 1


def _gpu(run: Run) -> str | None:
    """Name of the GPUs of the first host, where it has GPUs of one kind and they were not hidden from the run."""
    found = run.fact("gpus")
    names = (
        {str(gpu.get("name")) for gpu in found if isinstance(gpu, Mapping)}
        if isinstance(found, list)
        else set()
    )
    return (
        names.pop()
        if len(names) == 1 and run.fact("variables.CUDA_VISIBLE_DEVICES") not in ("", "-1")
        else None
    )


def _devices(run: Run) -> str:
    gpu = _gpu(run)
    if gpu is not None:
        return f"{len(run.fact('gpus'))} × {gpu} a host"
    cores = run.fact("cpu.usable_cores")
    return str(run.fact("cpu.model") or "") + (f" ({cores} cores)" if cores else "")


def _typed(argv: list[str]) -> list[str]:
    """What a user types for a process that was started with `argv`: interpreter and module paths replaced by the command."""
    for word in ("pretrain.train.run", "pretrain"):
        if word in argv:
            return ["fathom", "pretrain", *argv[argv.index(word) + 1 :]]
    return argv


def _layout(layout: Mapping[str, Any], world_size: int | None) -> str:
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


def _date(seconds: float) -> str:
    return (
        datetime.fromtimestamp(seconds, timezone.utc).strftime("%-d %B %Y, %H:%M UTC")
        if math.isfinite(seconds)
        else ""
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(text: str, parse: Any) -> Mapping[str, Any]:
    """An empty mapping where the file is missing or no mapping: the page then lacks those facts, and shows the rest."""
    try:
        found = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _dig(tree: Any, key: str, default: Any) -> Any:
    for part in key.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            return default
        tree = tree[part]
    return default if tree is None else tree
