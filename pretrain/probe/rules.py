"""Whether a measured model is trainable at initialisation, in words.

The rules are data, each with its threshold and the reason for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pretrain.probe.records import Probe
from pretrain.probe.stacks import is_source, parts, share_of_reader
from pretrain.train.callbacks.signal.forgetting import (
    BASE_WIDTH,
    COMMON_SHARE,
    LEAST_PASSED,
    forgetful_layers,
    spans,
)

Level = Literal["fails", "risk", "note"]
ORDER: tuple[Level, ...] = ("fails", "risk", "note")
VERDICTS = {
    "fails": "not trainable at initialisation",
    "risk": "at risk at initialisation: trains at a small rate with a long warm-up, if at all",
    "note": "trainable at initialisation",
    "": "trainable at initialisation",
}
SCATTER = 1.5
"""What narrow models may have more of than theory, whose numbers are means."""
# Smallest normal number of float32, which bfloat16 shares.
SMALLEST = 2.0**-126


@dataclass(frozen=True)
class Rule:
    """One threshold. It is broken where the number is above `above` or below `below`."""

    name: str
    level: Level
    value: Callable[[Probe], tuple[float, int]]
    """From a probe to (number, layer it is from or 0)."""
    message: str
    """Filled with value, layer, layers, ratio and merged, the layers that are one vector."""
    why: str
    """The reason for the threshold, for the documentation and the report."""
    above: float = math.inf
    below: float = -math.inf

    def broken(self, value: float) -> bool:
        """Whether a number is outside the limits; nan is inside of every rule but `finite`."""
        return value > self.above or value < self.below


@dataclass(frozen=True)
class Finding:
    """A broken rule. value: what was measured; layer: where, 0 for the whole model."""

    rule: str
    level: Level
    message: str
    why: str
    value: float
    layer: int
    stack: str = ""
    """The stack that it is about, where there are two."""


def _lowest(values: list[float]) -> tuple[float, int]:
    finite = [(value, number) for number, value in enumerate(values, 1) if not math.isnan(value)]
    return min(finite, default=(math.nan, 0))


def _highest(values: list[float]) -> tuple[float, int]:
    finite = [(value, number) for number, value in enumerate(values, 1) if not math.isnan(value)]
    value, place = max(((value, -number) for value, number in finite), default=(math.nan, 0))
    return value, -place


def not_finite(probe: Probe) -> tuple[float, int]:
    """Number of layers without finite statistics, and the first of them."""
    keys = ("forward_variance", "token_correlation", "weight_grad_norm")
    bad = [
        layer.layer for layer in probe.layers if not all(math.isfinite(getattr(layer, key)) for key in keys)
    ]
    return float(len(bad)) + (not math.isfinite(probe.loss)), bad[0] if bad else 0


def growth(probe: Probe) -> tuple[float, int]:
    """Largest forward variance over that of layer 1."""
    return _over_first(probe, _highest)


def shrinking(probe: Probe) -> tuple[float, int]:
    """Smallest forward variance over that of layer 1."""
    return _over_first(probe, _lowest)


def _over_first(probe: Probe, chosen: Callable[[list[float]], tuple[float, int]]) -> tuple[float, int]:
    value, layer = chosen(probe.stream_variances())
    first = probe.layers[0].forward_variance
    return value / first if first else math.nan, layer


def _least_gradient(probe: Probe) -> tuple[float, int]:
    return _lowest(probe.values("log10_grad_variance_late"))


def _most_gradient(probe: Probe) -> tuple[float, int]:
    return _highest(probe.values("log10_grad_variance_late"))


def _unexpected_growth(probe: Probe) -> tuple[float, int]:
    """As `_most_gradient`; nan in an encoder whose gradient grows no more than theory has it."""
    value, layer = _most_gradient(probe)
    limits = probe.gradient_limits if is_source(probe) else None
    return (math.nan if limits and value <= math.log10(SCATTER * limits[1]) else value), layer


def apart(probe: Probe) -> tuple[float, int]:
    """Weight gradients of an encoder over those of the decoder's last layer; nan elsewhere."""
    return (share_of_reader(probe) if is_source(probe) else math.nan), 0


def weight_spread(probe: Probe) -> tuple[float, int]:
    """Largest weight-gradient norm of a layer over the smallest, and the layer of the smallest."""
    norms = probe.values("weight_grad_norm")
    (least, layer), (most, _) = _lowest(norms), _highest(norms)
    return (most / least if least else math.inf), layer


