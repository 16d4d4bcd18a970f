"""CompleteP (Dey et al. 2025, table 1, AdamW): what each kind of parameter is multiplied by.

Written from the paper, with the epsilon of what is outside of the layers corrected
(Mlodozeniec et al. 2025). No code is shared with the product.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multipliers:
    """For a model m_n times as wide and m_l times as deep as its base."""

    branch: float
    """On every residual branch."""
    hidden_variance: float
    """On the variance of hidden matrices."""
    output: float
    """On the logits, beside what they are at the base."""
    hidden_rate: float
    hidden_decay: float
    vector_rate: float
    """Of norms and biases of the layers."""
    layer_eps: float
    outer_eps: float
    """Of tables, output projection and norms around the stack; their rate and decay stay."""


def multipliers(m_n: float, m_l: float, alpha: float) -> Multipliers:
    return Multipliers(
        branch=1 / m_l**alpha,
        hidden_variance=1 / m_n,
        output=1 / m_n,
        hidden_rate=1 / m_n * m_l ** (alpha - 1),
        hidden_decay=m_n,
        vector_rate=m_l ** (alpha - 1),
        layer_eps=1 / m_n / m_l**alpha,
        outer_eps=1 / m_n,
    )
