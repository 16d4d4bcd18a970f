"""A speech model in plain PyTorch: two gated convolutions in front of `seq2seq.py`.

Of each clip alone, frames f_1 .. f_n as rows of m numbers, zeros before and after them:

    u_i = W1 [f_(2i-2) .. f_(2i+2)] + b1,   g_i = left half of u_i x sigmoid(right half)
    v_t = W2 [g_(2t-2) .. g_(2t+2)] + b2,   x_t = left half of v_t x sigmoid(right half) + place t

Fixed positions are fairseq's: (2 + t) 10000^(-i / (h / 2 - 1)), sines of all i, then cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference import gpt


def turns(places: Tensor, width: int) -> Tensor:
    """[..., width]."""
    half = width // 2
    rates = torch.tensor([10000 ** (-i / (half - 1)) for i in range(half)], dtype=torch.float64)
    angles = (2.0 + places.double())[..., None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def _gated(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Of every second row the window of five around it. weight: [out, in x 5]."""
    zeros = rows.new_zeros(2, rows.shape[1])
    padded = torch.cat((zeros, rows, zeros))
    found = []
    for start in range(0, len(rows), 2):
        window = padded[start : start + 5].T.reshape(-1)  # channel by channel, each with its places
        both = weight @ window if bias is None else weight @ window + bias
        left, right = both.tensor_split(2)
        found.append(left / (1 + torch.exp(-right)))
    return torch.stack(found)


def heard(parameters: gpt.Parameters, clip: Tensor, positions: Tensor | None = None) -> Tensor:
    """[tokens, hidden] of a clip [frames, m]. positions: [>= tokens, hidden], to be added."""
    for name in ("source_embedding.first", "source_embedding.second"):
        clip = _gated(clip, parameters[f"{name}.weight"], parameters.get(f"{name}.bias"))
    return clip if positions is None else clip + positions[: len(clip)]
