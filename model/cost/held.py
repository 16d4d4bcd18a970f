"""What a rank holds of a model's layers, as far as costs depend on it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from model.depth.placed import PlacedLayer
from model.depth.sublayer import Layer
from model.families.family import Stack


@dataclass(frozen=True)
class Norms:
    """Numbers of norms by what they make."""

    branch: int = 0
    """Those that make the input of a branch only, or a branch."""
    stream: int = 0
    """Those that make the stream too."""
    gates: int = 0
    """Sums that a learned gate of the stream reads and keeps, as if they were norms."""

    queries: int = 0
    """Those of every head's queries."""
    keys: int = 0
    """Those of every head's keys, or values, before rotation."""
    values: int = 0
    contexts: int = 0
    """Those of what attention gives, before its output projection."""
    hidden: int = 0
    """Those of a feed-forward's hidden layer, before its second matrix."""
    fed: int = 0
    """Those among `branch` that read what a join gave, and can be computed with it."""

    def __add__(self, other: Norms) -> Norms:
        return Norms(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> int:
        """All of them."""
        return self.branch + self.stream


@dataclass(frozen=True)
class Part:
    """Layers of one stack, side by side in one chunk of a pipeline."""

    stack: Stack
    count: int
    norms: Norms
    """In all of them."""
    most_norms: Norms
    """In one of them."""


Chunk = tuple[Part, ...]
"""Layers that pass the stream on without sending it: parts in the order of the stream."""


def chunk_of(places: Sequence[PlacedLayer], norms: Sequence[Norms]) -> Chunk:
    """The chunk of some layers. norms: of each."""
    parts = []
    for stack, group in itertools.groupby(zip(places, norms, strict=True), key=lambda pair: pair[0].stack):
        own = [one for _, one in group]
        parts.append(Part(stack, len(own), sum(own, Norms()), max(own, key=lambda one: one.total)))
    return tuple(parts)


def norms_of(plan: Layer, *, cross: bool = False) -> Norms:
    """Norms of one layer. cross: with cross-attention."""
    parts = (plan.attention, plan.cross, plan.mlp) if cross else (plan.attention, plan.mlp)
    stream = sum(part.norm_out + part.residual_from_norm for part in parts)
    norms = sum(part.norm_in + part.norm_branch + part.norm_out for part in parts)
    before = (parts[-1], *parts[:-1])  # of the first: as the last of the layer before
    fed = sum(
        part.norm_in and not (part.residual_from_norm or last.norm_out)
        for part, last in zip(parts, before, strict=True)
    )
    inner = (int(role in plan.attention.inner) for role in ("q", "k", "v"))
    ends = (int(part.norm_last) for part in (plan.attention, plan.mlp))
    gates = len(parts) if plan.gate else 0
    return replace(Norms(norms - stream, stream, gates, *inner, *ends), fed=fed)
