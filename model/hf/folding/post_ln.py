"""Post-LN models in the form of OPT and of BERT.

The form is exact for any residual constant, and for any epsilon although OPT has only one.

Post-LN form: sublayer j is x_j = Norm_j(a_j x_{j-1} + b_j F_j(s_j x_{j-1})),
epsilon `eps` in every norm.
OPT with `do_layer_norm_before=False` and BERT compute y_j = Norm_j(y_{j-1} + G_j(y_{j-1})) with
epsilon e.
Let the stream into sublayer j be y_{j-1} = c_j x_{j-1}, and

    G_j(y) = (b_j c_j / a_j) F_j(s_j y / c_j).

Then the sum is c_j / a_j times ours, and a norm of r u with epsilon e is the norm of u with
epsilon e / r^2. It is our norm for c_j = a_j sqrt(e / eps).
So s_j / c_j goes into the weight of F_j's first linear layer, b_j c_j / a_j into weight and bias
of its last one, and c_j into gain and bias of the norm before it, or into the embeddings.
Nothing stands between the last norm and the logits, so their factor goes into that norm,
with 1 / c for a tied table that was multiplied by c (derived).
Where a head stands between them, it has the factor in its own norm, and the stack's last norm none.

BERT has a norm after the embedding.
In OPT a norm around the stack becomes a layer whose branches are zero: two norms in a row.
The first has the gain k = sqrt(e) and no bias.
With v the variance of x, an input c x with c^2 = e / (2 eps) leaves it as
(x - mean) sqrt(e / (v + 2 eps)), of variance e v / (v + 2 eps).
The second makes that (x - mean) / sqrt(2 (v + eps)): the norm of x, epsilon included,
when its gain has a factor sqrt(2) (derived).
"""

from __future__ import annotations

import math
from collections import defaultdict

from model.config import ModelConfig
from model.depth.plan import DepthPlan
from model.hf.mapping import Target, last_norm, norm_layers

LEAVES = ("weight", "bias")


def post_ln_obstacle(plan: DepthPlan) -> str | None:
    """Why a plan is not of post-LN form, or None.

    A norm after the embedding and one after the stack do no harm.
    """
    # Whether the norm between this sublayer and the one before it is there:
    # none is needed before the first.
    normed = True
    if any(layer.gate for layer in plan.layers):
        return "the scheme's stream is scaled by learned gates"
    for index, kind, sublayer in plan.sublayers():
        problems = (
            (not normed and not sublayer.norm_in, "gets a residual sum without a norm"),
            (normed and sublayer.norm_in, "has a norm before its branch"),
            (sublayer.norm_in and not sublayer.residual_from_norm, "takes its residual before the norm"),
            (sublayer.norm_branch, "has a norm after its branch"),
            (bool(sublayer.inner), "norms its queries, keys or values"),
            (sublayer.norm_last, "norms what enters its last matrix"),
            (sublayer.skip_scale != 0, "adds the layer's input a second time"),
            (not sublayer.residual_scale > 0, f"scales its residual by {sublayer.residual_scale}"),
            (kind == "mlp" and not sublayer.norm_out, "has no norm after the residual sum"),
        )
        for present, problem in problems:
            if present:
                return f"the scheme's {kind} sublayer of layer {index + 1} {problem}"
        normed = sublayer.norm_out
    return None


def post_ln_factors(
    target: Target, config: ModelConfig, logit_scale: float, epsilon: float
) -> dict[str, float]:
    """Canonical tensor name -> factor on it, for a target whose norms have `epsilon`.

    Meaningful where `post_ln_obstacle` is None.
    """
    plan, ratio = config.depth_plan(), math.sqrt(epsilon / config.norm_epsilon)
    factors: defaultdict[str, float] = defaultdict(lambda: 1.0)
    first, last = norm_layers(target, plan)
    # What makes the stream, and so takes its factor.
    before = ["embedding.word_embeddings", "embedding.position_embeddings"]
    if plan.embedding_norm and not first:
        before = ["embedding.norm"]

    def scale(modules: list[str], factor: float) -> None:
        for module in modules:
            for leaf in LEAVES:
                factors[f"{module}.{leaf}"] *= factor

    def norm_layer(norm: str) -> None:
        scale(before, ratio / math.sqrt(2))
        factors[f"{norm}.weight"] *= math.sqrt(2)
        before[:] = [norm]

    if first:
        norm_layer("embedding.norm")
    for index, kind, sublayer in plan.sublayers():
        name, attention = config.stack.layer(index), kind == "attention"
        inner, outer = (
            ("self_attention.linear_qkv", "self_attention.linear_proj")
            if attention
            else ("mlp.linear_fc1", "mlp.linear_fc2")
        )
        if sublayer.norm_in:
            before = [f"{name}pre_mlp_layernorm"]
        c = sublayer.residual_scale * ratio
        scale(before, c)
        factors[f"{name}{inner}.weight"] *= sublayer.input_scale / c
        scale([f"{name}{outer}"], sublayer.branch_scale * ratio)
        if sublayer.norm_out:
            before = [name + ("self_attention_output_norm" if attention else "mlp_output_norm")]
    if last:
        norm_layer(config.stack.final_norm)
    if config.head_transform:
        before = [last_norm(config)]
    scale(
        before, logit_scale / (factors["embedding.word_embeddings.weight"] if config.tie_embeddings else 1.0)
    )
    return {name: factor for name, factor in factors.items() if factor != 1.0}
