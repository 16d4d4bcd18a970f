"""Which names of a batch a model reads."""

from __future__ import annotations

from model.config import ModelConfig


def unread(model: ModelConfig) -> frozenset[str]:
    """Names in a batch that would change nothing, although they say something of the samples."""
    crossed = model.blueprint.crossed
    ways = {
        **dict.fromkeys(("source", "source_documents"), crossed and model.speech is None),
        "source_positions": crossed,
        **dict.fromkeys(("frames", "frame_documents"), model.speech is not None),
        "documents": model.image is None,
        "token_types": model.token_types > 0,
        "tokens": model.image is None,
        "images": model.image is not None,
        "targets": model.blueprint.head.targets,
    }
    return frozenset(name for name, read in ways.items() if not read)
