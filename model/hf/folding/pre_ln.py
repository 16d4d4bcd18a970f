"""The factors that make a stock architecture compute a model.

Pre-LN form: every sublayer is x_j = a_j x_{j-1} + b_j F_j(s_j Norm(x_{j-1})).
With c_j = a_1 ... a_j and y_j = x_j / c_j,

    y_j = y_{j-1} + (b_j / c_j) F_j(s_j Norm(y_{j-1})),

because a norm does not see the scale of its input.
So b_j / c_j goes into F_j's last linear layer (weight and bias), s_j into the norm's gain and bias,
the embeddings stay, and a factor on the logits goes into the last norm, which is the head's where
there is one (derived; epsilon aside).
Epsilon is where scale shows: a norm of y with epsilon e is the norm of x = c y with epsilon e c^2.
A stock model has one epsilon for all its norms, so it can only be near the right one.
The export is our model with other epsilons, exactly, and how far that moves the logits is measured
before anything is written (`model/hf/proof.py`).

Post-LN form: `model/hf/folding/post_ln.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from model.config import ModelConfig
from model.depth.plan import DepthPlan
from model.hf.folding.parts import LEAVES, PARTS, tables
from model.hf.folding.post_ln import post_ln_factors
from model.hf.mapping import last_norm
from model.hf.names.conversions import FINAL_BIAS, OPT_EPSILON, Target
from model.weights.bases import sinusoid_scale

FIXED_EPSILON: dict[Target, float] = dict.fromkeys(("opt", *FINAL_BIAS, "speech_to_text"), OPT_EPSILON)
"""Of the norms of targets whose config.json has none."""


@dataclass(frozen=True)
class Fold:
    """A stock architecture's form of a model."""

    factors: Mapping[str, float]
    """Canonical tensor name -> factor on it; names left out have 1."""
    epsilon: float
    """The exported one."""
    epsilons: Mapping[str, float] = field(default_factory=dict)
    """Canonical norm name -> the epsilon it then has in terms of our stream.

    Empty where that is the model's own everywhere.
    """


def pre_ln_obstacle(plan: DepthPlan, *, embedding_norm: bool = False) -> str | None:
    """Why a plan is not of pre-LN form, or None. embedding_norm: the target's norm there is one."""
    if plan.embedding_norm and not embedding_norm:
        return "the scheme has a norm after the embedding"
    if not plan.final_norm:
        return "the scheme has no norm after the last layer"
    if any(layer.gate for layer in plan.layers):
        return "the scheme's stream is scaled by learned gates"
    for index, kind, sublayer in plan.sublayers():
        problems = (
            (not sublayer.norm_in, "has no norm before its branch"),
            (sublayer.norm_branch, "has a norm after its branch"),
            (bool(sublayer.inner), "norms its queries, keys or values"),
            (sublayer.norm_last, "norms what enters its last matrix"),
            (sublayer.norm_out, "has a norm after the residual sum"),
            (sublayer.residual_from_norm, "takes its residual after a norm"),
            (sublayer.skip_scale != 0, "adds the layer's input a second time"),
            (not sublayer.residual_scale > 0, f"scales its residual by {sublayer.residual_scale}"),
        )
        for present, problem in problems:
            if present:
                return f"the scheme's {kind} sublayer of layer {index + 1} {problem}"
    if any(sublayer.residual_scale != 1 for _, _, sublayer in plan.folded_sublayers()):
        return "the scheme's residual factors multiply up to more than a fold can hold"
    return None


def sandwich_obstacle(plan: DepthPlan) -> str | None:
    """Why a plan is not of pre-LN form with a norm after every branch, or None."""
    if not all(sublayer.norm_branch for _, _, sublayer in plan.sublayers()):
        return "it norms what every branch adds (scheme peri_ln)"
    bare = (
        replace(
            layer,
            attention=replace(layer.attention, norm_branch=False),
            mlp=replace(layer.mlp, norm_branch=False),
        )
        for layer in plan.layers
    )
    return pre_ln_obstacle(replace(plan, layers=tuple(bare)))


def fold(target: Target, config: ModelConfig, logit_scale: float) -> Fold:
    """Factors and epsilons of one export. Meaningful where `obstacle` is None."""
    return FOLDS[target](target, config, logit_scale)


def _as_it_is(target: Target, config: ModelConfig, logit_scale: float) -> Fold:
    return Fold({}, config.norm_epsilon)


def _post_ln(target: Target, config: ModelConfig, logit_scale: float) -> Fold:
    epsilon = FIXED_EPSILON.get(target, config.norm_epsilon)
    entering = 1 / sinusoid_scale(config) if target == "marian" else None
    factors, epsilons = post_ln_factors(target, config, logit_scale, epsilon, entering)
    return Fold(factors, epsilon, epsilons)


