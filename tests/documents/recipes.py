"""The picture of a thousand layers in the documents, from the measured runs beside them.

    python -m tests.documents.recipes

Writes docs/images/thousand_layers.png from docs/measured/recipes.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pretrain.report.style import INK, PALETTE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
SOURCE, PICTURE = ROOT / "docs/measured/recipes.json", ROOT / "docs/images/thousand_layers.png"
FREQUENCIES = 4.232
"""Nats per token that the training text's frequencies cost on the validation samples."""
SHOWN = (
    ("b2t, with the recipe", ["model.scheme=b2t", "model.scheme_options.branch=2", "optimizer.lr=0.016"]),
    ("deepscalelm_pre_ln, with it", ["model.scheme=deepscalelm_pre_ln", "optimizer.lr=0.016"]),
    ("b2t as published", ["model.scheme=b2t", "optimizer.lr=4e-3", "schedule.warmup_steps=100"]),
)
"""Legend of each run, and settings by which it is found."""


class Run(TypedDict):
    """A run of docs/measured/recipes.json, as far as it is drawn."""

    setting: list[str]
    train: dict[str, float]
    gradient_norm: dict[str, float]


def found(runs: list[Run], wanted: list[str]) -> Run:
    """The first run of 1000 layers that has these settings. Raises StopIteration without one."""
    deep = ["model.num_layers=1000", *wanted]
    return next(run for run in runs if set(deep) <= set(run["setting"]))


def smooth(values: list[float], reach: int = 4) -> list[float]:
    """Means over the values around each."""
    parts = [values[max(0, at - reach) : at + reach + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def losses(axes: Axes, runs: list[tuple[str, Run]]) -> None:
    """Training loss over steps."""
    axes.axhline(FREQUENCIES, color=INK, linestyle=":", linewidth=1.2, label="token frequencies")
    for (label, run), color in zip(runs, PALETTE, strict=False):
        axes.plot([int(step) for step in run["train"]], smooth(list(run["train"].values())), color=color)
        axes.plot([], [], color=color, label=label)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(3.1, 6.0))


def gradients(axes: Axes, runs: list[tuple[str, Run]]) -> None:
    """Gradient norm of each layer's weights at the last step."""
    for (_, run), color in zip(runs, PALETTE, strict=False):
        axes.semilogy([int(one) for one in run["gradient_norm"]], run["gradient_norm"].values(), color=color)
    axes.set(xlabel="layer", ylabel="gradient norm at the last step")


def main() -> None:
    """Draws the picture."""
    runs: list[Run] = json.loads(SOURCE.read_text(encoding="utf-8"))["runs"]
    shown = [(label, found(runs, wanted)) for label, wanted in SHOWN]
    with drawing() as new:
        figure = new((9.2, 3.6))
        left, right = figure.subplots(1, 2)
        losses(left, shown)
        gradients(right, shown)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
        figure.savefig(PICTURE, dpi=130)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
