"""The picture of one or several models: what is lost without layers, branches, prediction.

One colour a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from pretrain.depth_use.measure import Skip
from pretrain.depth_use.runs import DepthUse
from pretrain.depth_use.verdict import FELT, effective_depth
from pretrain.report.style import GREY, INK, PALETTE, drawing, log_ticks, whole_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 160
SIZE = (13.0, 4.6)
MOST_POINTS = 100
"""Of a line of branches: single layers scatter more than their lines differ."""
DASHED: Any = (0, (3, 1.5))


class _Depth:
    """The horizontal axis: layers, or with models of several depths shares of the depth."""

    def __init__(self, uses: Sequence[DepthUse]) -> None:
        self.shared = len({use.num_layers for use in uses}) == 1
        self.end = float(uses[0].num_layers) if self.shared else 100.0
        self.label = "layer" if self.shared else "layer, in % of the depth"

    def of(self, use: DepthUse, layers: Sequence[float]) -> Any:
        """Places of layers of a model."""
        return np.array(layers) * (1.0 if self.shared else 100 / use.num_layers)


def save_picture(uses: Sequence[DepthUse], path: Any, kind: str) -> None:
    """Writes the three panels in one picture (png, svg or pdf)."""
    depth = _Depth(uses)
    with drawing() as new:
        figure = new(SIZE)
        panels = figure.subplots(1, 3, gridspec_kw={"wspace": 0.08})
        for axes, title, draw in zip(
            panels,
            ("Loss without layers", "What a layer adds to the stream", "Prediction by depth"),
            (_skips, _branches, _predictions),
            strict=True,
        ):
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold", pad=20)
            draw(axes, uses, depth)
            axes.set_xlabel(depth.label)
            axes.set_xlim(0, depth.end * 1.01)
            whole_ticks(axes)
        figure.suptitle(_title(uses), x=0.012, ha="left", fontsize=10)
        if len(uses) > 1:
            _legend(figure, uses)
        figure.savefig(path, format=kind, dpi=DPI, facecolor="white")


def _marks(axes: Axes, marks: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """What lines and points are, in one row above a panel, where it covers nothing."""
    from matplotlib.lines import Line2D

    axes.legend(
        [Line2D([], [], **{"color": GREY, "markersize": 4, **look}) for _, look in marks],
        [label for label, _ in marks],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        borderaxespad=0.0,
        ncols=len(marks),
        columnspacing=1.2,
        handlelength=1.8,
        handletextpad=0.5,
    )


def _title(uses: Sequence[DepthUse]) -> str:
    first = uses[0]
    where = f"{first.measured.tokens:,} tokens of the {first.run.data}"
    if len(uses) == 1:
        return f"{first.run.label}: {first.num_layers} layers, loss {first.measured.loss:.4f} on {where}"
    return f"{len(uses)} models on {where}"


def _legend(figure: Any, uses: Sequence[DepthUse]) -> None:
    from matplotlib.lines import Line2D

    figure.legend(
        [Line2D([], [], color=_colour(index), linewidth=2) for index in range(len(uses))],
        [f"{use.run.label}, {use.num_layers} layers, loss {use.measured.loss:.4f}" for use in uses],
        loc="outside lower left",
        ncols=min(len(uses), 4),
    )


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _skips(axes: Axes, uses: Sequence[DepthUse], depth: _Depth) -> None:
    """Changes of the loss: of single layers as points, of blocks as bars over their layers.

    With standard errors where one model has the panel for itself, else with thin lines.
    """
    alone = len(uses) == 1
    for index, use in enumerate(uses):
        singles, blocks = use.measured.singles, use.measured.blocks
        axes.errorbar(
            depth.of(use, [skip.first for skip in singles]),
            [skip.change for skip in singles],
            yerr=[skip.error or 0.0 for skip in singles] if alone else None,
            color=_colour(index),
            marker="o",
            markersize=3 if alone else 2.5,
            markeredgewidth=0,
            linestyle="none" if alone else "-",
            linewidth=0.6,
            elinewidth=0.7,
        )
        axes.hlines(
            [block.change for block in blocks],
            depth.of(use, [block.first - 0.5 for block in blocks]),
            depth.of(use, [block.last + 0.5 for block in blocks]),
            color=_colour(index),
            linewidth=3,
            alpha=0.45,
        )
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.set_yscale("symlog", linthresh=FELT, linscale=0.5)
    _change_axis(axes, [skip for use in uses for skip in (*use.measured.singles, *use.measured.blocks)])
    axes.set_ylabel("change of the loss (nats per token)")
    point = {"marker": "o", "markeredgewidth": 0, "linestyle": "none" if alone else "-", "linewidth": 0.6}
    one = "one layer skipped" + (", ± standard error" if alone else "")
    _marks(axes, [(one, point), ("a block skipped", {"linewidth": 3, "alpha": 0.6})])


def _change_axis(axes: Axes, skips: Sequence[Skip]) -> None:
    """Room for all changes; whole powers of ten from the linear part on, as plain numbers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    bars = [skip.change + sign * (skip.error or 0.0) for skip in skips for sign in (-1, 1)]
    changes = list(filter(math.isfinite, bars))
    high, low = max([*changes, FELT]) * 1.6, min([*changes, -FELT / 2]) * 1.3
    axes.set_ylim(low, high)
    powers = [FELT * 10**power for power in range(8)]
    places = [-value for value in reversed(powers) if -value >= low] + [0.0]
    axes.yaxis.set_major_locator(FixedLocator(places + [value for value in powers if value <= high]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.yaxis.set_minor_locator(NullLocator())


def _branches(axes: Axes, uses: Sequence[DepthUse], depth: _Depth) -> None:
    """Size of the branches over that of the stream, of many layers the median of neighbours."""
    most = 1
    for index, use in enumerate(uses):
        layers = use.measured.layers
        step = math.ceil(len(layers) / MOST_POINTS)
        most = max(most, step)
        groups = [layers[first : first + step] for first in range(0, len(layers), step)]
        places = depth.of(use, [(group[0].layer + group[-1].layer) / 2 for group in groups])
        for key, line in (("attention_ratio", DASHED), ("mlp_ratio", "-")):
            values = [median(getattr(layer, key) for layer in group) for group in groups]
            axes.plot(places, values, color=_colour(index), linestyle=line, linewidth=1.3)
    axes.set_yscale("log")
    log_ticks(axes)
    axes.set_ylabel("rms(branch) / rms(stream)")
    of = f", median of {most} layers" if most > 1 else ""
    _marks(axes, [("attention", {"linestyle": DASHED}), (f"feed-forward{of}", {})])


def _predictions(axes: Axes, uses: Sequence[DepthUse], depth: _Depth) -> None:
    """Divergence from the final prediction, with a mark where half of it is gone."""
    for index, use in enumerate(uses):
        found = use.measured.predictions
        places = depth.of(use, [one.layer for one in found])
        axes.plot(places, [one.divergence for one in found], color=_colour(index))
        half = effective_depth(use.measured)
        if half is not None:
            axes.plot(
                places[half], found[half].divergence, color=_colour(index), marker="D", markersize=6, zorder=3
            )
    highest = max(
        (one.divergence for use in uses for one in use.measured.predictions if math.isfinite(one.divergence)),
        default=1.0,
    )
    axes.set_ylim(-0.02 * highest, 1.05 * highest)
    axes.set_ylabel("KL to the final prediction (nats per token)")
    _marks(axes, [("half of the prediction is made", {"marker": "D", "markersize": 6, "linestyle": "none"})])
