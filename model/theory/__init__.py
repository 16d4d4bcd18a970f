"""What do a scheme and an initialisation do to variance, correlation and gradients?

Numbers in, numbers out; no torch.
"""

from __future__ import annotations

from model.theory.correlation import (
    correlation_map,
    fixed_point,
    product_moment,
    relu_kappa,
    second_moment,
    slope_moment,
    stream_correlation,
    zipf_correlation,
)
from model.theory.forgetting import LayerPassage, Passage, along_common, log_factors, log_gradients
from model.theory.laws import (
    b2t_factor,
    deepscale_gradient_bound,
    geometric_gradient_variance,
    post_ln_factor,
    pre_ln_variance,
    pre_ln_weight_gradient_norm,
    spannorm_factor,
)
from model.theory.propagation import LayerSignal, propagate
from model.theory.recursion import (
    PlannedLayer,
    Sizes,
    bidirectional_attention,
    causal_attention,
    deepscale_plan,
    published_attention,
)
from model.theory.step import Stream

__all__ = [
    "LayerPassage",
    "LayerSignal",
    "Passage",
    "PlannedLayer",
    "Sizes",
    "Stream",
    "along_common",
    "b2t_factor",
    "bidirectional_attention",
    "causal_attention",
    "correlation_map",
    "deepscale_gradient_bound",
    "deepscale_plan",
    "fixed_point",
    "geometric_gradient_variance",
    "log_factors",
    "log_gradients",
    "post_ln_factor",
    "pre_ln_variance",
    "pre_ln_weight_gradient_norm",
    "product_moment",
    "propagate",
    "published_attention",
    "relu_kappa",
    "second_moment",
    "slope_moment",
    "spannorm_factor",
    "stream_correlation",
    "zipf_correlation",
]
