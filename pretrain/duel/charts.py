"""Pictures of a duel: loss curves at every scheme's own best setting, final loss over rate, over
depth, and over time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from pretrain.duel.results import Best, Outcome, best_settings
from pretrain.report.run_charts import Chart
from pretrain.report.style import (
    HALF,
    INK,
    PALETTE,
    SHORT,
    WIDE,
    Values,
    drawing,
    envelope,
    running_median,
    smoothing_window,
    step_axis,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "oDs^vP"


class Look(TypedDict):
    """How the lines of one scheme look."""

    color: str
    marker: str


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """Colour and marker of every scheme, the same in all pictures."""
    return {
        variant: {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        for index, variant in enumerate(variants)
    }


def charts(outcomes: Sequence[Outcome], unigram: float) -> list[Chart]:
    """All pictures that the cells allow."""
    look = looks(list(dict.fromkeys(one.cell.variant.text for one in outcomes)))
    best = best_settings(outcomes)
    depths = sorted({one.layers for one in best})
    made = [curves([one for one in best if one.layers == layers], layers, unigram, look) for layers in depths]
    if len({one.cell.lr for one in outcomes}) > 1:
        made += [sweep(outcomes, layers, unigram, look) for layers in depths]
    if len(depths) > 1:
        made.append(over_depth(best, unigram, look))
    return made


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", handlelength=1.6, fontsize=8)


def _unigram(axes: Axes, unigram: float) -> None:
    if math.isfinite(unigram):
        axes.axhline(
            unigram,
            color=INK,
            linestyle=":",
            linewidth=1.2,
            label=f"token frequencies, {unigram:.2f}",
            zorder=1,
        )


def curves(best: Sequence[Best], layers: int, unigram: float, look: Mapping[str, Look]) -> Chart:
    """Training loss of the best cells of one depth."""
    title = f"Training loss at each scheme's own best setting, {layers} layers"
    caption = (
        "Running median of the training loss of the best cell of every scheme (lowest final loss on "
        "held-out text; its rate and warm-up are in the legend). Every cell reads the same tokens "
        "in the same order. Of several seeds the line is the mean and the band spans all of them. "
        "A line that stays at the dotted one has learned token frequencies only."
    )
    lowest = math.inf
    with drawing() as new:
        figure = new((WIDE[0], 4.4))
        axes = figure.add_subplot()
        _unigram(axes, unigram)
        for one in best:
            smoothed = [_smooth(outcome) for outcome in one.outcomes]
            steps, middle = smoothed[0][0], np.mean([losses for _, losses in smoothed], axis=0)
            label = f"{one.variant}  ({one.lr:g}, {one.warmup:.0%}): {one.validation:.3f}"
            color = look[one.variant]["color"]
            axes.plot(*envelope(steps, middle), color=color, linewidth=1.5, label=label)
            if len(smoothed) > 1:
                low, high = (side([losses for _, losses in smoothed], axis=0) for side in (np.min, np.max))
                axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
            lowest = min(lowest, float(middle.min()))
        if math.isfinite(unigram) and math.isfinite(lowest):
            axes.set_ylim(lowest - 0.15, max(unigram + 1.2, lowest + 2.5))
        step_axis(axes)
        axes.set_ylabel("loss (nats per token)")
        _legend(figure, axes)
        svg = to_svg(figure, f"curves-{layers}", title)
    return Chart(title, caption, svg, wide=True)


def _smooth(outcome: Outcome) -> tuple[Values, Values]:
    """Steps and running median of the training loss of a cell."""
    points = [(step, loss) for step, loss in outcome.curve if math.isfinite(loss)]
    steps, losses = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    if len(losses) < SHORT:
        return steps, losses
    places, smooth = running_median(losses, smoothing_window(len(losses)))
    return steps[places], smooth


def sweep(outcomes: Sequence[Outcome], layers: int, unigram: float, look: Mapping[str, Look]) -> Chart:
    """Final loss over the peak rate, one line a scheme and warm-up."""
    title = f"Sweep over rate and warm-up, {layers} layers"
    caption = (
        "Final loss on held-out text over the peak learning rate, one panel a warm-up; "
        "a missing point diverged or is not finished."
    )
    chosen = [one for one in outcomes if one.cell.layers == layers]
    warmups = sorted({one.cell.warmup for one in chosen})
    finite = [one.validation for one in chosen if math.isfinite(one.validation)]
    with drawing() as new:
        figure = new((WIDE[0], 3.8))
        panels = figure.subplots(1, len(warmups), sharey=True, squeeze=False)[0]
        for axes, warmup in zip(panels, warmups, strict=True):
            _unigram(axes, unigram)
            for variant, style in look.items():
                points: dict[float, list[float]] = {}
                for one in chosen:
                    if (
                        one.cell.variant.text == variant
                        and one.cell.warmup == warmup
                        and math.isfinite(one.validation)
                    ):
                        points.setdefault(one.cell.lr, []).append(one.validation)
                rates = sorted(points)
                if rates:
                    axes.plot(
                        rates,
                        [sum(points[rate]) / len(points[rate]) for rate in rates],
                        **style,
                        markersize=4.5,
                        linewidth=1.2,
                        markeredgewidth=0,
                        label=variant,
                    )
            axes.set_xscale("log")
            rates = sorted({one.cell.lr for one in chosen})
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.set_xticks([], minor=True)
            axes.set_xlabel(f"peak learning rate (warm-up {warmup:.0%} of the steps)")
        if finite:
            panels[0].set_ylim(
                min(finite) - 0.1,
                min(max(finite), max(unigram if math.isfinite(unigram) else 0, min(finite)) + 1.0) + 0.1,
            )
        panels[0].set_ylabel("final loss (nats per token)")
        seen: dict[str, Artist] = {}
        for axes in panels:
            seen.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(
            list(seen.values()), list(seen), loc="outside right upper", handlelength=1.6, fontsize=8
        )
        svg = to_svg(figure, f"sweep-{layers}", title)
    return Chart(title, caption, svg, wide=True)


def over_depth(best: Sequence[Best], unigram: float, look: Mapping[str, Look]) -> Chart:
    """Final loss over depth."""
    title = "Final loss over depth"
    caption = (
        "Final loss on held-out text at each scheme's own best setting. "
        "A scheme that profits from depth falls to the right; bars: lowest and highest seed."
    )
    with drawing() as new:
        figure = new((WIDE[0], HALF[1] + 0.3))
        axes = figure.add_subplot()
        _unigram(axes, unigram)
        for variant, style in look.items():
            own = sorted((one for one in best if one.variant == variant), key=lambda one: one.layers)
            if own:
                errors = [
                    [one.validation - min(o.validation for o in one.outcomes) for one in own],
                    [max(o.validation for o in one.outcomes) - one.validation for one in own],
                ]
                axes.errorbar(
                    [one.layers for one in own],
                    [one.validation for one in own],
                    yerr=errors,
                    **style,
                    markersize=4.5,
                    linewidth=1.3,
                    capsize=2,
                    label=variant,
                )
        axes.set_xscale("log")
        depths = sorted({one.layers for one in best})
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("layers")
        axes.set_ylabel("final loss (nats per token)")
        _legend(figure, axes)
        svg = to_svg(figure, "depth", title)
    return Chart(title, caption, svg, wide=True)
