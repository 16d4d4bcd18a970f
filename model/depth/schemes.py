"""The table of depth schemes, and how each connects its sublayers.

This is the only place that knows a scheme's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from model.depth.scheme import LAYER_ROLES, Depth, Scheme, WeightRole
from model.depth.sublayer import Layer, Sublayer
from model.depth.transfer import Transfer


def _pre() -> Layer:
    sublayer = Sublayer(norm_in=True)
    return Layer(sublayer, sublayer, sublayer)


def _post(residual: float = 1.0, branch: float = 1.0) -> Layer:
    """LN(residual x + branch F(x)).

    All norms but the layer's last are written as the next sublayer's Norm_in with the residual
    taken after it. That is the same function, and lets a fused norm + linear kernel return the
    normed residual.
    """
    first = Sublayer(residual_scale=residual, branch_scale=branch)
    middle = Sublayer(norm_in=True, residual_from_norm=True, residual_scale=residual, branch_scale=branch)
    last = Sublayer(
        norm_in=True, residual_from_norm=True, norm_out=True, residual_scale=residual, branch_scale=branch
    )
    return Layer(attention=first, cross=middle, mlp=last)


def _b2t(depth: Depth) -> Layer:
    """y = LN(x_layer + h + F(h)), as in Takase et al. 2023, eq. for B2T.

    It is post-LN plus the layer's input, coefficient 1, before the layer's last norm.
    """
    post = _post(branch=_branch(depth))
    return replace(post, mlp=replace(post.mlp, skip_scale=1.0))


def _branch(depth: Depth) -> float:
    """Factor on every branch that option `branch`, c, asks for: c / N, and 1 where c is 0.

    A post-norm divides what tells tokens apart by 1 + ratio of branch to stream, sublayer by
    sublayer, so the sum of the ratios over the depth has to stay O(1).
    A factor before the branch holds while the weights move. A gain in the weights does not,
    because Adam's steps have the size of the rate whatever the size of the weights (derived).
    """
    return float(depth.options["branch"]) / depth.total or 1.0


def _rescale_gains(depth: Depth) -> Mapping[WeightRole, float]:
    rescaled = depth.options["rescale"] and not depth.options["branch"]
    return dict.fromkeys(LAYER_ROLES, depth.total**-0.5) if rescaled else {}


def deepscale_constants(depth: Depth) -> tuple[float, float]:
    """(lambda, beta), where lambda^2 = 1 - beta^2 (Kedia et al. 2024).

    beta^2 = k / (number of sublayers)^alpha.
    Raises ValueError when k is so large that beta^2 exceeds 1.
    """
    beta2 = float(depth.options["k"]) / (depth.sublayers * depth.total) ** float(depth.options["alpha"])
    if not 0 < beta2 <= 1:
        options = " and ".join(f"{name}={float(depth.options[name]):g}" for name in ("k", "alpha"))
        raise ValueError(
            f"model.scheme_options: {options} give beta^2={beta2:.3g} at {depth.total} layers, "
            "and it must lie in (0, 1]: choose a smaller k or a larger alpha"
        )
    return math.sqrt(1 - beta2), math.sqrt(beta2)


def _deepscale_pre(depth: Depth) -> Layer:
    lam, beta = deepscale_constants(depth)
    sublayer = Sublayer(norm_in=True, residual_scale=lam, branch_scale=beta)
    return _crossed(Layer(sublayer, sublayer, sublayer), depth)


def _deepscale_post(depth: Depth) -> Layer:
    return _crossed(_post(*deepscale_constants(depth)), depth)


def _crossed(layer: Layer, depth: Depth) -> Layer:
    """With option `unscaled_cross`, cross-attention has no constants, as in the authors' code."""
    if not depth.options["unscaled_cross"]:
        return layer
    return replace(layer, cross=replace(layer.cross, residual_scale=1.0, branch_scale=1.0))


def _deepnorm(depth: Depth) -> Layer:
    """Residual constant a of Wang et al. 2022.

    (2N)^1/4 in a stack by itself, (3M)^1/4 in a decoder of M layers over an encoder,
    0.81 (N^4 M)^1/16 in the encoder of N layers under it.
    """
    if depth.other is None:
        return _post(residual=(depth.sublayers * depth.total) ** 0.25)
    if depth.sublayers == 3:
        return _post(residual=(3 * depth.total) ** 0.25)
    return _post(residual=0.81 * (depth.total**4 * depth.other) ** 0.0625)


