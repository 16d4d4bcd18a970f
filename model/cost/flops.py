"""Floating-point operations of a training step, per token.

Both what the model needs, and what the hardware does with recomputation.
Counted are the matrix products, two operations per multiply-add: attention projections,
attention scores and their product with the values, feed-forward and vocabulary projection.
Not counted are norms, softmax, activations, rotary embedding, the embedding look-up and
the optimizer, which together stay below a few percent at usual widths.
No depth scheme adds a matrix product, so the scheme does not enter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.config import ModelConfig
from model.speech import KERNEL

Recompute = Literal["none", "selective", "full"]
BACKWARD = 2
"""Products per forward product in the backward pass: the gradients of both of its factors."""


@dataclass(frozen=True)
class ForwardFlops:
    """One forward pass per token over the whole model, in operations."""

    attention_linear: float
    attention_core: float
    """Scores and weighted values; a causal mask leaves half of the full square.

    Derived: query i sees i of s keys, on average (s+1)/2; taken as s/2, the usual convention.
    Under a window of w, where it is min(i, w) + 1, what is seen is counted exactly.
    Masks of documents count as if all tokens of a sample saw each other.
    """
    mlp: float
    vocabulary: float
    """At the positions that have labels, with a head's own layer."""
    patches: float = 0.0
    """The map from pixels or frames to tokens, whose backward pass has no gradient of its input."""
    convolution: float = 0.0
    """The second one over frames, which has one."""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.attention_linear + self.attention_core + self.mlp + self.vocabulary + self.ends

    @property
    def ends(self) -> float:
        """What makes tokens of something else."""
        return self.patches + self.convolution


@dataclass(frozen=True)
class FlopCount:
    """Operations per token of forward and backward together."""

    model: float
    """Each product once, the base of MFU."""
    hardware: float
    """With what is recomputed, the base of HFU."""


def forward_flops(
    config: ModelConfig, seq_length: int, targets: float = 1.0, source_length: int | None = None
) -> ForwardFlops:
    """Operations per token of one forward pass on sequences of `seq_length` tokens.

    targets: share of the positions that have labels.
    source_length: tokens that an encoder under a decoder reads beside each sequence; what they cost
    counts as that of the decoder's tokens.

    They are derived from the shapes; the vocabulary is the padded one.
    Raises ValueError before the vocabulary is known, for a sequence without tokens, and where the
    length of a source is needed and missing.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length} must be at least 1")
    linear = core = mlp = 0.0
    for stack in config.blueprint.stacks:
        own, length = config.of(stack), seq_length
        if stack is not config.blueprint.stacks[-1]:
            if source_length is None:
                raise ValueError(f"a model of family {config.family} needs the length of its source")
            length = source_length
        part = stack_flops(own, length, source_length if stack.cross else None, causal=stack.causal)
        share = length / seq_length
        linear, core, mlp = (
            total + share * value for total, value in zip((linear, core, mlp), part, strict=True)
        )
    hidden = config.hidden_size
    transform = 2 * hidden * hidden if config.head_transform else 0
    image, speech = config.image, config.speech
    convolutions = [0.0, 0.0]
    if speech is not None and source_length is not None:
        # Two places of the first convolution for each token, and one of the second.
        for at, (places, out) in enumerate(((2, speech.channels), (1, 2 * hidden))):
            window = KERNEL * speech.widths[at]
            convolutions[at] = 2 * places * out * window * source_length / seq_length
    pixels = 0 if image is None else image.patches * image.patch_numbers / image.tokens
    return ForwardFlops(
        attention_linear=linear,
        attention_core=core,
        mlp=mlp,
        vocabulary=targets * (2 * hidden * config.padded_vocab + transform),
        patches=2 * hidden * pixels + convolutions[0],
        convolution=convolutions[1],
    )


def _seen_in_window(config: ModelConfig, seq_length: int, *, causal: bool) -> float:
    """Keys that a query sees in a layer with a window, on average; 0 without one.

    Of s queries the first w lack 1 to w of the w keys before them, w (w + 1) / 2 in all (derived).
    """
    if config.window is None:
        return 0.0
    window = min(config.window, seq_length - 1)
    side = window - window * (window + 1) / (2 * seq_length)
    return 1 + (side if causal else 2 * side)


def stack_flops(
    config: ModelConfig, length: int, source: int | None, *, causal: bool
) -> tuple[float, float, float]:
    """(attention's projections, its core, feed-forward) per token of one stack's sequence.

    config: with the sizes of the stack. source: tokens that cross-attention reads, None without.
    """
    heads, width, hidden = config.num_attention_heads, config.kv_channels, config.hidden_size
    projection = 2 * heads * width * hidden
    linear = float(2 * hidden * (heads + 2 * config.groups) * width + projection)
    layers, local = config.num_layers, config.local_layers
    seen = float(layers - local) * (length / 2 if causal else length)
    seen += local * _seen_in_window(config, length, causal=causal)
    if source is not None:
        # A query and an output for every token; a key and a value for every token of the source.
        linear += 2 * projection + 2 * projection * source / length
        seen += layers * source
    core = 2 * (2 * heads * width * seen)  # two products over the keys that a query sees
    mlp = (3 if config.gated else 2) * 2 * hidden * config.ffn_size
    return layers * linear, core, layers * mlp


def flops_per_token(
    config: ModelConfig,
    seq_length: int,
    *,
    recompute: Recompute = "none",
    targets: float = 1.0,
    source_length: int | None = None,
) -> FlopCount:
    """Operations per token of one training step, without and with recomputation.

    targets: share of the positions that have labels. source_length: as in `forward_flops`.
    A step is 3 x forward: a backward pass has two products per forward product.
    recompute, as in parallel.recompute.granularity: `selective` runs the attention cores forward
    once more, `full` all layers but not the projections before and after them.
    The second look at the scores inside fused attention kernels is theirs and not counted.
    Raises ValueError before the vocabulary is known, and for another `recompute`.
    """
    forward = forward_flops(config, seq_length, targets, source_length)
    layers = forward.total - forward.vocabulary - forward.ends
    again = {"none": 0.0, "selective": forward.attention_core, "full": layers}
    if recompute not in again:
        raise ValueError(f"recompute={recompute!r} is none of {', '.join(again)}")
    model = (1 + BACKWARD) * forward.total - forward.patches
    return FlopCount(model=model, hardware=model + again[recompute])
