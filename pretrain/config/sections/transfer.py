"""Rates, epsilons and decay under CompleteP (Dey et al. 2025): factors by depth and width.

With m_L = layers over the base's, m_N = width over the base's and alpha as configured:

| parameters | rate | epsilon | decay |
|---|---|---|---|
| matrices of the layers | m_N^-1 m_L^(alpha-1) | m_N^-1 m_L^-alpha | m_N |
| norms and biases of the layers | m_L^(alpha-1) | m_N^-1 m_L^-alpha | |
| tables, output projection, norms around the stack | 1 | m_N^-1 | 1 |
| bias on the logits | 1 | 1 | |

Epsilons follow the size of gradients. The published table gives those of the layers; the authors'
code has the layers' everywhere, which a later paper (Mlodozeniec et al. 2025) corrects to m_N^-1
for embeddings.
"""

from __future__ import annotations

from model.config import ModelConfig
from model.parameters.table import Role, Row
from parallel.factors import ONE, Factors


def transferred(model: ModelConfig, row: Row) -> Factors:
    """What `model.transfer` makes of the optimizer's settings for a parameter; 1 without it.

    model: with the sizes of the parameter's stack (`ModelConfig.of`).
    """
    wider, deeper, alpha = model.wider, model.deeper, model.transfer.alpha
    if row.role is Role.LOGIT_BIAS:
        return ONE
    if row.layer is None:
        return Factors(eps=1 / wider)
    rate, eps = deeper ** (alpha - 1), deeper**-alpha / wider
    if len(row.shape) < 2:
        return Factors(rate=rate, eps=eps)
    return Factors(rate=rate / wider, eps=eps, decay=wider)
