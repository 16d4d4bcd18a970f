"""Options of commands that continue a text: how tokens are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pretrain.trained.generate import Sampling

MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        help="Tokens to add at most; a document may end before. "
        "Default: 64, or as many as the model has positions for.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0 takes the likeliest token each time; larger values are more varied. Default: 1.",
        show_default=False,
    ),
]
TopK = Annotated[int | None, typer.Option(help="Sample from the K likeliest tokens only.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens that together have this probability.")
]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling. Default: 0.", show_default=False),
]
GREEDY = {"temperature": 0, "top_k": 1}
"""Values that leave nothing to choose."""


def sampling_of(**given: float | None) -> Sampling:
    """The settings that are given, by name, and the defaults of the others.

    Raises UserError for one that has no effect, because the likeliest token is taken each time.
    """
    from model.errors import UserError
    from pretrain.trained.generate import Sampling

    for greedy, value in GREEDY.items():
        if given.get(greedy) != value:
            continue
        for name in ("temperature", "top_k", "top_p", "seed"):
            if name != greedy and given.get(name) is not None:
                raise UserError(
                    f"{_option(name)} {given[name]:g} has no effect with {_option(greedy)} {value}, "
                    "which takes the likeliest token each time: leave one of them out"
                )
    return Sampling(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