def _pre_ln(target: Target, config: ModelConfig, logit_scale: float) -> Fold:
    factors: dict[str, float] = {}
    scales: dict[str, float] = {}
    for stack in config.blueprint.stacks:
        plan = config.stack_plan(stack)
        for index, kind, sublayer in plan.folded_sublayers():
            layer, part = stack.layer(index), PARTS[kind]
            if sublayer.norm_in:
                scales[layer + part.entrance] = sublayer.entering
                for leaf in LEAVES:
                    factors[f"{layer}{part.entrance}.{leaf}"] = sublayer.input_scale
            else:  # the first of a model without that norm, whose projection reads the stream
                factors[f"{layer}{part.first}.weight"] = sublayer.input_scale
                scales[tables(config, stack).norm] = 1.0
            scales.update({f"{layer}self_attention.{role}_layernorm": 1.0 for role in sublayer.inner})
            added = part.branch if sublayer.norm_branch else part.last
            if sublayer.norm_branch:  # whose input has no unit of the stream
                scales[layer + part.branch] = 1.0
            for leaf in LEAVES:
                factors[f"{layer}{added}.{leaf}"] = sublayer.branch_scale
            if sublayer.norm_out:  # the last of an encoder under a decoder
                scales[layer + part.exit] = sublayer.joined
        if plan.final_norm:
            scales[stack.final_norm] = sublayer.leaving
    last = last_norm(config)
    # What a head reads has been normed before.
    scales.setdefault(last, 1.0)
    for leaf in LEAVES:
        factors[f"{last}.{leaf}"] = logit_scale
    epsilon = shared_epsilon(config.norm_epsilon, list(scales.values()))
    alike = all(scale == 1.0 for scale in scales.values())
    fixed = FIXED_EPSILON.get(target)
    if target == "speech_to_text" and fixed is not None:
        # Its positions have a factor of 1, which decides in which unit the stream is.
        unit = 1 / sinusoid_scale(config)
        epsilon, alike = fixed / unit**2, alike and fixed / unit**2 == config.norm_epsilon
        _enter(factors, config, fixed, unit)
    elif fixed is not None:
        _enter(factors, config, fixed, math.sqrt(fixed / (config.norm_epsilon if alike else epsilon)))
    factors = {name: factor for name, factor in factors.items() if factor != 1.0}
    if alike:
        return Fold(factors, fixed or config.norm_epsilon)
    return Fold(factors, fixed or epsilon, {name: epsilon * scale**2 for name, scale in scales.items()})


def _scaled_words(target: Target, config: ModelConfig, logit_scale: float) -> Fold:
    """Of Gemma, which multiplies the words of its table by the root of the width."""
    found, root = _pre_ln(target, config, logit_scale), math.sqrt(config.hidden_size)
    factors = dict(found.factors)
    factors["embedding.word_embeddings.weight"] = 1 / root
    if config.tie_embeddings:
        gain = f"{last_norm(config)}.weight"
        factors[gain] = factors.get(gain, 1.0) * root
    return replace(found, factors=factors)


def _enter(factors: dict[str, float], config: ModelConfig, epsilon: float, unit: float) -> None:
    """Multiplies the stream by `unit`, so that norms with a fixed epsilon have the one wanted."""
    for stack in config.blueprint.stacks:
        plan, place = config.stack_plan(stack), tables(config, stack)
        before, leaving = [place.words, place.positions], unit
        if plan.embedding_norm:
            factors |= {f"{place.norm}.{leaf}": unit for leaf in LEAVES}
            leaving = math.sqrt(epsilon / config.norm_epsilon)
        factors |= {f"{module}.weight": leaving for module in before}
        for index, kind, _ in plan.sublayers():
            for leaf in LEAVES:
                factors[f"{stack.layer(index)}{PARTS[kind].last}.{leaf}"] *= unit
    if config.tie_embeddings:
        for leaf in LEAVES:
            factors[f"{last_norm(config)}.{leaf}"] /= factors["embedding.word_embeddings.weight"]


FOLDS: dict[Target, Callable[[Target, ModelConfig, float], Fold]] = {
    "gpt2": _pre_ln,
    "llama": _pre_ln,
    "opt": _post_ln,
    "bert": _post_ln,
    "megatron-bert": _pre_ln,
    "eurobert": _pre_ln,
    "modernbert": _pre_ln,
    "mistral": _pre_ln,
    "bart": _post_ln,
    "mbart": _pre_ln,
    "blenderbot": _pre_ln,
    "marian": _post_ln,
    "qwen2": _pre_ln,
    "qwen3": _pre_ln,
    "gpt_neox": _pre_ln,
    "gemma": _scaled_words,
    "gemma2": _scaled_words,
    "gemma3_text": _scaled_words,
    "vit": _pre_ln,
    "speech_to_text": _pre_ln,
    "fathom": _as_it_is,
}


def shared_epsilon(epsilon: float, scales: list[float]) -> float:
    """The one epsilon for norms whose input is our stream divided by each of `scales`.

    To first order the norm of x = c y is off by the factor 1 - (e c^2 - epsilon) / (2 var x).
    This e keeps that smallest at its largest, for a stream of even variance (derived).
    Scaling the embeddings as well would only scale e.
    """
    squares = [scale**2 for scale in scales]
    return epsilon * 2 / (min(squares) + max(squares))
