"""How the report's pictures look.

Style, axes, smoothing of long series, and SVG that fits into a page.

Matplotlib is imported inside the functions that draw, for it takes a second.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

# Okabe and Ito's palette keeps its contrasts under all common kinds of colour blindness
BLUE, ORANGE, GREEN, PURPLE, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8f98", "#22262b"
PALETTE = (
    BLUE,
    ORANGE,
    GREEN,
    PURPLE,
    "#E69F00",
    "#56B4E9",
    INK,
    "#7a3b00",
    "#004d73",
    "#7d4a6b",
    "#00523c",
    "#8a6d00",
)
"""For many lines.

Those of Okabe and Ito's that are legible as thin lines on white, then darker mixtures of them.
"""
WIDE, HALF = (10.0, 3.9), (4.9, 3.3)
"""Figure sizes in inches of 96 screen pixels at the page's full and half width."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b9bec6",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9ebee",
    "grid.linewidth": 0.8,
    "xtick.color": "#b9bec6",
    "ytick.color": "#b9bec6",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
    "svg.fonttype": "path",  # letters as shapes: the same picture on every machine
}
MOST_POINTS = 1500
SHORT = 20
"""Fewer steps than this are drawn as dots and not smoothed."""


@contextmanager
def drawing() -> Iterator[Callable[[tuple[float, float]], Figure]]:
    """Gives a maker of figures under the report's style, without pyplot and its global state."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield lambda size: Figure(figsize=size, layout="constrained")


def to_svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element that scales with the page.

    Its ids are prefixed so that several fit into one document.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>',
        (
            r'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            rf'viewBox="\1" role="img" aria-label="{title}">'
        ),
        text,
        count=1,
    )


def smoothing_window(count: int) -> int:
    """Steps per point of the smoothed loss: about 1/40 of the run, odd."""
    return min(501, max(5, count // 40 | 1))


def envelope(steps: Values, values: Values) -> tuple[Values, Values]:
    """At most MOST_POINTS points that keep every spike.

    They are the lowest and the highest of each stretch.
    """
    if len(steps) <= MOST_POINTS:
        return steps, values
    kept: list[int] = [0]
    for stretch in np.array_split(np.arange(len(steps)), MOST_POINTS // 2):
        kept += sorted({int(stretch[np.argmin(values[stretch])]), int(stretch[np.argmax(values[stretch])])})
    kept = sorted({*kept, len(steps) - 1})
    return steps[kept], values[kept]


def running_median(values: Values, window: int) -> tuple[NDArray[np.int64], Values]:
    """Median of the `window` values around each of at most MOST_POINTS places; and those places.

    Of fewer values towards the ends.
    Centred, so that it does not lag as an exponential average does.
    A median, so that a single spike leaves no plateau.
    """
    places = np.unique(
        np.linspace(2, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(np.int64)
    )
    # At the start as many before as after, or a steep fall would be flattened.
    # Five at least, or a slow first step would show.
    reach = np.minimum(window // 2, places)
    return places, np.array(
        [
            np.median(values[place - half : place + half + 1])
            for place, half in zip(places, reach, strict=True)
        ]
    )


def raw_and_smooth(axes: Axes, steps: Values, values: Values, label: str) -> None:
    """Thin line of all values with a thick running median over it.

    Dots for a run too short for either.
    """
    if len(steps) < SHORT:
        axes.plot(steps, values, color=BLUE, marker="o", markersize=3.5, label=label)
        return
    window = smoothing_window(len(steps))
    places, smooth = running_median(values, window)
    axes.plot(*envelope(steps, values), color=BLUE, alpha=0.35, linewidth=0.8, label=label)
    axes.plot(steps[places], smooth, color=BLUE, linewidth=2.0, label=f"median of {window}")


class Dots(TypedDict, total=False):
    """Markers of a line."""

    marker: str
    markersize: float


def dots(steps: Values) -> Dots:
    """Markers for runs so short that a line alone may be invisible."""
    return {"marker": "o", "markersize": 3} if len(steps) < SHORT else {}


def legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str], heading: str = "") -> None:
    """One row above the picture, where it never covers a line."""
    from matplotlib.lines import Line2D

    handles, labels = list(handles), list(labels)
    if heading:
        handles, labels = [Line2D([], [], linestyle="none"), *handles], [heading, *labels]
    if labels:
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            columnspacing=1.2,
            handlelength=1.2 if heading else 1.6,
            handletextpad=0.5,
        )


def step_axis(axes: Axes) -> None:
    """Labels the x axis with whole steps."""
    whole_ticks(axes)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("optimizer step")


def whole_ticks(axes: Axes) -> None:
    """Whole numbers only on the x axis, for steps and layers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, steps=[1, 2, 5, 10]))


def log_ticks(axes: Axes) -> None:
    """Plain numbers, and enough of them where the values span less than a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    if decades < 0.25:  # nearly level: without room around it, noise would fill the picture
        middle = math.sqrt(low * high)
        low, high = middle / 10**0.15, middle * 10**0.15
        axes.set_ylim(low, high)
    digits = (
        (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
        if decades < 0.6
        else (1.0, 2.0, 5.0)
        if decades < 2.2
        else (1.0,)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda value, _: f"{value:g}" if 1e-4 <= value < 1e5 else f"$10^{{{math.log10(value):.0f}}}$"
        )
    )
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(which="minor", length=0)
