"""report.html: one self-contained page that shows a run to someone who was not there.

It reads metrics.jsonl, which is needed.
It reads config.yaml, environment.json (as `pretrain/rundir/environment.py` writes it) and
state.json where they are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from markupsafe import Markup, escape

from model.depth.schemes import SCHEMES
from model.files import atomic_write_text, check_output
from model.words import printable
from pretrain.report.page import template
from pretrain.report.pictures import picture_charts
from pretrain.report.recordings import recording_charts
from pretrain.report.run import RunRecord, read_run
from pretrain.report.run_charts import Chart, Context, all_charts
from pretrain.report.run_numbers import commands, date, encoder_layers, facts, headlines, numbers
from pretrain.rundir.outcome import ending

__all__ = [
    "commands",
    "facts",
    "grouped_warnings",
    "headlines",
    "numbers",
    "read_run",
    "render",
    "status",
    "write_report",
]

MOST_WARNINGS = 100


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page and returns its path. May be called while the run goes on.

    out: `run_dir`/report.html unless given.

    Raises UserError where `run_dir` is no run directory, or the page cannot be written.
    """
    return write_page(read_run(run_dir), out)


def write_page(run: RunRecord, out: Path | None = None) -> Path:
    """As `write_report`, of a run that was read."""
    target = Path(out) if out is not None else run.folder / "report.html"
    check_output(target, "--out" if out is not None else "")
    atomic_write_text(target, render(run))
    return target


def sample_charts(run: RunRecord) -> list[Chart]:
    """Pictures of samples with what the newest checkpoint makes of them, for which it computes."""
    return [*picture_charts(run), *recording_charts(run)]


def render(run: RunRecord, samples: Sequence[Chart] | None = None) -> str:
    """The page as HTML, with every picture inside.

    samples: `sample_charts` of the run, which change with its checkpoint alone, where known.
    """
    shown = sample_charts(run) if samples is None else samples
    context = Context(
        run.metrics,
        run.config.number("optimizer.clip_grad") or 0.0,
        run.unigram_entropy,
        encoder_layers(run),
        run.task.counted,
    )
    warnings = grouped_warnings(run)
    return template("report.html").render(
        name=run.name,
        status=status(run),
        damage=damage(run),
        scheme=_scheme(run),
        facts=facts(run),
        headlines=headlines(run),
        charts=[*shown, *all_charts(context)],
        commands=commands(run),
        dirty=bool(run.environment.get("git.dirty")),
        warnings=warnings[:MOST_WARNINGS],
        hidden_warnings=max(0, len(warnings) - MOST_WARNINGS),
        config_text=run.config.text,
        environment_text=json.dumps(run.environment.tree, indent=2) if run.environment.tree else "",
        written=date(datetime.now(timezone.utc).timestamp()),
    )


def status(run: RunRecord) -> tuple[str, str]:
    """(kind, words): kind is good, open or bad, for the colour of the mark beside the title."""
    end, state = run.metrics.finished, run.state
    if end is None:
        if state.get("state") in ("failed", "cancelled"):
            return "bad", f"{state['state']} at step {run.metrics.step:,}" + _because(state.get("reason"))
        return "open", f"at step {run.metrics.step:,}; the run has not ended, or was killed"
    how = ending(end.exit_code)
    return how.mark, f"{how.words} at step {end.step:,}" + (
        "" if how.mark == "good" else _because(end.reason)
    )


def _because(reason: str | None) -> str:
    return f": {printable(reason, 500)}" if reason else ""


def damage(run: RunRecord) -> str:
    """What of metrics.jsonl could not be read, in a sentence; empty where all could."""
    found = run.metrics
    if not found.damaged:
        return ""
    lines = (
        "1 line of metrics.jsonl is" if found.damaged == 1 else f"{found.damaged} lines of metrics.jsonl are"
    )
    return f"{lines} damaged and left out; the first is {found.first_damage}"


def grouped_warnings(run: RunRecord) -> list[tuple[str, str]]:
    """(steps, message) of each different warning, in order of their first step."""
    steps: dict[str, list[int]] = {}
    for warning in run.metrics.warning:
        steps.setdefault(warning.message, []).append(warning.step)
    return [
        (f"{found[0]:,}" + (f" – {found[-1]:,} ({len(found)}×)" if len(found) > 1 else ""), message)
        for message, found in steps.items()
    ]


def _scheme(run: RunRecord) -> tuple[str, Markup]:
    """(name with options, what it does and where it is from)."""
    name = run.config.word("model.scheme") or ("deepscalelm_pre_ln" if run.config.get("model") else "")
    options = run.config.get("model.scheme_options")
    options = options if isinstance(options, dict) else {}
    title = name + (
        " (" + ", ".join(f"{key} {value}" for key, value in options.items()) + ")" if options else ""
    )
    known = SCHEMES.get(name)
    words = str(escape(f"{known.summary}. {known.source}.")) if known else ""
    return title, Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", words))  # escaped above
