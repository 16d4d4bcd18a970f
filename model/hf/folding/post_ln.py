"""Post-LN models in the form of OPT, BERT, BART and Marian.

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

Keys and values of cross-attention read the encoder's last norm, which keeps its scale: their
weights stay as they are.

BERT and BART have a norm after the embedding.
Marian adds fixed positions of one scale to its words, so that c_1 is what makes ours of them, and
the first norm of a stack has the epsilon e (a_1 / c_1)^2 instead of ours.
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
from model.families.family import Stack
from model.hf.folding.parts import LEAVES, PARTS, tables
from model.hf.mapping import last_norm, norm_layers
from model.hf.names.conversions import Target


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
    target: Target,
    config: ModelConfig,
    logit_scale: float,
    epsilon: float,
    entering: float | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Factors and epsilons, by canonical name, for a target whose norms have `epsilon`.

    entering: c_1 where the target's positions leave no choice of it. The first norm of a stack then
    has another epsilon than ours, which is told in terms of our stream; all others have ours.
    Meaningful where `post_ln_obstacle` is None.
    """
    ratio = math.sqrt(epsilon / config.norm_epsilon)
    factors: defaultdict[str, float] = defaultdict(lambda: 1.0)
    epsilons: dict[str, float] = {}
    first, last = norm_layers(target, config)
    before: list[str] = []

    def scale(modules: list[str], factor: float) -> None:
        for module in modules:
            for leaf in LEAVES:
                factors[f"{module}.{leaf}"] *= factor

    def norm_layer(norm: str) -> None:
        scale(before, ratio / math.sqrt(2))
        factors[f"{norm}.weight"] *= math.sqrt(2)
        before[:] = [norm]

    for stack in config.blueprint.stacks:
        plan, place = config.stack_plan(stack), tables(config, stack)
        # What makes the stream, and so takes its factor; words that two stacks share take it once.
        before = [place.positions] if factors.get(f"{place.words}.weight") else [place.words, place.positions]
        if plan.embedding_norm and not first:
            scale(before, ratio)
            before = [place.norm]
        if first:
            norm_layer("embedding.norm")
        given = None if plan.embedding_norm else entering
        for index, kind, sublayer in plan.sublayers():
            name, part = stack.layer(index), PARTS[kind]
            if sublayer.norm_in:
                before = [name + part.entrance]
            c = given or sublayer.residual_scale * ratio
            scale(before, c)
            factors[f"{name}{part.first}.weight"] *= sublayer.input_scale / c
            scale([name + part.last], sublayer.branch_scale * c / sublayer.residual_scale)
            if given is not None:
                epsilons[_first_norm(stack, plan)] = epsilon * (sublayer.residual_scale / given) ** 2
                given = None
            if sublayer.norm_out:
                before = [name + part.exit]
    if last:
        norm_layer(config.stack.final_norm)
    if config.head_transform:
        before = [last_norm(config)]
    scale(
        before, logit_scale / (factors["embedding.word_embeddings.weight"] if config.tie_embeddings else 1.0)
    )
    changed = {name: value for name, value in epsilons.items() if value != config.norm_epsilon}
    return {name: factor for name, factor in factors.items() if factor != 1.0}, changed


def _first_norm(stack: Stack, plan: DepthPlan) -> str:
    """The canonical name of the norm on the first sublayer's sum."""
    (_, kind, first), (layer, following, _), *_ = plan.sublayers()
    return (
        stack.layer(0) + PARTS[kind].exit
        if first.norm_out
        else stack.layer(layer) + PARTS[following].entrance
    )
