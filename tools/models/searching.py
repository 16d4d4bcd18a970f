"""Options of commands that translate: how to search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.trained.beam import Search

Beam = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Beginnings of a text that are followed at once; 1 is greedy search. Default: 4.",
        show_default=False,
    ),
]
LengthPenalty = Annotated[
    float | None,
    typer.Option(
        help="A text is worth its log probability / tokens^LENGTH_PENALTY: 0 prefers short ones, "
        "1 compares means. Default: 0.6.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens of a text at most, with its end mark. Default: as many as a target had in training.",
        show_default=False,
    ),
]


def search_of(
    beam: int | None, length_penalty: float | None, max_new_tokens: int | None, best: int | None = None
) -> Search:
    """The search that is asked for. Raises UserError for a value out of range."""
    from pretrain.trained.beam import Search

    given = {
        "beam": beam,
        "length_penalty": length_penalty,
        "max_new_tokens": max_new_tokens,
        "best": best,
    }
    return Search(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
