"""Pictures of a run as inline SVG.

Each has one sentence on how to read it and on what is normal for deep models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from model.words import quantity
from pretrain.report.style import (
    BLUE,
    GREEN,
    GREY,
    HALF,
    INK,
    ORANGE,
    PURPLE,
    SHORT,
    WIDE,
    Values,
    dots,
    drawing,
    envelope,
    legend,
    log_ticks,
    raw_and_smooth,
    step_axis,
    to_svg,
    whole_ticks,
)
from pretrain.rundir.metrics import Metrics, Signal, Train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PROFILES = 6


@dataclass(frozen=True)
class Chart:
    """One picture."""

    title: str
    caption: str
    svg: str = ""
    """Empty where there is nothing to draw, which `missing` then explains."""
    missing: str = ""
    notes: tuple[str, ...] = ()
    """What the picture lacks."""
    wide: bool = False


@dataclass(frozen=True)
class Context:
    """What charts need beside the metrics. clip_grad: 0 where clipping is off."""

    metrics: Metrics
    clip_grad: float = 0.0
    unigram_entropy: float = math.nan
    encoder_layers: int = 0
    """Layers of an encoder under a decoder, which are the first ones; 0 without."""
    counted: str = "token"
    """What losses and speeds count, in the singular."""

    @property
    def known(self) -> str:
        """What is told by its frequencies alone."""
        return "token" if self.counted == "token" else "class"


def all_charts(context: Context) -> list[Chart]:
    """Every chart of the report, in reading order."""
    return [
        loss_chart(context),
        gradient_chart(context),
        rate_chart(context),
        stream_chart(context),
        layer_gradient_chart(context),
        branch_chart(context),
        share_chart(context),
        throughput_chart(context),
    ]


def loss_chart(context: Context) -> Chart:
    """Training and validation loss over steps, with the entropy of the token frequencies."""
    caption = (
        "Training loss (thin: each step; thick: running median) and validation loss should fall "
        "together, and anything below the dotted line is more than knowing how frequent each "
        f"{context.known} is; deep models may rest near that line for a while during warm-up, "
        "but a rise that lasts is divergence."
    )
    metrics, title = context.metrics, "Loss"
    steps, losses = _series(metrics.train, lambda event: event.loss)
    if not len(steps) and not metrics.eval:
        return Chart(title, caption, missing="No training step has been logged yet.", wide=True)
    notes = []
    with drawing() as new:
        figure = new(WIDE)
        axes = figure.add_subplot()
        if len(steps):
            raw_and_smooth(axes, steps, losses, "training")
        _evaluations(axes, metrics)
        if math.isfinite(context.unigram_entropy):
            axes.axhline(
                context.unigram_entropy,
                color=INK,
                linestyle=":",
                linewidth=1.2,
                label=f"{'unigram entropy' if context.known == 'token' else 'entropy of classes'}, "
                f"{context.unigram_entropy:.2f}",
            )
        _lost_steps(axes, metrics)
        if hidden := _limit(axes, losses, context):
            notes.append(
                f"{hidden} steps with a higher loss lie above the picture."
                if hidden > 1
                else "One step with a higher loss lies above the picture."
            )
        _resumes(axes, metrics)
        step_axis(axes)
        axes.set_ylabel(f"loss (nats per {context.counted})")
        _token_axis(axes, metrics, context.counted)
        legend(figure, *axes.get_legend_handles_labels())
        svg = to_svg(figure, "loss", title)
    if not metrics.eval:
        notes.append("No evaluation has been logged.")
    if not math.isfinite(context.unigram_entropy):
        notes.append("The unigram entropy of the corpus is not known.")
    return Chart(title, caption, svg, notes=tuple(notes), wide=True)


def _evaluations(axes: Axes, metrics: Metrics) -> None:
    """Losses on held-out text, a line for each split that has any."""
    for split, color, marker in (("validation", ORANGE, "o"), ("test", GREEN, "D")):
        points = [
            (event.step, event.loss)
            for event in metrics.eval
            if event.split == split and math.isfinite(event.loss)
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                marker=marker,
                markersize=4.5,
                linewidth=1.2,
                label=split,
            )


def _lost_steps(axes: Axes, metrics: Metrics) -> None:
    """Marks at the foot of the picture for steps that were skipped or had no finite loss."""
    lost = [event.step for event in metrics.train if event.skipped or not math.isfinite(event.loss)]
    if lost:
        axes.plot(
            lost,
            np.full(len(lost), 0.02),
            transform=axes.get_xaxis_transform(),
            color=ORANGE,
            marker="x",
            linestyle="none",
            label="skipped or not finite",
        )


def gradient_chart(context: Context) -> Chart:
    """Global gradient norm over steps, with the clipping level."""
    caption = (
        "Norm of the whole gradient before clipping, on a logarithmic scale: steps above the dashed "
        "line are scaled down to it; in deep models a high start that settles during warm-up is normal, "
        "whereas steady growth or repeated spikes of ten times the usual level precede divergence."
    )
    title = "Gradient norm"
    steps, norms = _series(context.metrics.train, lambda event: event.grad_norm, positive=True)
    if not len(steps):
        return Chart(title, caption, missing="No gradient norm has been logged.")
    with drawing() as new:
        figure = new(HALF)
        axes = figure.add_subplot()
        raw_and_smooth(axes, steps, norms, "each logged step")
        if context.clip_grad:
            axes.axhline(
                context.clip_grad,
                color=ORANGE,
                linestyle="--",
                linewidth=1.2,
                label=f"clipped to {context.clip_grad:g}",
            )
        axes.set_yscale("log")
        log_ticks(axes)
        _resumes(axes, context.metrics)
        step_axis(axes)
        axes.set_ylabel("gradient norm")
        legend(figure, *axes.get_legend_handles_labels())
        svg = to_svg(figure, "gradient", title)
    return Chart(title, caption, svg)


def rate_chart(context: Context) -> Chart:
    """Learning rate over steps."""
    caption = (
        "Learning rate of each step: a resume should leave no jump, "
        "and the decay spans the planned steps even where a run was stopped early; "
        "the warm-up matters most to deep models with a norm on the residual path (post-LN)."
    )
    title = "Learning rate"
    steps, rates = _series(context.metrics.train, lambda event: event.lr)
    if not len(steps):
        return Chart(title, caption, missing="No learning rate has been logged.")
    with drawing() as new:
        figure = new(HALF)
        axes = figure.add_subplot()
        axes.plot(*envelope(steps, rates), color=BLUE, **dots(steps))
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
        _resumes(axes, context.metrics)
        step_axis(axes)
        axes.set_ylabel("learning rate")
        svg = to_svg(figure, "rate", title)
    return Chart(title, caption, svg)


def stream_chart(context: Context) -> Chart:
    """Size of the residual stream over depth."""
    caption = (
        "Size of the residual stream after each layer, one line per measurement (light: early, dark: "
        "late): at the start, schemes with a norm after every layer and DeepScaleLM are level "
        "from first layer to last and plain pre-LN grows about with the square root of depth; "
        "a jump at one layer, or growth without end, is a warning."
    )
    for key, label in (
        ("residual_rms", "RMS of the residual stream"),
        ("forward_variance", "variance of the residual stream"),
    ):
        if chart := _profiles(context, [(key, "")], "Forward signal by layer", caption, label):
            return chart
    return _unmeasured("Forward signal by layer", caption)


def layer_gradient_chart(context: Context) -> Chart:
    """Gradient norm over depth."""
    caption = (
        "Norm of the gradient that each layer's weights receive, on a logarithmic scale: "
        "level lines mean that all layers learn, and a factor of a few "
        "between first and last layer is normal; several powers of ten are the "
        "vanishing or exploding gradient that depth schemes are there to prevent."
    )
    title = "Gradient by layer"
    return _profiles(
        context, [("grad_norm", "")], title, caption, "gradient norm of the layer"
    ) or _unmeasured(title, caption)


def branch_chart(context: Context) -> Chart:
    """What each sublayer adds relative to the stream, over depth."""
    caption = (
        "RMS of what a sublayer adds divided by RMS of the stream it adds to, on a logarithmic scale: "
        "of order one with post-LN, level and near one over the square root of "
        "the number of layers with DeepScaleLM, falling with depth with pre-LN; "
        "layers whose ratio goes to zero no longer contribute."
    )
    title = "Branch-to-stream ratio by layer"
    parts = [("branch_ratio_attention", "attention"), ("branch_ratio_mlp", "feed-forward")]
    if context.encoder_layers:
        parts.insert(1, ("branch_ratio_cross", "cross-attention"))
    return _profiles(context, parts, title, caption, "branch / stream", wide=True) or _unmeasured(
        title, caption, wide=True
    )


def share_chart(context: Context) -> Chart:
    """What all tokens have in common, over depth."""
    caption = (
        "Part of the stream's power that all tokens have in common: some in every layer is normal, and "
        "pre-norm stacks may have much of it early in training; near 1 in most layers of a stack with norms "
        "in the stream means that it forgets its tokens and will stay at the token frequencies."
    )
    title = "Common share by layer"
    drawn = _profiles(
        context, [("common_share", "")], title, caption, "share of the stream's power", wide=True
    )
    if drawn is None and context.metrics.signal:
        return Chart(title, caption, missing="Measurements of this run do not have it.", wide=True)
    return drawn or _unmeasured(title, caption, wide=True)


def throughput_chart(context: Context) -> Chart:
    """Tokens, or images, per second and the share of waiting for data, over steps."""
    caption = (
        f"{context.counted.capitalize()}s per second of all devices together and, below, the share of each "
        "step spent waiting for data: a level line with dips at evaluations and checkpoints is normal at any "
        "depth, and waiting should stay below a few percent; a slow slide points to memory, heat or a busy "
        "file system."
    )
    title, metrics = "Throughput", context.metrics
    steps, speeds = _series(metrics.train, lambda event: event.tokens_per_s)
    if not len(steps):
        return Chart(title, caption, missing="No throughput has been logged.", wide=True)
    wait_steps, waits = _series(metrics.train, lambda event: event.data_wait_share)
    with drawing() as new:
        figure = new((WIDE[0], 3.8 if len(wait_steps) else 3.0))
        panels = figure.subplots(
            2 if len(wait_steps) else 1,
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": (2.4, 1)[: 2 if len(wait_steps) else 1]},
        )[:, 0]
        upper, lowest = panels[0], panels[-1]
        raw_and_smooth(upper, steps, speeds, "each logged step")
        upper.set_ylim(0, float(np.quantile(speeds, 0.995)) * 1.25 or None)
        upper.set_ylabel(f"{context.counted}s per second")
        upper.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if len(wait_steps):
            lowest.fill_between(*envelope(wait_steps, 100 * waits), color=ORANGE, alpha=0.35, linewidth=0)
            lowest.plot(*envelope(wait_steps, 100 * waits), color=ORANGE, linewidth=0.8, **dots(wait_steps))
            lowest.set_ylim(0, max(5.0, 105 * float(np.max(waits))))
            lowest.set_ylabel("data wait\n(% of step)")
        for axes in panels:
            _resumes(axes, metrics)
        step_axis(lowest)
        legend(figure, *upper.get_legend_handles_labels())
        figure.align_ylabels()
        svg = to_svg(figure, "throughput", title)
    return Chart(
        title,
        caption,
        svg,
        notes=() if len(wait_steps) else ("Waiting for data has not been logged.",),
        wide=True,
    )


def _unmeasured(title: str, caption: str, wide: bool = False) -> Chart:
    return Chart(
        title,
        caption,
        missing=(
            "No layer signals have been logged: "
            "log.signal_interval is 0, or the first measurement is still to come."
        ),
        wide=wide,
    )


def _profiles(
    context: Context,
    parts: Sequence[tuple[str, str]],
    title: str,
    caption: str,
    label: str,
    wide: bool = False,
) -> Chart | None:
    """Values over layers, a line per measurement, light (early) to dark (late).

    None where nothing was measured.
    """
    chosen = _shown(context.metrics.signal, [key for key, _ in parts])
    if not chosen:
        return None
    with drawing() as new:
        from matplotlib import colormaps

        figure = new((WIDE[0], HALF[1]) if wide else HALF)
        panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        shades = colormaps["viridis_r"](np.linspace(0.22, 1.0, len(chosen)) if len(chosen) > 1 else [1.0])
        for axes, (key, name) in zip(panels, parts, strict=True):
            for event, shade in zip(chosen, shades, strict=True):
                layers, values = event.profile(key)
                layers, values = (
                    [layer for layer, value in zip(layers, values, strict=True) if value > 0],
                    [value for value in values if value > 0],
                )
                dots = {"marker": "o", "markersize": 2.5} if len(layers) <= 64 else {}
                axes.plot(
                    layers,
                    values,
                    color=shade,
                    linewidth=1.3,
                    label=f"{event.step:,}" if event.step < 10_000 else quantity(event.step),
                    **dots,
                )
            axes.set_yscale("log")
            log_ticks(axes)
            what = [name] * bool(name)
            if context.encoder_layers:
                axes.axvline(context.encoder_layers + 0.5, color=GREY, linewidth=0.8, linestyle=":")
                what.append(f"encoder to {context.encoder_layers}")
            axes.set_xlabel("layer" + (f" ({', '.join(what)})" if what else ""))
            whole_ticks(axes)
        panels[0].set_ylabel(label)
        handles, labels = panels[0].get_legend_handles_labels()
        legend(figure, handles, labels, "step")
        svg = to_svg(figure, re.sub(r"\W+", "-", title.lower()), title)
    return Chart(title, caption, svg, wide=wide)


def _shown(events: Sequence[Signal], keys: Sequence[str]) -> list[Signal]:
    """First, last and up to four between of the measurements that have any of the keys.

    Each is read from the file, so as few as can be.
    """

    def measured(event: Signal) -> bool:
        return any(event.profile(key)[0] for key in keys)

    chosen = _spread(list(events))
    return chosen if all(map(measured, chosen)) else _spread([event for event in events if measured(event)])


def _spread(events: list[Signal]) -> list[Signal]:
    """First, last and up to four between, evenly over the list."""
    if len(events) <= MOST_PROFILES:
        return events
    return [events[round(place)] for place in np.linspace(0, len(events) - 1, MOST_PROFILES)]


def _series(
    events: Sequence[Train], value: Callable[[Train], float], positive: bool = False
) -> tuple[Values, Values]:
    """Steps and finite values."""
    pairs = [(event.step, value(event)) for event in events]
    pairs = [
        (step, number) for step, number in pairs if math.isfinite(number) and (number > 0 or not positive)
    ]
    steps, numbers = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=np.float64), np.array(numbers, dtype=np.float64)


def _limit(axes: Axes, losses: Values, context: Context) -> int:
    """Keeps single high losses from flattening the picture; returns how many lie above it."""
    if len(losses) < SHORT:
        return 0
    evaluated = [event.loss for event in context.metrics.eval if math.isfinite(event.loss)]
    level = context.unigram_entropy if math.isfinite(context.unigram_entropy) else -math.inf
    usual = max(float(np.quantile(losses, 0.99)), *evaluated, level)
    usual = max(usual, min(float(np.max(losses[:5])), 2 * usual))  # the start is worth seeing
    low, high = axes.get_ylim()
    top = usual + 0.12 * (usual - low)
    if high > top:
        axes.set_ylim(low, top)
        return int(np.count_nonzero(losses > top))
    return 0


def _token_axis(axes: Axes, metrics: Metrics, counted: str) -> None:
    """Tokens, or images, consumed along the top, where they are proportional to the steps."""
    known = [event for event in metrics.train if math.isfinite(event.tokens) and event.tokens > 0]
    if not known:
        return
    share = known[-1].tokens / known[-1].step
    if any(abs(event.tokens - share * event.step) > 0.01 * event.tokens + share for event in known):
        return

    def to_tokens(step: ArrayLike) -> ArrayLike:
        return np.asarray(step) * share

    def to_steps(tokens: ArrayLike) -> ArrayLike:
        return np.asarray(tokens) / share

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.set_xlabel(f"{counted}s", color=GREY)
    top.spines["top"].set_visible(False)
    top.tick_params(length=0, labelcolor=GREY)
    top.xaxis.set_major_formatter(lambda value, _: quantity(value))


def _resumes(axes: Axes, metrics: Metrics) -> None:
    strength = 0.9 if len(metrics.resumes) <= 5 else 0.4
    for index, start in enumerate(metrics.resumes):
        axes.axvline(
            start.step,
            color=PURPLE,
            linestyle=(0, (4, 2)),
            linewidth=1.0,
            alpha=strength,
            label="" if index else "resumed",
            zorder=1,
        )
