"""The independent evaluation of an encoder-decoder, in fp64, against the published equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.hf.crossed_reference import CrossedEvaluation
from model.hf.reference import Cache
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from tests.model.network.test_seq2seq import CROSSED, OPTIONS, VARIANTS, batch, build, described, padded
from tests.reference import seq2seq

CASES = [
    *[(scheme, VARIANTS[number % len(VARIANTS)]) for number, scheme in enumerate(CROSSED)],
    *[(scheme, {"scheme_options": options}) for scheme, options in OPTIONS],
]
LENGTHS = [10, 7]
"""Of the sources."""


def evaluation(scheme: str, **changes: Any) -> tuple[CrossedEvaluation, torch.Tensor]:
    """One, and logits by the reference of `batch(padded(LENGTHS, ...))`."""
    chunk, config = build(scheme, **changes)
    weights = {one.name: one.parameter.detach().clone() for one in named_parameters(chunk, 0, 1)}
    given = batch(padded(LENGTHS, [8, 8]))
    fields = ("source", "tokens", "source_documents", "documents", "source_positions", "positions")
    theirs = seq2seq.logits(
        weights, described(config), seq2seq.Batch(**{name: given[name] for name in fields})
    )
    own = CrossedEvaluation(weights, config, logit_scale=logit_scale(config), dtype=torch.float64)
    return own, theirs[..., : config.vocab_size]


@pytest.mark.parametrize(("scheme", "changes"), CASES)
def test_logits_are_those_of_the_equations(scheme: str, changes: dict[str, Any]) -> None:
    own, theirs = evaluation(scheme, **changes)
    given = batch(padded(LENGTHS, [8, 8]))
    memory = own.encode(given["source"], given["source_documents"])
    torch.testing.assert_close(own.decode(given["tokens"], memory), theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", VARIANTS)
def test_token_by_token_and_side_by_side(changes: dict[str, Any]) -> None:
    """Two sequences of one source, with what was computed before kept."""
    own, theirs = evaluation("deepscalelm_post_ln", **changes)
    given = batch(padded(LENGTHS, [8, 8]))
    memory = own.encode(given["source"], given["source_documents"])
    other = given["tokens"].flip(1)
    both = torch.stack((given["tokens"], other), dim=1).flatten(0, 1)
    cache = Cache()
    pieces = [own.decode(part, memory, cache) for part in (both[:, :3], both[:, 3:4], both[:, 4:])]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[::2], theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.cat(pieces, dim=1)[1::2], own.decode(other, memory), rtol=1e-10, atol=1e-10
    )
    alone = own.decode(other[1:], memory.of(torch.tensor([1])), last_only=True)
    torch.testing.assert_close(pieces[-1][3:, -1:], alone, rtol=1e-10, atol=1e-10)
