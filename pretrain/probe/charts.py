"""Pictures of probes, layer by layer: theory as a line, measurement as points.

There is one drawing for each quantity; the picture and the page use the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.probe.records import ROLES, Probe
from pretrain.probe.stacks import parts
from pretrain.report.run_charts import Chart
from pretrain.report.style import (
    GREY,
    HALF,
    PALETTE,
    drawing,
    legend,
    log_ticks,
    to_svg,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "oDs^vP"
MOST_MARKERS = 48
DPI = 160


@dataclass(frozen=True)
class Panel:
    """One quantity over layers. draw: onto axes, for the given probes."""

    name: str
    title: str
    label: str
    caption: str
    draw: Callable[[Axes, Sequence[Probe]], None]


def _places(count: int) -> Any:
    """Indices of the layers that get a marker.

    All of them, or evenly spread ones with the first and the last.
    """
    return np.unique(np.linspace(0, count - 1, min(count, MOST_MARKERS)).round().astype(int))


def _look(index: int) -> dict[str, Any]:
    return {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}


def _points(axes: Axes, probe: Probe, key: str, index: int, **style: Any) -> None:
    values = np.array(probe.values(key))
    places = _places(len(values))
    axes.plot(
        places + 1,
        values[places],
        **{
            **_look(index),
            "linestyle": "none",
            "markersize": 4,
            "markeredgewidth": 0,
            "label": probe.label,
            **style,
        },
    )


def _line(axes: Axes, probe: Probe, key: str, index: int) -> None:
    """One a stack: nothing goes on from an encoder's last layer to a decoder's first."""
    start = 1
    for _, part in parts(probe):
        values = np.array(part.values(key))
        places = np.arange(start, start + len(values))
        start += len(values)
        if not np.isfinite(values).any():
            continue
        axes.plot(
            places,
            values,
            color=PALETTE[index % len(PALETTE)],
            linewidth=1.5,
            alpha=0.75,
            zorder=1.5,
        )


def _spread(axes: Axes, probe: Probe, low: str, high: str, index: int) -> None:
    """A band from the lowest to the highest seed."""
    if probe.seeds > 1:
        layers = np.arange(1, probe.num_layers + 1)
        axes.fill_between(
            layers,
            probe.values(low),
            probe.values(high),
            color=PALETTE[index % len(PALETTE)],
            alpha=0.12,
            linewidth=0,
        )


def _scale(axes: Axes, values: Sequence[float], around: tuple[float, float]) -> None:
    """Makes the vertical axis logarithmic where the values span much, else linear.

    around: what a linear axis covers at least, (low, high).
    """
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if positive and max(positive) / min(positive) > 6:
        axes.set_yscale("log")
        log_ticks(axes)
        return
    low, high = min([*positive, around[0]]), max([*positive, around[1]])
    axes.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))


def draw_forward(axes: Axes, probes: Sequence[Probe]) -> None:
    """Forward variance."""
    for index, probe in enumerate(probes):
        _spread(axes, probe, "forward_variance_min", "forward_variance_max", index)
        _line(axes, probe, "forward_variance_theory", index)
        _points(axes, probe, "forward_variance", index)
    _scale(
        axes,
        [
            value
            for probe in probes
            for key in ("forward_variance", "forward_variance_theory")
            for value in probe.values(key)
        ],
        (0.5, 1.5),
    )


def draw_correlation(axes: Axes, probes: Sequence[Probe]) -> None:
    """Token correlation."""
    for index, probe in enumerate(probes):
        _line(axes, probe, "token_correlation_theory", index)
        _points(axes, probe, "token_correlation", index)
    axes.set_ylim(-0.02, 1.02)


def draw_gradient(axes: Axes, probes: Sequence[Probe]) -> None:
    """Gradient of the stream: late tokens, and for one probe those of all positions, hollow."""
    for index, probe in enumerate(probes):
        _spread(axes, probe, "grad_variance_late_min", "grad_variance_late_max", index)
        _line(axes, probe, "grad_variance_late_theory", index)
        if len(probes) == 1:
            _points(
                axes,
                probe,
                "grad_variance",
                index,
                color=GREY,
                markerfacecolor="none",
                markeredgewidth=0.8,
                marker="o",
                label="all positions",
            )
        _points(
            axes,
            probe,
            "grad_variance_late",
            index,
            label="late positions" if len(probes) == 1 else probe.label,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 1e-300), high)
    log_ticks(axes)


def draw_weights(axes: Axes, probes: Sequence[Probe]) -> None:
    """Weight-gradient norms: by kind for one probe, whole layers for several."""
    for index, probe in enumerate(probes):
        if len(probes) > 1:
            _points(axes, probe, "weight_grad_norm", index)
            continue
        places = _places(probe.num_layers)
        for number, kind in enumerate(ROLES):
            values = np.array([layer.weight_grad_norms.get(kind, math.nan) for layer in probe.layers])
            if not np.isfinite(values).any():
                continue
            axes.plot(
                places + 1,
                values[places],
                **_look(number),
                markersize=3.5,
                markeredgewidth=0,
                linewidth=0.8,
                label=kind,
            )
    axes.set_yscale("log")
    log_ticks(axes)


def draw_share(axes: Axes, probes: Sequence[Probe]) -> None:
    """Common share."""
    for index, probe in enumerate(probes):
        _points(axes, probe, "common_share", index)
    axes.set_ylim(-0.02, 1.02)


def draw_passed(axes: Axes, probes: Sequence[Probe]) -> None:
    """The gradient that norms in the stream pass on."""
    for index, probe in enumerate(probes):
        values = np.exp(np.clip(probe.values("forgetting"), -690.0, 690.0))
        places = _places(len(values))
        axes.plot(
            places + 1,
            values[places],
            **_look(index),
            linestyle="none",
            markersize=4,
            markeredgewidth=0,
            label=probe.label,
        )
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.1), max(high, 2.0))
    log_ticks(axes)


def draw_cross(axes: Axes, probes: Sequence[Probe]) -> None:
    """Size of cross-attention's branch."""
    for index, probe in enumerate(probes):
        _line(axes, probe, "branch_ratio_cross_theory", index)
        _points(axes, probe, "branch_ratio_cross", index)
    _scale(axes, [value for probe in probes for value in probe.values("branch_ratio_cross")], (0.0, 0.1))


