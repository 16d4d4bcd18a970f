"""Documents inside windows of tokens that do not see each other (`data.document_mask`)."""

from __future__ import annotations

import torch
from torch import Tensor


def document_parts(inputs: Tensor, end_mark: int) -> dict[str, Tensor]:
    """What a batch says of documents: their numbers, and each token's position in its own.

    inputs: [b, s], windows of the stream of documents, each ended by `end_mark`.
    Returns documents and positions, [b, s] int64 each.
    The mark at the end of a document stands at the beginning of the next one, whose first token is
    told from it alone. So every token but a window's first is a label, as without the mask.
    """
    first = inputs == end_mark
    return {"documents": first.long().cumsum(1), "positions": _since(first)}


def _since(first: Tensor) -> Tensor:
    """Tokens since the last one of which `first` is True, or the beginning of the row: [b, s]."""
    places = torch.arange(first.shape[1], device=first.device).expand_as(first)
    return places - torch.where(first, places, 0).cummax(1).values


def in_pieces(batch: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """A batch of windows [b, s] as rows of `length` tokens, [b s / length, length].

    A row is read as if nothing came before it, and its labels are those that its tokens had.
    """
    if batch["tokens"].shape[1] == length:
        return batch
    cut = {name: value.reshape(-1, length) for name, value in batch.items() if value.dim()}
    if "documents" in cut:
        documents, first = cut["documents"], torch.zeros_like(cut["tokens"], dtype=torch.bool)
        first[:, 1:] = documents[:, 1:] != documents[:, :-1]
        cut["positions"] = _since(first)
    return batch | cut
