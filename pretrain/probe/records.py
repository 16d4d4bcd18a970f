"""What a probe found: of one layer in one pass, of a layer over all seeds, of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from model.config import ModelConfig
from model.depth.scheme import CROSS, LAYER_ROLES, WeightRole
from pretrain.probe.sublayers import Sums

ROLES: tuple[WeightRole, ...] = (*LAYER_ROLES, *CROSS.values())


@dataclass(frozen=True)
class LayerProbe:
    """One layer, over all seeds.

    Means of gradients over seeds are geometric.
    Fields in `_theory` hold the prediction, None where there is none.
    """

    layer: int
    """From 1, in its stack."""
    forward_variance: float
    """torch.var of the stream after the layer, mean over seeds."""
    forward_variance_min: float
    """The lowest over seeds."""
    forward_variance_max: float
    """The highest over seeds."""
    token_correlation: float
    """Mean product of two different tokens' vectors of that stream over their mean square."""
    grad_variance: float
    """Mean square of the loss gradient at the stream entering the layer.

    Relative to that of the last layer of its stack, geometric mean over seeds.
    """
    grad_variance_late: float
    """The same of the positions in the second half of the sequence only; of images, of all."""
    grad_variance_late_min: float
    """The lowest over seeds."""
    grad_variance_late_max: float
    """The highest over seeds."""
    log10_grad_variance: float
    """Decimal logarithm of `grad_variance`, which does not underflow."""
    log10_grad_variance_late: float
    """Decimal logarithm of `grad_variance_late`, which does not underflow."""
    weight_grad_norm: float
    """Frobenius norm of the gradients of all matrices of the layer, geometric mean over seeds."""
    weight_grad_norms: dict[str, float]
    """The same by kind of matrix: q, k, v, o, fc1, fc2, and of cross-attention cq, ck, cv, co."""
    common_share: float
    """Part of that stream's power that all tokens of the batch have in common, mean over seeds."""
    branch_ratio_attention: float
    """Root mean square of what attention adds over that of what it is added to, mean over seeds."""
    branch_ratio_mlp: float
    """The same of the feed-forward."""
    forgetting: float
    """ln of the gradient entering the layer over that leaving its stack's last, as norms imply it.

    The law of `model/theory/forgetting.py` for the measured sizes, mean over seeds.
    """
    stack: str
    """The name of its stack."""
    branch_ratio_cross: float | None = None
    """The same of cross-attention; None in a layer without."""
    branch_ratio_cross_theory: float | None = None
    forward_variance_theory: float | None = None
    token_correlation_theory: float | None = None
    grad_variance_late_theory: float | None = None


@dataclass(frozen=True)
class Probe:
    """A measured model."""

    scheme: str
    """Its name."""
    label: str
    """Its name with options."""
    num_layers: int
    """Of all stacks."""
    seeds: int
    layers: tuple[LayerProbe, ...]
    model: ModelConfig
    seq_length: int
    batch: int
    dtype: str
    tokens: str
    """Where the tokens are from, in words."""
    parameters: int
    loss: float
    """Nats per label, mean over seeds."""
    embedding_variance: float
    """Of the stream entering layer 1."""
    smallest_gradient_log10: float
    """Decimal logarithm of the smallest root mean square of the late gradient itself.

    The smallest over layers and seeds.
    """
    smallest_by_stack: dict[str, float] = field(default_factory=dict)
    """The same of each stack."""
    reader_weight_grad: float | None = None
    """`weight_grad_norm` of the decoder's last layer, in a model that has an encoder."""
    gradient_limits: tuple[float, float] | None = None
    """Of an encoder under a decoder: what its gradient is between in theory.

    At its first layer relative to its last, where tokens have independent ones, and all the same.
    """
    source_length: int | None = None
    """Tokens of a sequence of an encoder under a decoder."""
    documents: float = 1.0
    """Texts of a sequence, which do not see each other, mean over all."""
    checkpoint: str | None = None
    start_variance: float = 0.0
    """Part of the last layer's `forward_variance` that is the start of the logits.

    That of the last norm's bias at initialisation, see `model/weights/unigram.py`.
    """
    options: dict[str, Any] = field(default_factory=dict)

    def values(self, key: str) -> list[float]:
        """One measurement of all layers, first to last; nan where there is none."""
        found = [getattr(layer, key) for layer in self.layers]
        return [math.nan if value is None else float(value) for value in found]

    def stream_variances(self) -> list[float]:
        """`forward_variance` of all layers, without the start of the logits."""
        *lower, last = self.values("forward_variance")
        return [*lower, last - self.start_variance]


@dataclass
class Sample:
    """One layer in one pass."""

    variance: float = math.nan
    correlation: float = math.nan
    log_gradient: float = -math.inf
    """Natural logarithm of the mean square gradient of the stream entering the layer."""
    log_late: float = -math.inf
    """The same over the second half of each text."""
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))
    common: float = math.nan
    """Share of the stream's power that all tokens have in common."""
    sums: Sums = field(default_factory=dict)
    """Mean squares at the sublayers, and of the gains of the norms in the stream."""

    def branch_ratio(self, part: str) -> float:
        """Size of a branch over that of what it is added to; nan where that is 0."""
        base = self.sums[f"{part}_residual"]
        return math.sqrt(self.sums[f"{part}_branch"] / base) if base > 0 else math.nan
