"""Does the best rate stay where it is when a model gets deeper? Every scheme with and without
`model.transfer`, its optimum at each depth by a parabola in the logarithm of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from model.errors import UserError
from pretrain.config.schema import RunConfig
from pretrain.config.scheme_choice import Variant
from pretrain.config.yaml_reader import Plain
from pretrain.duel.grid import Equal, sized
from pretrain.duel.results import Outcome
from pretrain.report.page import Table
from pretrain.report.run_charts import Chart
from pretrain.report.style import INK, PALETTE, WIDE, drawing, to_svg

ADDED = ":transfer"
"""What the name of a variant gets with transfer."""
MARKERS = "oDs^vP"


def doubled(
    variants: Sequence[Variant], base: RunConfig, depths: Sequence[int], rates: Sequence[float], equal: Equal
) -> list[Variant]:
    """Every variant, each followed by itself with settings that carry over from the lowest depth.

    Raises UserError where optima could not be compared.
    """
    if len(depths) < 2 or len(rates) < 3:
        raise UserError(
            "--transfer compares best rates over depth: give two depths or more (--layers) "
            "and three rates or more (--lrs)"
        )
    own = any(key.startswith("transfer.") for variant in variants for key in variant.settings)
    if own or base.model.transfer.method != "none":
        raise UserError("--transfer adds model.transfer by itself: remove it from configuration and schemes")
    small = sized(base.model, min(depths), equal)
    settings: dict[str, Plain] = {
        "transfer.method": "completep",
        "transfer.base_layers": small.num_layers,
        "transfer.base_hidden": small.hidden_size,
    }
    both = []
    for one in variants:
        both += [one, replace(one, text=one.text + ADDED, settings={**one.settings, **settings})]
    return both


@dataclass(frozen=True)
class Optimum:
    """The best rate of a scheme at a depth."""

    variant: str
    layers: int
    points: tuple[tuple[float, float], ...]
    """(rate, final loss), the mean over seeds at the best warm-up, by rate."""
    rate: float
    """Of the parabola's lowest point, or of the lowest point at an edge; nan without any."""
    loss: float
    edge: bool
    """Whether the best rate is the first or last that was tried."""


def optima(outcomes: Sequence[Outcome]) -> list[Optimum]:
    """Of every scheme at every depth, in the order of the cells."""
    losses: dict[tuple[str, int], dict[float, dict[float, list[float]]]] = {}
    for one in outcomes:
        rates = losses.setdefault((one.cell.variant.text, one.cell.layers), {})
        rates.setdefault(one.cell.lr, {}).setdefault(one.cell.warmup, []).append(one.validation)
    return [_optimum(variant, layers, rates) for (variant, layers), rates in losses.items()]


def _optimum(variant: str, layers: int, rates: Mapping[float, Mapping[float, list[float]]]) -> Optimum:
    """A mean over seeds is nan where one of them diverged: that rate is no candidate."""
    means = {
        rate: [float(np.mean(values)) for values in warmups.values()]
        for rate, warmups in sorted(rates.items())
    }
    best = {rate: min(filter(math.isfinite, found), default=math.nan) for rate, found in means.items()}
    points = tuple((rate, loss) for rate, loss in best.items() if math.isfinite(loss))
    if not points:
        return Optimum(variant, layers, (), math.nan, math.nan, True)
    lowest = min(range(len(points)), key=lambda index: points[index][1])
    if lowest in (0, len(points) - 1):
        return Optimum(variant, layers, points, *points[lowest], edge=True)
    near = points[lowest - 1 : lowest + 2]
    # Around the middle point, so that the numbers are of one size.
    x = np.log([rate for rate, _ in near]) - math.log(points[lowest][0])
    a, b, c = np.polyfit(x, [loss for _, loss in near], 2)
    place = -b / (2 * a) if a > 0 else 0.0
    return Optimum(
        variant,
        layers,
        points,
        float(points[lowest][0] * math.exp(place)),
        float(c + b * place / 2),
        edge=False,
    )


def table(found: Sequence[Optimum]) -> Table:
    """The best rate over depth, one row a scheme and depth."""
    head = ["scheme", "layers", "best rate", "x that of the lowest depth", "loss there", "remark"]
    rows = []
    for one in sorted(found, key=lambda one: (one.variant, one.layers)):
        first = min((other for other in found if other.variant == one.variant), key=lambda o: o.layers)
        rows.append(
            [
                one.variant,
                str(one.layers),
                f"{one.rate:.3g}" if math.isfinite(one.rate) else "–",
                f"{one.rate / first.rate:.2f}" if math.isfinite(one.rate / first.rate) else "–",
                f"{one.loss:.3f}" if math.isfinite(one.loss) else "–",
                "edge of the rates" if one.edge else "",
            ]
        )
    return Table(head, rows)


def statements(found: Sequence[Optimum]) -> list[str]:
    """How far the best rate moves from the lowest depth to the greatest, with and without."""
    said = []
    for variant in dict.fromkeys(one.variant for one in found):
        own = sorted((one for one in found if one.variant == variant), key=lambda one: one.layers)
        first, last = own[0], own[-1]
        if not math.isfinite(last.rate / first.rate):
            continue
        unsure = ", at the edge of the rates tried" if first.edge or last.edge else ""
        said.append(
            f"{variant}: from {first.layers} to {last.layers} layers the best rate moves by "
            f"x{last.rate / first.rate:.2f} ({first.rate:.3g} to {last.rate:.3g}){unsure}."
        )
    return said


def chart(found: Sequence[Optimum]) -> Chart:
    """Final loss over rate, one line a depth, one panel a scheme with and without transfer."""
    title = "Best rate over depth"
    caption = (
        "Final loss on held-out text over the peak learning rate, one line a depth; a ring marks the "
        "optimum by a parabola through the lowest point and its neighbours. With settings that carry "
        "over (:transfer) the rings should stand above each other."
    )
    variants = list(dict.fromkeys(one.variant for one in found))
    depths = sorted({one.layers for one in found})
    rows = -(-len(variants) // 2)
    with drawing() as new:
        figure = new((WIDE[0], 3.2 * rows))
        panels = figure.subplots(rows, 2, sharex=True, sharey="row", squeeze=False).flat
        for axes, variant in zip(panels, variants, strict=False):
            for one in (one for one in found if one.variant == variant and one.points):
                index = depths.index(one.layers)
                look = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
                axes.plot(
                    [rate for rate, _ in one.points],
                    [loss for _, loss in one.points],
                    **look,
                    markersize=4.5,
                    linewidth=1.2,
                    markeredgewidth=0,
                    label=f"{one.layers} layers",
                )
                axes.plot([one.rate], [one.loss], "o", markersize=9, markerfacecolor="none", color=INK)
            axes.set_xscale("log")
            axes.set_title(variant, fontsize=9)
            axes.set_xlabel("peak learning rate")
            axes.set_ylabel("final loss (nats per token)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", handlelength=1.6, fontsize=8)
        svg = to_svg(figure, "transfer", title)
    return Chart(title, caption, svg, wide=True)