def _mark_layers(axes: Axes, probes: Sequence[Probe]) -> None:
    """The axis of layers, with a line between an encoder and the decoder over it."""
    axes.set_xlabel("layer")
    whole_ticks(axes)
    (_, lower), *upper = parts(probes[0])
    if upper:
        axes.axvline(lower.num_layers + 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"layer (encoder 1-{lower.num_layers}, then decoder)")


CROSS = Panel(
    "cross",
    "Cross-attention",
    "branch / what it is added to",
    (
        "Size of what cross-attention adds to the decoder's stream, over the size of the stream: what the "
        "decoder takes from the encoder in each layer."
    ),
    draw_cross,
)
PANELS = (
    Panel(
        "forward",
        "Forward variance",
        "variance of the stream",
        (
            "Variance of the residual stream after each layer. Level at 1 is what variance-preserving "
            "schemes aim at; a norm after every layer fixes it; plain pre-LN grows by about one unit a layer."
        ),
        draw_forward,
    ),
    Panel(
        "correlation",
        "Token correlation",
        "correlation of two tokens",
        (
            "How alike the vectors of different tokens of a sequence are after each layer: "
            "towards 1 the tokens merge, and the output no longer depends on the text."
        ),
        draw_correlation,
    ),
    Panel(
        "gradient",
        "Stream gradient",
        "gradient variance / last layer's",
        (
            "Variance of the loss gradient at the stream entering each layer, relative to the last layer, "
            "for the second half of the positions. The mean over all positions would be ruled by the "
            "first few, which every later token reads, and can look level while the others vanish."
        ),
        draw_gradient,
    ),
    Panel(
        "weights",
        "Weight gradient",
        "gradient norm of the layer",
        "Norm of the gradient of each layer's matrices: what the optimizer receives.",
        draw_weights,
    ),
    Panel(
        "share",
        "Common share",
        "share of the stream's power",
        (
            "The part of the stream's power that all tokens of the batch have in common: at 1 the "
            "stream is one vector, whatever the text."
        ),
        draw_share,
    ),
    Panel(
        "passed",
        "What norms pass on",
        "gradient / that of the top",
        (
            "The gradient that is left at each layer when only identity paths carry it, from the measured "
            "sizes of branches and stream: a norm in the stream divides what differs between tokens by what "
            "the branch adds to all of them. Level without norms in the stream."
        ),
        draw_passed,
    ),
)


