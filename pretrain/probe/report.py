"""Probes as text, JSON, pictures and pages."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import UserError
from model.files import atomic_path, atomic_write_text
from model.records import without_nan
from model.words import quantity
from pretrain.probe.records import Probe
from pretrain.probe.remarks import remarks
from pretrain.probe.rules import RULES, findings, trainable, verdict
from pretrain.probe.stacks import depth_words, layer_name
from pretrain.report.page import Page, Section, Table, render_page

PICTURES = (".png", ".svg", ".pdf")
ROWS_SHOWN = 9


def as_json(probe: Probe) -> dict[str, Any]:
    """The documented object of `fathom probe --json`.

    Numbers that are not finite are null; theory that there is not is left out.
    """
    layers = [
        {key: value for key, value in asdict(layer).items() if value is not None} for layer in probe.layers
    ]
    return without_nan(
        {
            "scheme": probe.scheme,
            "scheme_options": probe.options,
            "label": probe.label,
            "num_layers": probe.num_layers,
            "seeds": probe.seeds,
            "trainable": trainable(probe),
            "verdict": verdict(probe),
            "findings": [asdict(finding) for finding in findings(probe)],
            "hidden_size": probe.model.hidden_size,
            "parameters": probe.parameters,
            "vocab_size": probe.model.vocab_size,
            "seq_length": probe.seq_length,
            **({} if probe.source_length is None else {"source_length": probe.source_length}),
            **({} if probe.gradient_limits is None else {"encoder_gradient": probe.gradient_limits}),
            "documents": probe.documents,
            "batch": probe.batch,
            "dtype": probe.dtype,
            "tokens": probe.tokens,
            "checkpoint": probe.checkpoint,
            "loss": probe.loss,
            "embedding_variance": probe.embedding_variance,
            "start_variance": probe.start_variance,
            "layers": layers,
        }
    )


def json_text(probes: Sequence[Probe], compare: bool) -> str:
    """One object, or for a comparison {"compare": [objects]}."""
    content: Any = {"compare": [as_json(probe) for probe in probes]} if compare else as_json(probes[0])
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_plot(probes: Sequence[Probe], path: Path) -> None:
    """A picture (.png, .svg, .pdf) or a page (.html), by the file's name.

    Raises UserError for another ending.
    """
    check_plot(path)
    if path.suffix == ".html":
        atomic_write_text(path, page(probes))
        return
    from pretrain.probe.charts import save_picture

    subtitle = (
        verdict(probes[0])
        if len(probes) == 1
        else "Line: theory. Points: measured, mean over seeds; bands: lowest to highest seed."
    )
    with atomic_path(path) as temporary:
        save_picture(probes, temporary, title(probes), subtitle, path.suffix[1:])


def check_plot(path: Path) -> None:
    """Raises UserError where a file's ending names no kind of picture."""
    if path.suffix not in (*PICTURES, ".html"):
        raise UserError(f"--plot {path}: the name must end in {', '.join(PICTURES)} or .html")


def title(probes: Sequence[Probe]) -> str:
    """What was measured, in one line."""
    first = probes[0]
    names = first.label if len(probes) == 1 else f"{len(probes)} schemes"
    seeds = f"{first.seeds} seed{'' if first.seeds == 1 else 's'}"
    when = "at initialisation" if first.checkpoint is None else f"from {first.checkpoint}"
    return (
        f"{names}: {depth_words(first)} layers of width {first.model.hidden_size}, "
        f"{_lengths(first)} tokens, {seeds}, {when}"
    )


def _lengths(probe: Probe) -> str:
    return f"{probe.source_length} + {probe.seq_length}" if probe.source_length else str(probe.seq_length)


def table(probe: Probe, rows: int | None = None) -> Table:
    """Measured values with the theory's in the column to the right; `rows` layers spread evenly, or
    all.
    """
    head = [
        "layer",
        "forward variance",
        "theory",
        "token corr.",
        "theory",
        "late gradient",
        "theory",
        "gradient, all",
        "weight grad.",
        "common share",
        "passed on",
    ]
    crossed = probe.model.blueprint.crossed
    if crossed:
        head += ["cross / stream", "theory"]
    chosen = (
        range(probe.num_layers)
        if rows is None
        else np.unique(np.linspace(0, probe.num_layers - 1, min(rows, probe.num_layers)).round().astype(int))
    )
    lines = []
    for index in chosen:
        layer = probe.layers[int(index)]
        lines.append(
            [
                layer_name(probe, layer),
                *(
                    _number(value)
                    for value in (
                        layer.forward_variance,
                        layer.forward_variance_theory,
                        layer.token_correlation,
                        layer.token_correlation_theory,
                    )
                ),
                _power(layer.grad_variance_late, layer.log10_grad_variance_late),
                _number(layer.grad_variance_late_theory),
                _power(layer.grad_variance, layer.log10_grad_variance),
                _number(layer.weight_grad_norm),
                _number(layer.common_share),
                _power(math.exp(min(layer.forgetting, 700.0)), layer.forgetting / math.log(10)),
            ]
        )
        if crossed:
            lines[-1] += [_number(layer.branch_ratio_cross), _number(layer.branch_ratio_cross_theory)]
    return Table(head, lines)


