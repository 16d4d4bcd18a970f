"""Measurements as files: one JSON object and one picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.files import atomic_path
from model.records import without_nan
from pretrain.depth_use.runs import DepthUse
from pretrain.depth_use.verdict import effective_depth, verdict

PICTURES = (".png", ".svg", ".pdf")


def as_json(use: DepthUse) -> dict[str, Any]:
    """The documented object of one model. Numbers that are not finite are null."""
    model, measured = use.run.trained.config, use.measured
    found: dict[str, Any] = without_nan(
        {
            "label": use.run.label,
            "checkpoint": str(use.run.trained.reader.folder),
            "step": use.run.trained.reader.step,
            "scheme": model.scheme,
            "scheme_options": model.scheme_options,
            "num_layers": use.num_layers,
            "hidden_size": model.hidden_size,
            "data": use.run.data,
            "windows": sum(len(tokens) for tokens, _ in use.run.batches),
            "window": use.run.window,
            "tokens": measured.tokens,
            "precision": use.precision,
            "verdict": verdict(use),
            "loss": measured.loss,
            "effective_depth": effective_depth(measured),
            "singles": [asdict(skip) for skip in measured.singles],
            "blocks": [asdict(skip) for skip in measured.blocks],
            "layers": [asdict(layer) for layer in measured.layers],
            "predictions": [asdict(one) for one in measured.predictions],
        }
    )
    return found


def json_text(uses: Sequence[DepthUse]) -> str:
    """{"runs": [objects]}, also for one model."""
    return json.dumps({"runs": [as_json(use) for use in uses]}, indent=1, allow_nan=False) + "\n"


def write_picture(uses: Sequence[DepthUse], path: Path) -> None:
    """A picture, by the file's name. Raises UserError for another ending."""
    from pretrain.depth_use.charts import save_picture

    check_picture(path)
    with atomic_path(path) as temporary:
        save_picture(uses, temporary, path.suffix[1:])


def check_picture(path: Path) -> None:
    """Raises UserError where a file's ending names no kind of picture."""
    if path.suffix not in PICTURES:
        raise UserError(f"--plot {path}: the name must end in one of {', '.join(PICTURES)}")
