"""Layers with a window, as lists in config.json have them, and as we do."""

from __future__ import annotations

from collections.abc import Sequence

from model.hf.settings.refusal import refuse_first


def window_fields(windowed: Sequence[bool], size: int | None, kind: str) -> dict[str, object]:
    """Our fields of layers of which some see a window of `size` tokens, the token itself included.

    Raises UserError where the layers without it do not follow each other evenly.
    """
    if not any(windowed):
        return {}
    whole = [index for index, local in enumerate(windowed) if not local]
    refuse_first(kind, [(size is None or size < 2, f"its window has {size} tokens (sliding_window)")])
    assert size is not None
    if not whole:
        return {"window": size - 1}
    first, count = whole[0], len(windowed)
    every = whole[1] - first if len(whole) > 1 else max(first + 1, count - first, 2)
    expected = [(index - first) % every != 0 for index in range(count)]
    refuse_first(
        kind,
        [
            (
                list(windowed) != expected or first >= every,
                "its layers that see all tokens do not follow each other evenly (layer_types, "
                "max_window_layers)",
            )
        ],
    )
    return {"window": size - 1, "global_every": every, "global_first": first}