def summary(probes: Sequence[Probe]) -> Table:
    """One row a probe: ends and extremes, and the verdict."""
    head = [
        "scheme",
        "forward variance, lowest",
        "highest",
        "token corr., last",
        "late gradient, first / last",
        "theory",
        "trainable",
        "why",
    ]
    rows = []
    for probe in probes:
        first, last = probe.layers[0], probe.layers[-1]
        forward = probe.values("forward_variance")
        late = _power(first.grad_variance_late, first.log10_grad_variance_late)
        reasons = (
            "; ".join(finding.message for finding in findings(probe) if finding.level != "note")
            or verdict(probe).partition(": ")[2]
            or "only notes"
        )
        rows.append(
            [
                probe.label,
                _number(min(forward)),
                _number(max(forward)),
                _number(last.token_correlation),
                late,
                _number(first.grad_variance_late_theory),
                trainable(probe),
                reasons,
            ]
        )
    return Table(head, rows)


def text(probe: Probe) -> str:
    """The measurement for a terminal."""
    shown = table(probe, ROWS_SHOWN)
    cells = [list(shown.head), *(list(row) for row in shown.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(shown.head))]
    lines = [f"{title([probe])}  ({probe.tokens}, {probe.dtype})", ""]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines += ["", f"{probe.label}: {verdict(probe)}"]
    lines += [f"  {finding.level}: {finding.message}\n    {finding.why}" for finding in findings(probe)]
    return "\n".join([*lines, *(f"  {remark}" for remark in remarks(probe))])


def page(probes: Sequence[Probe]) -> str:
    """A page with every picture, the findings with their reasons, and all numbers."""
    from pretrain.probe.charts import charts

    first = probes[0]
    worst = {"no": "bad", "at risk": "open", "yes": "good"}
    status = (worst[trainable(first)], verdict(first)) if len(probes) == 1 else ("good", "")
    facts = [
        ("Layers", depth_words(first)),
        ("Width", str(first.model.hidden_size)),
        ("Parameters", quantity(first.parameters)),
        ("Vocabulary" if first.model.image is None else "Classes", f"{first.model.vocab_size:,}"),
        ("Sequence", f"{first.batch} of {_lengths(first)} tokens a seed"),
        ("Seeds", str(first.seeds)),
        ("Tokens", first.tokens),
        ("Arithmetic", first.dtype),
    ]
    sections = [Section("", charts=charts(probes))]
    if len(probes) > 1:
        sections.append(Section("Schemes", tables=[summary(probes)]))
    for probe in probes:
        found = [[finding.level, finding.message, finding.why] for finding in findings(probe)]
        name = probe.label if len(probes) > 1 else "Findings"
        sections.append(
            Section(
                name,
                [verdict(probe), *remarks(probe)],
                tables=[Table(["level", "finding", "reason for the threshold"], found)] if found else [],
            )
        )
        sections.append(Section("", tables=[table(probe)], folded="All layers"))
    sections.append(
        Section(
            "Rules",
            tables=[
                Table(
                    ["rule", "level", "limit", "reason"],
                    [[r.name, r.level, limits(r.below, r.above), r.why] for r in RULES],
                )
            ],
        )
    )
    heading = title(probes)
    return render_page(
        Page(
            heading.partition(":")[0],
            "probe",
            (status[0], status[1] or heading.partition(": ")[2]),
            facts=facts,
            sections=sections,
        )
    )


def limits(below: float, above: float) -> str:
    """A rule's limits in words."""
    parts = [
        f"below {below:.4g}" if math.isfinite(below) else "",
        f"above {above:.4g}" if math.isfinite(above) else "",
    ]
    return " or ".join(part for part in parts if part)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if not math.isfinite(value) or value == 0 or 1e-3 <= abs(value) < 1e5
        else f"{value:.1e}"
    )


def _power(value: float, log10: float) -> str:
    """Also where the value itself has underflowed."""
    return f"1e{log10:.1f}" if math.isfinite(log10) and abs(log10) > 300 else _number(value)
