"""Depth schemes as data: where norms sit, the residual algebra's coefficients, the weight gains.

This is the only place that knows a scheme's name.
One sublayer (attention, cross-attention or feed-forward) of layer l computes, for stream x and
the layer's input x_layer,

    u  = input_scale * Norm_in(x)
    b  = Norm_branch(F(u))
    R  = residual_scale * (Norm_in(x) if residual_from_norm else x)
    x' = Norm_out(R + Dropout(branch_scale * b) + skip_scale * x_layer)

where every norm is optional.
Inside attention, each head's queries, keys and values may be normed before they meet (`norm_q`,
`norm_k`, `norm_v`): over the width of a head, with one gain for all heads, before rotation.
With `norm_last` a norm stands before the last matrix of F, over the whole width that enters it.
All coefficients are Python floats computed from the global layer number and depth.
They are never buffers, which a meta-device build would wipe, and never stage-local counts,
which pipeline parallelism would change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from model.depth.sublayer import Layer, Sublayer
from model.depth.transfer import Reach, Transfer
from model.words import printable

WeightRole = Literal["q", "k", "v", "o", "fc1", "fc2"]
Base = Literal["xavier", "fairseq", "normal", "deepscale"]
Options = Mapping[str, float | bool]


@dataclass(frozen=True)
class Depth:
    """Where a layer stands."""

    number: int
    """Global, from 1."""
    total: int
    """Layers of the stack."""
    options: Options
    """The scheme's."""
    sublayers: int = 2
    """Of one layer; 3 with cross-attention."""


