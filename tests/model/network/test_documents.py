"""Documents of a row that do not see each other: each has the loss that it has alone."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from model.network.documents import packed_sequences
from pretrain.data.documents import document_parts, in_pieces
from tests.model.network.test_options import ROTARY, SEQ, build

MARK = 3
MODELS: dict[str, dict[str, Any]] = {
    "learned positions": {},
    "grouped queries that turn": ROTARY,
    "capped scores": {**ROTARY, "attention": {"soft_cap": 0.5, "qk_norm": True}},
    "windows in some layers, two bases": {
        **ROTARY,
        "window": 2,
        "global_every": 2,
        "rotary_base_local": 50,
    },
    "windows in all layers, post-norm": {"scheme": "b2t", "window": 2},
}


def windows(vocabulary: int) -> Tensor:
    """[3, SEQ + 1] tokens: marks at the border, side by side, at the end, and none."""
    tokens = torch.randint(4, vocabulary, (3, SEQ + 1), generator=torch.Generator().manual_seed(1))
    tokens[0, [0, 4, 5]] = MARK
    tokens[1, [6, SEQ - 1, SEQ]] = MARK
    return tokens


def alone(row: Tensor) -> list[Tensor]:
    """The documents of a window [SEQ + 1], each with the label after its last input."""
    starts = [0, *(at for at in range(1, SEQ) if row[at] == MARK), SEQ]
    return [row[first : last + 1] for first, last in itertools.pairwise(starts) if last > first]


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_batch_has_the_loss_and_gradient_of_its_documents(name: str) -> None:
    chunk, config = build(**MODELS[name])
    tokens = windows(config.vocab_size or 0)
    inputs = tokens[:, :-1]
    packed = chunk.train()({"tokens": inputs, "labels": tokens[:, 1:], **document_parts(inputs, MARK)})
    rows = [
        torch.cat([chunk({"tokens": part[None, :-1], "labels": part[None, 1:]})[0] for part in alone(row)])
        for row in tokens
    ]
    torch.testing.assert_close(packed, torch.stack(rows), rtol=1e-12, atol=1e-12)
    unmasked = chunk({"tokens": inputs, "labels": tokens[:, 1:]})
    assert not torch.allclose(unmasked[:2], packed[:2])
    torch.testing.assert_close(unmasked[2], packed[2], rtol=1e-12, atol=1e-12)
    parameters = [one for one in chunk.parameters() if one.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(packed.mean(), parameters),
        torch.autograd.grad(torch.stack(rows).mean(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_windows_in_pieces_are_documents_of_one_length() -> None:
    """What a warm-up of the length computes, with borders of documents inside the pieces too."""
    chunk, config = build(**ROTARY)
    tokens = windows(config.vocab_size or 0)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], **document_parts(tokens[:, :-1], MARK)}
    pieces = in_pieces(batch, 4)
    assert pieces["tokens"].shape == (9, 4)
    places = torch.arange(SEQ)
    number = 100 * batch["documents"] + places // 4
    begins = torch.where(number.diff(dim=1, prepend=number[:, :1] - 1) != 0, places, 0).cummax(1).values
    expected = chunk(batch | {"documents": number, "positions": places - begins})
    torch.testing.assert_close(chunk(pieces).view(3, SEQ), expected, rtol=1e-12, atol=1e-12)
    assert in_pieces(batch, SEQ) is batch


def test_rows_of_sequences_begin_where_documents_do() -> None:
    """A document goes on over no border between rows, and positions start again with it."""
    tokens = torch.tensor([[7, 7, MARK, 7, MARK], [MARK, 7, 7, 7, 7]])
    parts = document_parts(tokens, MARK)
    assert parts["documents"].tolist() == [[0, 0, 1, 1, 2], [1, 1, 1, 1, 1]]
    assert parts["positions"].tolist() == [[0, 1, 0, 1, 0], [0, 1, 2, 3, 4]]
    packed = packed_sequences(parts["documents"])
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 2, 4, 5, 10]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.qkv_format, packed.max_seqlen_q) == ("thd", 5)