def _deepnorm_gains(depth: Depth) -> Mapping[WeightRole, float]:
    """v, o, fc1, fc2 divided by (8N)^1/4 in a stack by itself (Wang et al. 2022).

    By (12M)^1/4 in a decoder over an encoder, cross-attention included, and by
    (N^4 M)^1/16 / 1.15 in the encoder under it.
    """
    if depth.other is not None and depth.sublayers == 2:
        divisor = (depth.total**4 * depth.other) ** 0.0625 / 1.15
    else:
        divisor = (4 * depth.sublayers * depth.total) ** 0.25
    return dict.fromkeys(("v", "o", "fc1", "fc2"), 1 / divisor)


def _layernorm_scaling(depth: Depth) -> Layer:
    sublayer = Sublayer(norm_in=True, input_scale=depth.number**-0.5)
    return Layer(sublayer, sublayer, sublayer)


def _peri() -> Layer:
    sublayer = Sublayer(norm_in=True, norm_branch=True)
    return Layer(sublayer, sublayer, sublayer)


def _mix(depth: Depth) -> Layer:
    """Post-LN in the first floor(post_fraction x N) layers, pre-LN above them."""
    return (
        _post() if depth.number <= math.floor(float(depth.options["post_fraction"]) * depth.total) else _pre()
    )


def _spannorm(depth: Depth) -> Layer:
    """h = LN(x + Attn(x)); y = LN(x + FFN(h)).

    The layer's input replaces the feed-forward residual.
    """
    post = _post()
    last = Sublayer(norm_in=True, norm_out=True, residual_scale=0.0, skip_scale=1.0)
    return Layer(attention=post.attention, cross=post.cross, mlp=last)


def _keel(depth: Depth) -> Layer:
    """x' = LN(a x + F(LN x)), a the number of sublayers unless option `alpha` gives it.

    The first sublayer of the stack has no norm after it, and a is 1 in the first layer
    (Chen & Wei 2026; the paper's two exceptions).
    """
    first = depth.number == 1
    highway = 1.0 if first else float(depth.options["alpha"]) or float(depth.sublayers * depth.total)
    sublayer = Sublayer(norm_in=True, norm_out=True, residual_scale=highway)
    return Layer(Sublayer(norm_in=True) if first else sublayer, sublayer, sublayer)


def _gpas() -> Layer:
    """x <- x - silu(g) stopgrad(x) after each residual sum of pre-LN, g learned, from 0."""
    return replace(_pre(), gate=True)


def _hybrid(depth: Depth) -> Layer:
    """y = x + A(x) with normed queries, keys and values; x' = LN(y) + F(LN(y)).

    Zhuo et al. 2025. Option `star`: in the first layer attention has an input norm
    and the feed-forward's residual none.
    """
    attention = Sublayer(norm_q=True, norm_k=True, norm_v=True)
    mlp = Sublayer(norm_in=True, residual_from_norm=True)
    if depth.options["star"] and depth.number == 1:
        attention, mlp = replace(attention, norm_in=True), replace(mlp, residual_from_norm=False)
    return Layer(attention, mlp, cross=Sublayer(norm_in=True))


def _subln() -> Layer:
    """x + F(LN x) whose F norms what enters its last matrix (Wang et al. 2023, Magneto)."""
    sublayer = Sublayer(norm_in=True, norm_last=True)
    return Layer(sublayer, sublayer, cross=Sublayer(norm_in=True))


def _subln_gains(depth: Depth) -> Mapping[WeightRole, float]:
    """v, o, fc1, fc2 times sqrt(ln 2N) in a stack by itself (Wang et al. 2023).

    Times sqrt(ln 3M) in a decoder of M layers over an encoder, but not in cross-attention, and
    times sqrt(ln 3M ln 2N / 3) in the encoder of N layers under it.
    """
    if depth.sublayers == 3:
        gain = math.sqrt(math.log(3 * depth.total))
        return {**dict.fromkeys(("v", "o", "fc1", "fc2"), gain), "cv": 1.0, "co": 1.0}
    square = math.log(2 * depth.total)
    if depth.other is not None:
        square *= math.log(3 * depth.other) / 3
    return dict.fromkeys(("v", "o", "fc1", "fc2"), math.sqrt(square))


