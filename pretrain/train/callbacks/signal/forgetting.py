"""Whether a stack with norms in the stream forgets its tokens, by `model/theory/forgetting.py`.

From what was measured of every layer to the gradient that identity paths imply, and the one line
that says which layers hold one vector for all tokens, and what to set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer, Sublayer
from model.parameters.table import Role, Row
from model.theory.forgetting import LayerPassage, Passage, log_gradients
from parallel.optimizers import OPTIMIZERS
from pretrain.config.schema import RunConfig

COMMON_SHARE = 0.95
"""Above this the stream counts as one vector for all tokens.

Stacks of 48 layers that collapse have 0.97 to 1 in most layers before a tenth of their steps is
over. So have some pre-norm stacks for a while, which pass on everything and recover.
"""
MANY = 1 / 3
"""Part of the layers from which on it is no matter of the last ones."""
LEAST_PASSED = 1e-2
"""Of the gradient, from the last layer to the first.

Of fifty trainings of 48 layers over 200 steps, all that passed on less at step 100 ended within
0.15 nats of the token frequencies.
"""
BASE_WIDTH = 32
"""At which the rates of the recipes were found.

Post-norm stacks of width 128 forget at them without `model.transfer`.
"""
_NORMS = {
    "input_layernorm": "attention_gain_in",
    "self_attention_output_norm": "attention_gain_out",
    "pre_cross_attn_layernorm": "cross_gain_in",
    "cross_attention_output_norm": "cross_gain_out",
    "pre_mlp_layernorm": "mlp_gain_in",
    "mlp_output_norm": "mlp_gain_out",
}
GAINS = tuple(_NORMS.values())
"""Mean squares of the gains of the norms that the stream may pass."""


def gain_of(row: Row) -> str | None:
    """Which of `GAINS` a parameter is; None for all others."""
    if not row.in_stream or row.layer is None or row.role is not Role.NORM_GAIN:
        return None
    return _NORMS.get(row.name.split(".")[-2])


def layer_passage(layer: Layer, sums: Mapping[str, float], last: bool, cross: bool = False) -> LayerPassage:
    """How the stream passed a layer.

    layer: its plan, in any units.
    sums: mean squares as in `hooks.MEANS` and `GAINS`.
    last: the layer is the stack's last, whose Norm_out divides for all layers alike.
    cross: it has cross-attention.
    """
    return LayerPassage(
        _passage(layer.attention, "attention", sums, last=False),
        _passage(layer.mlp, "mlp", sums, last=last),
        _passage(layer.cross, "cross", sums, last=False) if cross else None,
    )


def _passage(plan: Sublayer, part: str, sums: Mapping[str, float], last: bool) -> Passage:
    def ratio(above: str, below: str) -> float:
        square = sums[f"{part}_{below}"]
        return math.sqrt(sums[f"{part}_{above}"] / square) if square > 0 else math.nan

    return Passage(
        growth=ratio("sum", "residual"),
        gain_in=ratio("gain_in", "entered") if plan.residual_from_norm else 1.0,
        gain_out=ratio("gain_out", "left") if plan.norm_out and not last else 1.0,
    )


def implied(model: ModelConfig, rows: Sequence[Mapping[str, float]]) -> list[float]:
    """ln of the gradient entering each layer over that leaving its stack's last, by identity paths.

    rows: mean squares of each layer, first to last, stack after stack.
    """
    found: list[float] = []
    for stack in model.blueprint.stacks:
        plan = model.stack_plan(stack).layers
        own = rows[len(found) : len(found) + len(plan)]
        passages = [
            layer_passage(layer, sums, index == len(plan) - 1, stack.cross)
            for index, (layer, sums) in enumerate(zip(plan, own, strict=True))
        ]
        found += log_gradients(plan, passages)
    return found


def forgetful_layers(shares: Sequence[float], forgetting: float) -> list[int]:
    """Numbers of the layers whose stream is one vector, where the stack forgets its tokens.

    Empty where it does not.
    shares: common share after each layer; forgetting: of the whole stack.
    """
    found = [number for number, share in enumerate(shares, 1) if share > COMMON_SHARE]
    many = len(found) > MANY * len(shares)
    return found if many and forgetting < math.log(LEAST_PASSED) else []


def diagnosis(layers: Sequence[int], shares: Sequence[float], forgetting: float) -> str:
    """What is wrong, naming the layers."""
    held = [shares[number - 1] for number in layers]
    return (
        f"the stack forgets its tokens: in layers {spans(layers)} of {len(shares)} the stream is nearly "
        f"one vector for all tokens (common share {min(held):.3f} to {max(held):.3f}, limit {COMMON_SHARE}), "
        f"and norms pass on 1e{forgetting / math.log(10):.1f} of what differs between them "
        f"(limit {LEAST_PASSED:.0e})"
    )


def remedies(config: RunConfig) -> list[str]:
    """Settings that help and that a configuration does not have yet, most important first."""
    model, factors = config.model, config.optimizer.factors
    options = {**SCHEMES[model.scheme].options, **model.scheme_options}
    found = []
    if options.get("branch") == 0:
        # Attention counts half where a skip goes round its norm.
        share = 2 if any(place.plan.mlp.skip_scale for place in model.placed_layers()) else 1
        found.append(f"model.scheme_options.branch: {share}")
    if "k" in options and options["alpha"] < 2:
        found.append("model.scheme_options: {alpha: 2, k: 1}")
    if factors.stream_norm.rate == 1:
        found.append("optimizer.factors.stream_norm.rate: 1/layers")
    base = model.transfer.base_hidden
    carry = (
        model.transfer.method == "none"
        and model.hidden_size > BASE_WIDTH
        and OPTIMIZERS[config.optimizer.kind].transfers
    )
    if carry:
        base = BASE_WIDTH
        found.append(f"model.transfer: {{method: completep, base_hidden: {base}}}")
    if factors.embedding.rate == 1:
        # With transfer in width the rate of tables stays what it is at the base.
        rate = "sqrt(hidden)" if base is None else f"{math.sqrt(base):.3g}"
        found.append(f"optimizer.factors.embedding.rate: {rate}")
    if not model.init.unigram:
        found.append("model.init.unigram: true")
    return [*found, f"optimizer.lr below {config.optimizer.lr:g}"]


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers as ranges: 1-3, 7, 9-12."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


class ForgettingWatch:
    """Warns once when a stack begins to forget, and again if it does so after a recovery."""

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def check(self, config: RunConfig, rows: Sequence[Mapping[str, float]]) -> str | None:
        """The warning of one full measurement, or None. rows: as in a `signal` event."""
        if any(key not in row for row in rows for key in ("common_share", "forgetting")):
            return None
        found, start = [], 0
        for stack in config.model.blueprint.stacks:
            own = rows[start : start + config.model.of(stack).num_layers]
            start += len(own)
            shares, forgetting = [row["common_share"] for row in own], own[0]["forgetting"]
            layers = forgetful_layers(shares, forgetting)
            if layers and stack.name not in self.warned:
                name = f"{stack.name}: " if config.model.blueprint.crossed else ""
                found.append(name + diagnosis(layers, shares, forgetting))
            (self.warned.add if layers else self.warned.discard)(stack.name)
        if not found:
            return None
        return (
            f"{'; '.join(found)}: left so, the loss will stay at the token frequencies. "
            f"Start again with {'; '.join(remedies(config))}"
        )
