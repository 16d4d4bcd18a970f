"""What one has to know to read a probe: what was changed for it, and what theory leaves out."""

from __future__ import annotations

from pretrain.probe.records import Probe
from pretrain.probe.stacks import expectation


def remarks(probe: Probe) -> list[str]:
    """A line for each of them that concerns this probe."""
    theory = probe.checkpoint is None
    found = [expectation(probe)]
    if theory and probe.documents > 1:
        found.append(
            f"a sequence holds {probe.documents:.3g} texts on average, which do not see each other: "
            "theory takes all of them as long as their mean"
        )
    if theory and probe.model.window is not None:
        found.append(
            f"with model.window={probe.model.window} tokens see those near them in some layers: "
            "theory takes every layer as seeing the whole sequence"
        )
    if probe.start_variance:
        found.append(
            f"{probe.start_variance:.2f} of the variance after the last layer is the bias that starts the "
            "logits at the token frequencies (model.init.unigram): theory has it, the rules leave it out"
        )
    image = probe.model.image
    if theory and image is not None and not image.zero_head:
        found.append(
            "the output projection has logits of variance 1 here; training starts it at zero with "
            "model.image.zero_head=true, so that the layers get no gradient in its first step"
        )
    return [line for line in found if line is not None]
