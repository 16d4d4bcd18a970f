"""Documents that share a row of tokens: who sees whom, and where each begins.

A batch names them: documents [b, t], numbers that differ from one document to the next, of whole
sequences, whatever part of them a rank has.
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def hidden_keys(documents: Tensor, places: Tensor, *, causal: bool) -> Tensor:
    """[b, 1, s, t], True where a token does not see another.

    A row always has a key that is not hidden: the token itself.
    documents: of whole sequences, [b, t]. places: in them, of the s tokens that ask.
    causal: what follows is hidden too, as attention takes no second mask beside this one.
    """
    hidden = documents[:, None, places, None] != documents[:, None, None, :]
    if causal:
        hidden |= torch.arange(documents.shape[1], device=hidden.device) > places[:, None]
    return hidden


def additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of the same shape to add to scores: 0, or minus infinity where `hidden` is True.

    Made once a micro-batch: PyTorch's attention would make one in every layer, and keep each.
    """
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def packed_sequences(documents: Tensor) -> PackedSeqParams:
    """Documents [b, s] as sequences of one row of b s tokens, row after row, for kernels that know
    such rows (`thd`).

    A document lies in one piece. Their number is read by the host.
    """
    rows, length = documents.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([rows * length]))).to(torch.int32)
    # The longest document is bounded by the row, so that the host need not ask for it.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


def turned_by_position(table: Tensor, positions: Tensor) -> Tensor:
    """A rotary table [s, 1, n, 2 d] read at positions [b, s]: [s, b, n, 2 d]."""
    return table[:, 0][positions.t()]
