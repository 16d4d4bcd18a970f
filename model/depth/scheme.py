"""What a depth scheme says: where norms sit, the residual algebra's coefficients, the weight gains.

The schemes themselves are in `schemes.py` beside this file.
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
from model.words import printable, written

WeightRole = Literal["q", "k", "v", "o", "fc1", "fc2", "cq", "ck", "cv", "co"]
"""Of a matrix of a layer; those with a c are cross-attention's."""
Base = Literal["xavier", "fairseq", "normal", "deepscale"]
Options = Mapping[str, float | bool]
LAYER_ROLES: tuple[WeightRole, ...] = ("q", "k", "v", "o", "fc1", "fc2")
CROSS: Mapping[WeightRole, WeightRole] = {"q": "cq", "k": "ck", "v": "cv", "o": "co"}
"""Role of a matrix of cross-attention by that of its like in self-attention."""


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
    other: int | None = None
    """Layers of the other stack of an encoder-decoder; None where there is none."""


@dataclass(frozen=True)
class Scheme:
    """One way to connect sublayers."""

    name: str
    summary: str
    source: str
    layer: Callable[[Depth], Layer]
    """Coefficients of a layer."""
    gains: Callable[[Depth], Mapping[WeightRole, float]] = lambda depth: {}
    """Factor on the standard deviation of each weight role, on top of the base initialisation.

    Cross-attention's are those of self-attention unless they are named.
    """
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
    no_cross: str = ""
    """Why it has no rule for cross-attention; empty where it has one."""
    cross_options: tuple[str, ...] = ()
    """Options that only a stack with cross-attention reads."""

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
                    f"model.scheme_options.{key}={written(given[key])} has no effect with "
                    f"{other}={given[other]}, which takes its place: remove one of them"
                )

    def plan(
        self,
        num_layers: int,
        options: Options | None = None,
        sublayers: int = 2,
        reach: Reach | None = None,
        other: int | None = None,
    ) -> tuple[Layer, ...]:
        """Coefficients of all layers of a stack.

        reach: with settings that carry over from another depth (`model/depth/transfer.py`).
        other: layers of the other stack of an encoder-decoder.
        Raises ValueError on unknown options, and where there is no rule for `reach`.
        """
        depths = self._depths(num_layers, options, sublayers, other)
        rule = None if reach is None else self._rule(depths[0])
        if rule is not None and reach is not None and (factor := reach.shrinkage(num_layers)) != 1:
            base = [self.layer(replace(depth, total=reach.base)) for depth in depths]
            return tuple(_carried_over(layer, factor, rule) for layer in base)
        layers = tuple(self.layer(depth) for depth in depths)
        if not depths[0].options.get("in_forward"):
            return layers
        return tuple(_carried(layer, self.gains(depth)) for layer, depth in zip(layers, depths, strict=True))

    def gain_plan(
        self,
        num_layers: int,
        options: Options | None = None,
        sublayers: int = 2,
        other: int | None = None,
    ) -> tuple[Mapping[WeightRole, float], ...]:
        """Weight gains of all layers of a stack, by role; a missing role has gain 1.

        other: as in `plan`.
        Raises ValueError on unknown options.
        """
        depths = self._depths(num_layers, options, sublayers, other)
        if depths[0].options.get("in_forward"):
            return ({},) * num_layers
        gains = (self.gains(depth) for depth in depths)
        return tuple(map(_with_cross, gains) if sublayers == 3 else gains)

    def _rule(self, depth: Depth) -> Transfer:
        if self.transfer is None:
            raise ValueError(
                f"model.transfer.method=completep has no rule for model.scheme={self.name}: "
                "set it to none, or choose a scheme that docs/transfer.md lists"
            )
        option = self.transfer.option
        if option is not None and not depth.options[option]:
            raise ValueError(
                f"model.transfer.method=completep has no rule for model.scheme={self.name} without "
                f"model.scheme_options.{option}: give that, or set model.transfer.method=none"
            )
        return self.transfer

    def _depths(
        self, num_layers: int, options: Options | None, sublayers: int, other: int | None
    ) -> list[Depth]:
        self.check_options(options or {})
        merged = {**self.options, **(options or {})}
        depths = [Depth(number, num_layers, merged, sublayers, other) for number in range(1, num_layers + 1)]
        if merged.get("in_forward") and not self.gains(depths[0]):
            raise ValueError(
                f"model.scheme_options.in_forward=true has no effect: model.scheme={self.name} gives its "
                "weights no gains with these options; remove it"
            )
        return depths


def _with_cross(gains: Mapping[WeightRole, float]) -> Mapping[WeightRole, float]:
    """The gains with those of cross-attention, which are self-attention's unless they are named."""
    return {CROSS[role]: gains[role] for role in CROSS if role in gains} | dict(gains)


def _carried(layer: Layer, gains: Mapping[WeightRole, float]) -> Layer:
    """The layer that multiplies in its forward pass by what would be gains of its weights.

    The same function of weights drawn without gains, while biases are zero (derived).
    Queries and keys share their gain through the scores, which are bilinear in them.
    """
    whole = _with_cross(gains)
    gain = {role: whole.get(role, 1.0) for role in (*LAYER_ROLES, *CROSS.values())}
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
        # Its keys and values read another stack, which no factor of this sublayer reaches.
        cross=scaled(layer.cross, gain["cq"] * gain["ck"], gain["cv"] * gain["co"]),
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