_DEEPSCALE = {"k": 2.0, "alpha": 1.0, "unscaled_cross": False}
_DEEPSCALE_LIMITS = {"k": (1e-9, 1e9), "alpha": (0.0, 10.0)}
_POST = {"branch": 0.0, "in_forward": False}
_POST_LIMITS = {"branch": (0.0, 1e6)}
_POST_REPLACED = {"rescale": "branch", "in_forward": "branch"}

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "pre_ln",
            "x + F(LN x), norm after the stack",
            "Xiong et al. 2020",
            lambda depth: _pre(),
            transfer=Transfer(),
        ),
        Scheme(
            "post_ln",
            "LN(x + F x); option `rescale` multiplies all layer weights by N^-1/2, "
            "option `branch`, c, every branch by c / N",
            "Vaswani et al. 2017",
            lambda depth: _post(branch=_branch(depth)),
            gains=_rescale_gains,
            final_norm=False,
            options={"rescale": False, **_POST},
            limits=_POST_LIMITS,
            replaced=_POST_REPLACED,
            transfer=Transfer(option="branch"),
        ),
        Scheme(
            "b2t",
            "post-LN with the layer's input added before its last norm; "
            "option `rescale` (default on) multiplies all layer weights by N^-1/2, "
            "option `branch`, c, every branch by c / N in its place",
            "Takase et al. 2023 and the authors' code of May 2023",
            _b2t,
            gains=_rescale_gains,
            base="fairseq",
            final_norm=False,
            options={"rescale": True, **_POST},
            limits=_POST_LIMITS,
            replaced=_POST_REPLACED,
            transfer=Transfer(option="branch"),
        ),
        Scheme(
            "deepscalelm_pre_ln",
            "lambda x + beta F(LN x), variance-preserving weights",
            "Kedia et al. 2024",
            _deepscale_pre,
            base="deepscale",
            options=_DEEPSCALE,
            limits=_DEEPSCALE_LIMITS,
            transfer=Transfer(keeps_variance=True),
            cross_options=("unscaled_cross",),
        ),
        Scheme(
            "deepscalelm_post_ln",
            "LN(lambda x + beta F x), variance-preserving weights, norm after the embedding",
            "Kedia et al. 2024",
            _deepscale_post,
            base="deepscale",
            embedding_norm=True,
            final_norm=False,
            options=_DEEPSCALE,
            limits=_DEEPSCALE_LIMITS,
            transfer=Transfer(keeps_variance=True),
            cross_options=("unscaled_cross",),
        ),
        Scheme(
            "deepnorm",
            "LN(a x + F x), a = (2N)^1/4, v, o, fc1, fc2 divided by (8N)^1/4",
            "Wang et al. 2022",
            _deepnorm,
            gains=_deepnorm_gains,
            final_norm=False,
            options={"in_forward": False},
        ),
        Scheme(
            "layernorm_scaling",
            "x + F(LN(x) / sqrt(layer number))",
            "Sun et al. 2025",
            _layernorm_scaling,
            transfer=Transfer(),
        ),
        Scheme(
            "peri_ln",
            "x + LN(F(LN x)), norms around the stack (sandwich)",
            "Kim et al. 2025",
            lambda depth: _peri(),
            embedding_norm=True,
            transfer=Transfer(),
        ),
        Scheme(
            "mix_ln",
            "post-LN in the first quarter of the layers, pre-LN after",
            "Li et al. 2024",
            _mix,
            options={"post_fraction": 0.25},
            limits={"post_fraction": (0.0, 1.0)},
        ),
        Scheme(
            "spannorm",
            "LN(x_layer + FFN(LN(x_layer + Attn x_layer)))",
            "SpanNorm 2026",
            _spannorm,
            embedding_norm=True,
            final_norm=False,
        ),
        Scheme(
            "keel",
            "LN(a x + F(LN x)), a = number of sublayers, but 1 in the first layer, "
            "whose attention has no norm after it",
            "Chen & Wei 2026",
            _keel,
            final_norm=False,
            options={"alpha": 0.0},
            limits={"alpha": (0.0, 1e6)},
        ),
        Scheme(
            "gpas",
            "pre-LN whose stream is scaled by 1 - silu(g) after each sum, forward only; "
            "g is learned, one for each layer",
            "Chen et al. 2025",
            lambda depth: _gpas(),
        ),
        Scheme(
            "hybridnorm",
            "y = x + Attn(x) with normed queries, keys and values; LN(y) + FFN(LN(y)); "
            "option `star` norms the first layer's input and not its residual",
            "Zhuo et al. 2025",
            _hybrid,
            options={"star": False},
            no_cross="it norms queries, keys and values of one sequence",
        ),
        Scheme(
            "subln",
            "pre-LN with a norm before each output projection too; v, o, fc1, fc2 times sqrt(ln 2N)",
            "Wang et al. 2023",
            lambda depth: _subln(),
            gains=_subln_gains,
        ),
    )
}


def scheme_names() -> list[str]:
    """All schemes, in table order."""
    return list(SCHEMES)
