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
    ("b2t, with the recipe", ["+include=configs/recipe/b2t.yaml", "optimizer.lr=0.032"]),
    ("deepscalelm_post_ln", ["+include=configs/recipe/deepscalelm_post_ln.yaml", "optimizer.lr=0.032"]),
    ("deepscalelm_pre_ln", ["+include=configs/recipe/deepscalelm_pre_ln.yaml", "optimizer.lr=0.032"]),
    ("b2t as published", ["model.scheme=b2t", "optimizer.lr=4e-3", "schedule.warmup_steps=100"]),
)
"""Legend of each set of runs, and settings by which they are found: a seed each."""


class Run(TypedDict):
    """A run of docs/measured/recipes.json, as far as it is drawn."""

    setting: list[str]
    train: dict[str, float]
    gradient_norm: dict[str, float]


def found(runs: list[Run], wanted: list[str]) -> list[Run]:
    """The runs of 1000 layers that have these settings. Raises ValueError without one."""
    deep = ["model.num_layers=1000", *wanted]
    there = [run for run in runs if set(deep) <= set(run["setting"])]
    if not there:
        raise ValueError(f"{SOURCE} has no run with {' '.join(deep)}")
    return there


def smooth(values: list[float], reach: int = 4) -> list[float]:
    """Means over the values around each."""
    parts = [values[max(0, at - reach) : at + reach + 1] for at in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def band(axes: Axes, places: list[int], curves: list[list[float]], color: str) -> None:
    """The mean of some curves, and what lies between the lowest and the highest of them."""
    columns = list(zip(*curves, strict=True))
    axes.plot(places, [sum(column) / len(column) for column in columns], color=color)
    if len(curves) > 1:
        low, high = ([choose(column) for column in columns] for choose in (min, max))
        axes.fill_between(places, low, high, color=color, alpha=0.25, linewidth=0)


def losses(axes: Axes, shown: list[tuple[str, list[Run]]]) -> None:
    """Training loss over steps."""
    axes.axhline(FREQUENCIES, color=INK, linestyle=":", linewidth=1.2, label="token frequencies")
    for (label, runs), color in zip(shown, PALETTE, strict=False):
        curves = [smooth(list(run["train"].values())) for run in runs]
        band(axes, [int(step) for step in runs[0]["train"]], curves, color)
        axes.plot([], [], color=color, label=label)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(3.1, 6.0))


def gradients(axes: Axes, shown: list[tuple[str, list[Run]]]) -> None:
    """Gradient norm of each layer's weights at the last step."""
    axes.set_yscale("log")
    for (_, runs), color in zip(shown, PALETTE, strict=False):
        curves = [list(run["gradient_norm"].values()) for run in runs]
        band(axes, [int(one) for one in runs[0]["gradient_norm"]], curves, color)
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
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8)
        figure.savefig(PICTURE, dpi=130)
    print(f"wrote {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