def forgotten(probe: Probe) -> tuple[float, int]:
    """log10 of the gradient that norms pass on, and the first layer that is one vector.

    nan for a stack that does not forget its tokens.
    """
    forgetting = probe.layers[0].forgetting
    layers = forgetful_layers(probe.values("common_share"), forgetting)
    return (forgetting / math.log(10), layers[0]) if layers else (math.nan, 0)


def excess_loss(probe: Probe) -> tuple[float, int]:
    """Loss above that of knowing nothing, ln V, in nats; nan for a stack without logits."""
    if is_source(probe):
        return math.nan, 0
    return probe.loss - math.log(probe.model.vocab_size or 1), 0


RULES: tuple[Rule, ...] = (
    Rule(
        "finite",
        "fails",
        not_finite,
        "{value:.0f} of the measurements are not finite, the first in layer {layer}",
        "a value that is not finite at step 1 never recovers",
        above=0.5,
    ),
    Rule(
        "gradient_underflows",
        "fails",
        lambda probe: (probe.smallest_gradient_log10, _least_gradient(probe)[1]),
        (
            "the gradient of late tokens falls to 1e{value:.0f} at layer {layer}, which float32 "
            "and bfloat16 flush to zero: those layers learn from the first tokens of a sequence only"
        ),
        (
            f"below {SMALLEST:.1e}, the smallest normal number "
            "of float32 and bfloat16, nothing is left to scale up"
        ),
        below=math.log10(SMALLEST),
    ),
    Rule(
        "gradient_vanishes",
        "fails",
        _least_gradient,
        "the gradient variance of late tokens vanishes: 1e{value:.1f} of the last layer's at layer {layer}",
        (
            "below 1e-3 (3 % in amplitude) the lower layers follow a few early tokens "
            "instead of the text, and the stack settles at the token frequencies"
        ),
        below=-3.0,
    ),
    Rule(
        "gradient_fades",
        "risk",
        _least_gradient,
        "the gradient variance of late tokens fades to {ratio:.2g} of the last layer's at layer {layer}",
        "between 1e-3 and 0.1 the outcome depends on rate and warm-up",
        below=-1.0,
    ),
    Rule(
        "gradient_explodes",
        "fails",
        _most_gradient,
        "the gradient variance of late tokens grows to 1e{value:.1f} of the last layer's at layer {layer}",
        (
            "above 1e4 (100 in amplitude) the gradient norm is that "
            "of the lowest layers and clipping silences the others"
        ),
        above=4.0,
    ),
    Rule(
        "gradient_grows",
        "note",
        _unexpected_growth,
        "the gradient variance of late tokens grows to {ratio:.3g} of the last layer's at layer {layer}",
        "up to some hundred this is how pre-LN behaves, which trains: Adam evens it out",
        above=math.log10(4.0),
    ),
    Rule(
        "stream_explodes",
        "fails",
        growth,
        "the forward variance grows {value:.2g} times, up to layer {layer}",
        "1e8 is 1e4 in size: upper layers add less than bfloat16 can resolve",
        above=1e8,
    ),
    Rule(
        "stream_grows",
        "note",
        growth,
        "the forward variance grows {value:.3g} times over {layers} layers, up to layer {layer}: "
        "each layer changes the stream by a smaller share than the one below it",
        "linear growth trains (pre-LN), but upper layers contribute less and less",
        above=4.0,
    ),
    Rule(
        "stream_overshoots",
        "note",
        growth,
        "the forward variance rises {value:.2f} times, up to layer {layer}",
        (
            "a scheme that is meant to hold the variance at 1 and does not "
            "was planned for other tokens, another mask or another dropout"
        ),
        above=1.5,
    ),
    Rule(
        "stream_vanishes",
        "risk",
        shrinking,
        "the forward variance falls to {value:.2g} of layer 1's at layer {layer}",
        "below 1e-2 the norms' epsilon and the branches' noise take over",
        below=1e-2,
    ),
    Rule(
        "tokens_merge",
        "risk",
        lambda probe: _highest(probe.values("token_correlation")),
        "the tokens of a sequence become nearly one vector: correlation {value:.4f} at layer {layer}",
        (
            "above 0.99 the output hardly depends on the input, "
            "and the loss starts as if only token frequencies could be learned"
        ),
        above=0.99,
    ),
    Rule(
        "stack_forgets",
        "fails",
        forgotten,
        (
            "the stack forgets its tokens: in layers {merged} the stream is nearly one vector for "
            "all of them, and norms pass on 1e{value:.1f} of what differs between them"
        ),
        (
            f"a common share above {COMMON_SHARE} in more than a third of the layers, with less than "
            f"{LEAST_PASSED:g} of the gradient passed on, ends at the token frequencies: "
            "set model.scheme_options.branch, optimizer.factors.stream_norm.rate: 1/layers, "
            "optimizer.factors.embedding.rate: sqrt(hidden), model.init.unigram: true, "
            f"at widths above {BASE_WIDTH} model.transfer "
            f"({{method: completep, base_hidden: {BASE_WIDTH}}}), or a lower optimizer.lr"
        ),
        below=math.log10(LEAST_PASSED),
    ),
    Rule(
        "weight_gradients_differ",
        "note",
        weight_spread,
        "weight-gradient norms differ {value:.3g} times between layers; the smallest is at layer {layer}",
        "Adam evens such differences out; with plain gradient descent they are the layers' rates",
        above=30.0,
    ),
    Rule(
        "encoder_starts_apart",
        "note",
        apart,
        "the weight gradients of its layers are {value:.2g} of those of the decoder's last layer",
        (
            "below 0.1 cross-attention lets little through to the encoder at first: Adam evens that out; "
            "clipping by the global norm, Muon and plain gradient descent do not"
        ),
        below=0.1,
    ),
    Rule(
        "loss_starts_high",
        "note",
        excess_loss,
        "the first loss is {value:.2f} nats above that of knowing nothing",
        (
            "unit-variance logits cost half a nat; "
            "more than 2 nats are confident guesses that the first steps undo: with tied embeddings "
            "and small branches the stream still is the embedding, and predicts its own token"
        ),
        above=2.0,
    ),
)
# Of two rules about one quantity only the first that is broken speaks.
FAMILIES = (
    ("gradient_underflows", "gradient_vanishes", "gradient_fades"),
    ("gradient_explodes", "gradient_grows"),
    ("stream_explodes", "stream_grows", "stream_overshoots"),
)


