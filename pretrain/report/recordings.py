"""Filterbanks of validation recordings with what is said and what the checkpoint writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.errors import UserError
from model.words import printable
from pretrain.report.run import RunRecord
from pretrain.report.run_charts import Chart
from pretrain.report.style import GREEN, ORANGE, drawing, to_svg

SHOWN, NEW_TOKENS = 4, 60
TITLE = "Validation recordings"
CAPTION = (
    "Standardised filterbanks of the first recordings of the validation split, low filters below, with what "
    "is said in them and below it what the newest checkpoint writes by greedy search, in orange where that "
    "differs."
)


def recording_charts(run: RunRecord) -> list[Chart]:
    """The filterbanks, of a run on speech; nothing of another run."""
    if run.model is None or run.model.speech is None:
        return []
    try:
        clips = _written(run.folder)
    except (UserError, OSError) as error:
        return [Chart(TITLE, CAPTION, missing=printable(str(error), 300), wide=True)]
    with drawing() as new:
        figure = new((10.0, 1.9 * len(clips)))
        for place, (frames, said, written) in enumerate(clips):
            axes = figure.add_subplot(len(clips), 1, place + 1)
            extent = (0.0, len(frames) / 100, 0.0, float(frames.shape[1]))
            axes.imshow(
                frames.T, origin="lower", aspect="auto", cmap="magma", vmin=-2.5, vmax=2.5, extent=extent
            )
            axes.set_title(printable(said, 110), fontsize=8, loc="left", pad=3)
            colour = GREEN if said == written else ORANGE
            shown = printable(written, 110) or "(nothing)"
            axes.set_xlabel(shown, fontsize=8, loc="left", color=colour)
            axes.set_ylabel("filter", fontsize=7)
            axes.tick_params(labelsize=6)
            axes.grid(visible=False)
        svg = to_svg(figure, "recordings", TITLE)
    return [Chart(TITLE, CAPTION, svg, wide=True)]


def _written(folder: Path) -> list[tuple[np.ndarray, str, str]]:
    """Standardised frames [f, m] of validation clips, what is said, and what the model writes.

    Raises UserError or OSError for a run without a checkpoint, or whose data are gone.
    """
    from pretrain.trained.beam import Search
    from pretrain.trained.measures.clips import open_split
    from pretrain.trained.open import open_trained
    from pretrain.trained.transcribe import Transcriber
    from pretrain.trained.translate import searched

    trained = open_trained(folder)
    blend, transcriber = open_split(trained, "validation"), Transcriber(trained)
    clips: list[tuple[np.ndarray, np.ndarray]] = []
    for row in range(blend.samples_per_epoch[0]):
        clips += blend.clips_of(row)
        if len(clips) >= SHOWN:
            break
    clips = clips[:SHOWN]
    settings = Search(beam=1, max_new_tokens=NEW_TOKENS)
    found = searched(transcriber, [frames for frames, _ in clips], settings, SHOWN, None)
    return [
        (frames, transcriber.decode(ids[:-1].tolist()), best[0].line)
        for (frames, ids), best in zip(clips, found, strict=True)
    ]