@dataclass(frozen=True)
class Scheme:
    """One way to connect sublayers."""

    name: str
    summary: str
    source: str
    layer: Callable[[Depth], Layer]
    """Coefficients of a layer."""
    gains: Callable[[Depth], Mapping[WeightRole, float]] = lambda depth: {}
    """Factor on the standard deviation of each weight role, on top of the base initialisation."""
    base: Base = "xavier"
    """Initialisation the scheme was published with."""
    embedding_norm: bool = False
    """A norm before the stack."""
    final_norm: bool = True
    """A norm after the stack."""
    options: Options = field(default_factory=dict)
    """Every option with its default; others are refused."""
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Least and largest value of each option that is a number."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """Option -> the other one that takes its place wherever that is not 0."""
    transfer: Transfer | None = None
    """What becomes of it away from a base depth; None where no rule is known."""

    def check_options(self, given: Mapping[str, object]) -> None:
        """Raises ValueError for an option that does not fit.

        The scheme lacks it, or its value is of another type or out of its limits.
        """
        for key, value in given.items():
            if key not in self.options:
                known = ", ".join(f"{name}={default}" for name, default in self.options.items()) or "none"
                raise ValueError(
                    f"model.scheme_options.{printable(key, 60)} has no effect with "
                    f"model.scheme={self.name}; its options: {known}"
                )
            wanted = "true/false value" if isinstance(self.options[key], bool) else "number"
            if isinstance(self.options[key], bool) != isinstance(value, bool) or not isinstance(
                value, (bool, int, float)
            ):
                raise ValueError(
                    f"model.scheme_options.{key}={printable(repr(value), 60)} must be a {wanted}"
                )
            least, most = self.limits.get(key, (value, value))
            if not least <= value <= most:
                raise ValueError(f"model.scheme_options.{key}={value} must be from {least:g} to {most:g}")
        for key, other in self.replaced.items():
            if given.get(key) and given.get(other):
                raise ValueError(
                    f"model.scheme_options.{key}={str(given[key]).lower()} has no effect with "
                    f"{other}={given[other]}, which takes its place: remove one of them"
                )

    def plan(
        self,
        num_layers: int,
        options: Options | None = None,
        sublayers: int = 2,
        reach: Reach | None = None,
    ) -> tuple[Layer, ...]:
        """Coefficients of all layers of a stack.

        reach: with settings that carry over from another depth (`model/depth/transfer.py`).
        Raises ValueError on unknown options, and where there is no rule for `reach`.
        """
        depths = self._depths(num_layers, options, sublayers)
        rule = None if reach is None else self._rule(depths[0])
        if rule is not None and reach is not None and (factor := reach.shrinkage(num_layers)) != 1:
            base = [self.layer(replace(depth, total=reach.base)) for depth in depths]
            return tuple(_carried_over(layer, factor, rule) for layer in base)
        layers = tuple(self.layer(depth) for depth in depths)
        if not depths[0].options.get("in_forward"):
            return layers
        return tuple(_carried(layer, self.gains(depth)) for layer, depth in zip(layers, depths, strict=True))

    def gain_plan(
        self, num_layers: int, options: Options | None = None, sublayers: int = 2
    ) -> tuple[Mapping[WeightRole, float], ...]:
        """Weight gains of all layers of a stack, by role; a missing role has gain 1.

        Raises ValueError on unknown options.
        """
        depths = self._depths(num_layers, options, sublayers)
        return tuple({} if depth.options.get("in_forward") else self.gains(depth) for depth in depths)

    def _rule(self, depth: Depth) -> Transfer:
        if self.transfer is None:
            known = ", ".join(scheme.name for scheme in SCHEMES.values() if scheme.transfer)
            raise ValueError(
                f"model.transfer.method=completep has no rule for model.scheme={self.name}: "
                f"set it to none, or choose one of {known}"
            )
        option = self.transfer.option
        if option is not None and not depth.options[option]:
            raise ValueError(
                f"model.transfer.method=completep has no rule for model.scheme={self.name} without "
                f"model.scheme_options.{option}: give that, or set model.transfer.method=none"
            )
        return self.transfer

    def _depths(self, num_layers: int, options: Options | None, sublayers: int) -> list[Depth]:
        self.check_options(options or {})
        merged = {**self.options, **(options or {})}
        depths = [Depth(number, num_layers, merged, sublayers) for number in range(1, num_layers + 1)]
        if merged.get("in_forward") and not self.gains(depths[0]):
            raise ValueError(
                f"model.scheme_options.in_forward=true has no effect: model.scheme={self.name} gives its "
                "weights no gains with these options; remove it"
            )
        return depths


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


def _carried(layer: Layer, gains: Mapping[WeightRole, float]) -> Layer:
    """The layer that multiplies in its forward pass by what would be gains of its weights.

    The same function of weights drawn without gains, while biases are zero (derived).
    Queries and keys share their gain through the scores, which are bilinear in them.
    """
    gain = {role: gains.get(role, 1.0) for role in LAYER_ROLES}
    scores = math.sqrt(gain["q"] * gain["k"])

    def scaled(sublayer: Sublayer, before: float, after: float) -> Sublayer:
        return replace(
            sublayer,
            input_scale=sublayer.input_scale * before,
            branch_scale=sublayer.branch_scale * after,
        )

    return replace(
        layer,
        attention=scaled(layer.attention, scores, gain["v"] * gain["o"] / scores),
        cross=scaled(layer.cross, scores, gain["v"] * gain["o"] / scores),
        mlp=scaled(layer.mlp, gain["fc1"], gain["fc2"]),
    )


def _carried_over(layer: Layer, factor: float, rule: Transfer) -> Layer:
    """A layer of the base depth with its branches multiplied by `factor`."""

    def scaled(one: Sublayer) -> Sublayer:
        branch = one.branch_scale * factor
        if rule.keeps_variance and branch > 1:
            raise ValueError(
                f"model.transfer.base_layers gives branches a factor of {branch:.3g}, and more than 1 "
                "leaves no residual that keeps the variance: choose a smaller base"
            )
        residual = math.sqrt(1 - branch**2) if rule.keeps_variance else one.residual_scale
        return replace(one, branch_scale=branch, residual_scale=residual)

    return Layer(scaled(layer.attention), scaled(layer.mlp), scaled(layer.cross))


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
    return Layer(sublayer, sublayer, sublayer)


def _deepscale_post(depth: Depth) -> Layer:
    return _post(*deepscale_constants(depth))


def _deepnorm_gains(depth: Depth) -> Mapping[WeightRole, float]:
    """v, o, fc1, fc2 divided by (8N)^1/4 (Wang et al. 2022, decoder-only or encoder-only row)."""
    return dict.fromkeys(("v", "o", "fc1", "fc2"), (8 * depth.total) ** -0.25)


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
    """v, o, fc1, fc2 times sqrt(ln 2N) (Wang et al. 2023, decoder-only or encoder-only)."""
    return dict.fromkeys(("v", "o", "fc1", "fc2"), math.sqrt(math.log(2 * depth.total)))


LAYER_ROLES: tuple[WeightRole, ...] = ("q", "k", "v", "o", "fc1", "fc2")
_DEEPSCALE = {"k": 2.0, "alpha": 1.0}
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
        ),
        Scheme(
            "deepnorm",
            "LN(a x + F x), a = (2N)^1/4, v, o, fc1, fc2 divided by (8N)^1/4",
            "Wang et al. 2022",
            lambda depth: _post(residual=(2 * depth.total) ** 0.25),
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