def findings(probe: Probe) -> list[Finding]:
    """Every broken rule of every stack, worst first."""
    found = [finding for name, part in parts(probe) for finding in _findings_of(name, part)]
    return sorted(found, key=lambda finding: ORDER.index(finding.level))


def _findings_of(stack: str, probe: Probe) -> list[Finding]:
    found: list[Finding] = []
    for rule in RULES:
        family = next((names for names in FAMILIES if rule.name in names), (rule.name,))
        if any(finding.rule in family for finding in found):
            continue
        value, layer = rule.value(probe)
        if rule.broken(value):
            ratio = 10.0**value if rule.name.startswith("gradient") and abs(value) < 300 else math.nan
            message = rule.message.format(
                value=value, layer=layer, layers=probe.num_layers, ratio=ratio, merged=_merged(probe)
            )
            message = f"{stack}: {message}" if stack else message
            found.append(Finding(rule.name, rule.level, message, rule.why, value, layer, stack))
    return found


def _merged(probe: Probe) -> str:
    """Layers whose stream is one vector for all tokens, as ranges."""
    shares = enumerate(probe.values("common_share"), 1)
    return spans([number for number, share in shares if share > COMMON_SHARE])


def verdict(probe: Probe) -> str:
    """One line: trainable at initialisation or not, and the worst reasons.

    For a checkpoint it tells what its signal looks like.
    """
    found = findings(probe)
    worst = found[0].level if found else ""
    words = (
        VERDICTS[worst]
        if probe.checkpoint is None
        else {"fails": "broken", "risk": "unhealthy"}.get(worst, "healthy")
    )
    if not found:
        return f"{words}: {level_words(probe)}"
    reasons = "; ".join(finding.message for finding in found if finding.level == worst)
    return f"{words}, although {reasons}" if worst == "note" else f"{words}: {reasons}"


def level_words(probe: Probe) -> str:
    """What a sound model looks like, in numbers."""
    return "; ".join((f"{name}: " if name else "") + _level_words(part) for name, part in parts(probe))


def _level_words(probe: Probe) -> str:
    forward, late = probe.stream_variances(), probe.layers[0].grad_variance_late
    return (
        f"forward variance {min(forward):.2f} to {max(forward):.2f}, "
        f"late-token gradient variance {late:.2f} at layer 1 relative to layer {probe.num_layers}"
    )


def trainable(probe: Probe) -> Literal["yes", "at risk", "no"]:
    """The verdict as one word, for programs."""
    found = findings(probe)
    return "yes" if not found or found[0].level == "note" else "at risk" if found[0].level == "risk" else "no"
