"""A probe of an encoder and a decoder, stack by stack, and what is expected of an encoder."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from pretrain.probe.records import LayerProbe, Probe


def parts(probe: Probe) -> list[tuple[str, Probe]]:
    """(Name, its layers as a probe of their own) of each stack.

    A model of one stack has one part without a name.
    """
    if not probe.model.blueprint.crossed:
        return [("", probe)]
    found = []
    for stack in probe.model.blueprint.stacks:
        own = tuple(layer for layer in probe.layers if layer.stack == stack.name)
        least = probe.smallest_by_stack[stack.name]
        part = replace(probe, layers=own, num_layers=len(own), smallest_gradient_log10=least)
        if is_source(part):
            part = replace(part, start_variance=0.0)
        found.append((stack.name, part))
    return found


def is_source(part: Probe) -> bool:
    """Whether a part of a probe is of a stack that another one reads."""
    return part.layers[0].stack != part.model.blueprint.stacks[-1].name


def layer_name(probe: Probe, layer: LayerProbe) -> str:
    """A layer's number, with the name of its stack where there are two."""
    return f"{layer.stack} {layer.layer}" if probe.model.blueprint.crossed else str(layer.layer)


def depth_words(probe: Probe) -> str:
    """How many layers: 18 + 18."""
    return " + ".join(str(part.num_layers) for _, part in parts(probe))


def share_of_reader(part: Probe) -> float:
    """Median weight gradient of an encoder's layers over that of the decoder's last layer."""
    norms = [layer.weight_grad_norm for layer in part.layers]
    return median(norms) / part.reader_weight_grad if part.reader_weight_grad else float("nan")


def expectation(probe: Probe) -> str | None:
    """What gradient theory expects in an encoder, and what there is; None without one."""
    if probe.gradient_limits is None:
        return None
    (name, part), *_ = parts(probe)
    low, high = probe.gradient_limits
    return (
        f"{name}: a gradient variance of {low:.2g} to {high:.2g} times the last layer's is expected at "
        f"layer 1 (measured: {part.layers[0].grad_variance:.2g}). Cross-attention sends nearly the same "
        "gradient to all tokens, and self-attention hands such a gradient down whole, instead of "
        f"averaging it away: growth up to {high:.2g} is no defect. Its weight gradients are "
        f"{share_of_reader(part):.2g} of the decoder's last layer's"
    )
