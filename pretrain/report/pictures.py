"""A grid of validation images with what the newest checkpoint takes them for."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.errors import UserError
from model.words import printable
from pretrain.report.run import RunRecord
from pretrain.report.run_charts import Chart
from pretrain.report.style import GREEN, ORANGE, drawing, to_svg

COLUMNS, ROWS = 10, 4
TITLE = "Validation images"
CAPTION = (
    "The first images of the validation split, each with the class that the newest checkpoint finds "
    "likeliest and its share; where that is wrong it is in orange, with the right class after the arrow."
)


def picture_charts(run: RunRecord) -> list[Chart]:
    """The grid, of a run on images; nothing of another run."""
    model = run.model
    if model is None or model.image is None:
        return []
    try:
        images, labels, found, shares, names = _predictions(run.folder)
    except (UserError, OSError) as error:
        return [Chart(TITLE, CAPTION, missing=printable(str(error), 300), wide=True)]
    with drawing() as new:
        rows = -(-len(images) // COLUMNS)
        figure = new((10.0, 1.25 * rows))
        for place, image in enumerate(images):
            axes = figure.add_subplot(rows, COLUMNS, place + 1)
            shown = image.transpose(1, 2, 0)
            if shown.shape[2] in (1, 2):
                axes.imshow(shown[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            else:
                axes.imshow(shown[..., :3], interpolation="nearest")
            right = labels[place] == found[place]
            text = f"{names[found[place]][:12]} {shares[place]:.0%}"
            text += "" if right else f" → {names[labels[place]][:12]}"
            axes.set_title(text, fontsize=7, color=GREEN if right else ORANGE, pad=2)
            axes.set_axis_off()
        svg = to_svg(figure, "pictures", TITLE)
    return [Chart(TITLE, CAPTION, svg, wide=True)]


def _predictions(
    folder: Path,
) -> tuple[list[np.ndarray], list[int], list[int], list[float], tuple[str, ...]]:
    """Pixels [c, h, w], classes, likeliest ones and their shares of validation images; names.

    Raises UserError or OSError for a run without a checkpoint, or whose data are gone.
    """
    from model.hf.reference import Evaluation
    from pretrain.trained.measures.classified import images_of
    from pretrain.trained.open import open_trained

    trained = open_trained(folder)
    data, _ = images_of(trained, None, "validation")
    numbers = range(min(COLUMNS * ROWS, data.blend.samples_per_epoch[0]))
    batch = data.batch(numbers)
    evaluate = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    shares, found = evaluate(batch["images"]).softmax(-1).max(-1)
    pixels = ((batch["images"] * data.view.std + data.view.mean) * 255).round().clamp(0, 255).byte()
    return (
        list(pixels.numpy()),
        batch["labels"][:, 0].tolist(),
        found.tolist(),
        shares.tolist(),
        data.reader.facts.classes,
    )