def panels(probes: Sequence[Probe]) -> tuple[Panel, ...]:
    """Those that some of the probes have values for."""
    crossed = any(probe.model.blueprint.crossed for probe in probes)
    return (*PANELS, CROSS) if crossed else PANELS


MEASURED_ONLY = ("weights", "share", "passed")
"""Panels without a line of theory."""


def _legend(figure: Figure, axes: Axes, probes: Sequence[Probe]) -> None:
    """Schemes and what lines and points are, below the panels."""
    from matplotlib.lines import Line2D

    theory = any(layer.forward_variance_theory is not None for probe in probes for layer in probe.layers)
    handles: list[Any] = [
        Line2D([], [], **_look(index), linestyle="none", markersize=5, markeredgewidth=0)
        for index in range(len(probes))
    ]
    labels = [probe.label for probe in probes]
    if len(probes) == 1:
        labels = ["measured"]
        handles.append(
            Line2D([], [], color=GREY, marker="o", markerfacecolor="none", markersize=4, linestyle="none")
        )
        labels.append("measured, all positions")
        if theory:
            handles.insert(1, Line2D([], [], color=PALETTE[0], linewidth=1.5))
            labels.insert(1, "theory")
    elif theory:
        handles += [
            Line2D([], [], color=GREY, linewidth=1.5),
            Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=4),
        ]
        labels += ["theory", "measured"]
    figure.legend(
        handles,
        labels,
        loc="outside lower left",
        ncols=min(len(labels), 5),
        columnspacing=1.4,
        handletextpad=0.5,
        handlelength=1.4,
    )


def _kinds_legend(axes: Axes) -> None:
    axes.legend(loc="best", ncols=3, columnspacing=1.0, handlelength=1.2, handletextpad=0.4, fontsize=8)


def picture(probes: Sequence[Probe], title: str, subtitle: str) -> Figure:
    """All panels in one figure with a title, for a file."""
    import textwrap

    with drawing() as new:
        drawn = panels(probes)
        rows = -(-len(drawn) // 2)
        figure = new((10.0, 1.0 + 3.2 * rows))
        grid = figure.subplots(rows, 2)
        for axes in grid.flat[len(drawn) :]:
            axes.set_axis_off()
        for panel, axes in zip(drawn, grid.flat, strict=False):
            panel.draw(axes, probes)
            axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold")
            axes.set_ylabel(panel.label)
            _mark_layers(axes, probes)
        if len(probes) == 1:
            _kinds_legend(grid.flat[3])
        lines = textwrap.wrap(subtitle, 135)
        figure.suptitle(title + "".join(f"\n{line}" for line in lines), x=0.012, ha="left", fontsize=10)
        _legend(figure, grid.flat[0], probes)
        return figure


def save_picture(probes: Sequence[Probe], path: Any, title: str, subtitle: str, kind: str) -> None:
    """Writes the picture as `kind` (png, svg or pdf)."""
    figure = picture(probes, title, subtitle)
    with drawing():
        figure.savefig(path, format=kind, dpi=DPI, facecolor="white")


def charts(probes: Sequence[Probe]) -> list[Chart]:
    """Every panel as a picture of its own, for a page."""
    made = []
    for panel in panels(probes):
        with drawing() as new:
            figure = new((HALF[0], 3.6))
            axes = figure.add_subplot()
            panel.draw(axes, probes)
            axes.set_ylabel(panel.label)
            _mark_layers(axes, probes)
            if len(probes) == 1:
                handles, labels = axes.get_legend_handles_labels()
                if panel.name in ("gradient", "weights"):
                    legend(figure, handles, labels)
            else:
                handles, labels = axes.get_legend_handles_labels()
                figure.legend(
                    handles,
                    labels,
                    loc="outside upper left",
                    ncols=3,
                    columnspacing=1.0,
                    handletextpad=0.2,
                    handlelength=1.2,
                    fontsize=7.5,
                )
            made.append(
                Chart(
                    panel.title,
                    panel.caption
                    + ("" if panel.name in MEASURED_ONLY else " Line: theory; points: measured."),
                    to_svg(figure, f"probe-{panel.name}", panel.title),
                )
            )
    return made
