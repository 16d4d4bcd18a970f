"""Bytes that the forward pass keeps for the backward pass, from the shapes alone.

That is what PyTorch's autograd saves in layers of local kernels.
Counted are distinct storages (a view costs nothing beyond its base) without parameters.
`tests/model/cost/test_activations.py` holds the sum against what
`torch.autograd.graph.saved_tensors_hooks` sees on the real model.
Every count is derived from the backward formulas of the operators.
Attention is fused: scores are never stored, but those with a cap.
With attention dropout on a CPU they are, and this count is too small.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from model.config import ModelConfig
from model.cost.flops import Recompute
from model.depth.schemes import SCHEMES
from model.depth.sublayer import Layer
from model.norms import NORMS

FP32 = 4


@dataclass(frozen=True)
class Norms:
    """Numbers of norms by what they make."""

    branch: int = 0
    """Those that make the input of a branch only, or a branch."""
    stream: int = 0
    """Those that make the stream too."""
    gates: int = 0
    """Sums that a learned gate of the stream reads and keeps, as if they were norms."""

    queries: int = 0
    """Those of every head's queries."""
    keys: int = 0
    """Those of every head's keys, or values, before rotation."""
    values: int = 0
    contexts: int = 0
    """Those of what attention gives, before its output projection."""
    hidden: int = 0
    """Those of a feed-forward's hidden layer, before its second matrix."""

    def __add__(self, other: Norms) -> Norms:
        return Norms(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> int:
        """All of them."""
        return self.branch + self.stream


PRE_NORM = Norms(branch=2)
"""Those of a plain pre-norm layer."""


@dataclass(frozen=True)
class Activations:
    """What one micro-batch on one rank looks like."""

    config: ModelConfig
    samples: int
    """Sequences of a micro-batch, `seq_length` tokens each."""
    seq_length: int
    element: int = FP32
    """Bytes of an activation, 2 or 4."""
    tensor: int = 1
    """Tensor-parallel size."""
    sequence_parallel: bool = False
    """Norms and stream are cut along the sequence over the tensor-parallel ranks."""
    recompute: Recompute = "none"
    """As parallel.recompute.granularity."""
    group: int = 1
    """Layers of a group of full recomputation."""
    fused: bool = False
    """A GPU's fused kernels for RMSNorm and dropout.

    A CPU keeps one more copy of what they act on.
    """
    fp32_stream: bool = False
    """`train.fp32_residual`. Branches then read copies of the stream in `element` bytes."""

    targets: float = 1.0
    """Share of the positions that have labels."""

    @property
    def labels(self) -> float:
        """Labels of a micro-batch."""
        return self.tokens * self.targets

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.samples * self.seq_length

    @property
    def rows(self) -> float:
        """Tokens whose stream and norms this rank holds."""
        return self.tokens / (self.tensor if self.sequence_parallel else 1)

    @property
    def narrow(self) -> float:
        """Bytes of an activation of the stream's shape [s, b, h] on one rank.

        The format is that of the branches.
        """
        return self.rows * self.config.hidden_size * self.element

    @property
    def stream(self) -> float:
        """Bytes of the residual stream [s, b, h] on one rank."""
        return self.narrow * (FP32 / self.element if self.fp32_stream else 1)

    def _norm(self, kept: float) -> float:
        """A norm keeps its input and fp32 statistics.

        An RMSNorm that is not fused also keeps its normalized input.
        """
        kind = NORMS[self.config.normalization]
        copies = 2 if kind.keeps_normed and not self.fused else 1
        return kept * copies + kind.statistics * FP32 * self.rows

    def _norms(self, norms: Norms) -> float:
        normed = norms.branch * self._norm(self.narrow) + norms.stream * self._norm(self.stream)
        return normed + norms.gates * self.stream + self._head_norms(norms)

    def _head_norms(self, norms: Norms) -> float:
        """What norms inside attention keep beside their inputs, which lie in the projection.

        That is their outputs, but those that are rotated are replaced by what is made of them.
        """
        config, kind, tokens = self.config, NORMS[self.config.normalization], self.tokens / self.tensor
        copies = 1 if kind.keeps_normed and not self.fused else 0
        rotated = config.position == "rotary"
        total = 0.0
        for count, heads, turned in (
            (norms.queries, config.num_attention_heads, rotated),
            (norms.keys, config.groups, rotated),
            (norms.values, config.groups, False),
        ):
            width = heads * config.kv_channels * self.element
            total += count * tokens * ((copies + (not turned)) * width + kind.statistics * FP32 * heads)
        if rotated and self._copies_queries:
            total += norms.queries * tokens * config.num_attention_heads * config.kv_channels * self.element
        query = config.num_attention_heads * config.kv_channels
        for count, size in ((norms.contexts, query), (norms.hidden, config.ffn_size)):
            total += count * (tokens * (1 + copies) * size * self.element)
            total += count * kind.statistics * FP32 * self.tokens
        return total

    def _dropout(self, probability: float) -> float:
        """The mask: a byte per element where fused, else scaled and in the format of the stream."""
        return 0 if probability == 0 else self.narrow / self.element if self.fused else self.narrow

    def _connections(self, norms: Norms) -> float:
        """What lies around a layer's branches.

        Norms, dropout, and the inputs of their first matrices.
        """
        return self._norms(norms) + 2 * (self._dropout(self.config.hidden_dropout) + self.narrow)

    def _attention(self, recomputed: bool) -> float:
        config, n = self.config, self.tokens * self.element / self.tensor
        query, key = config.num_attention_heads * config.kv_channels, config.groups * config.kv_channels
        kept = n * (query + 2 * key)
        if config.position == "rotary":
            kept += n * (query + key)
        elif self._copies_queries:
            kept += n * query
        if config.attention.soft_cap is not None and not recomputed:
            if config.num_attention_heads > config.groups:
                kept = self._expanded()
            return kept + n * query + self._scores()
        statistics = FP32 * self.tokens * config.num_attention_heads / self.tensor
        return kept + n * query + (0 if recomputed else statistics)

    @property
    def _copies_queries(self) -> bool:
        """Queries of several groups do not lie side by side: they are copied together."""
        return self.config.num_attention_heads > self.config.groups > self.tensor

    def _scores(self) -> float:
        """Capped scores and probabilities of attention with a cap, which is not fused."""
        heads = self.config.num_attention_heads / self.tensor
        rounded = self.element if self.element < FP32 else 0
        return self.tokens * self.seq_length * heads * (2 * FP32 + rounded)

    def _expanded(self) -> float:
        """Queries, keys and values where each query head gets keys and values of its own.

        All three are copies then. The projection itself is kept only where norms read it.
        """
        config, n = self.config, self.tokens * self.element / self.tensor
        query, key = config.num_attention_heads * config.kv_channels, config.groups * config.kv_channels
        return 3 * n * query + (n * (query + 2 * key) if config.attention.qk_norm else 0.0)

    def _feed_forward(self) -> float:
        """Before the activation, after it, and for a gate also the activated gate.

        A ReLU's gradient needs its result only.
        """
        widths = {"gelu": 2, "gelu_tanh": 2, "silu": 2, "relu": 1, "relu2": 2, "swiglu": 4, "geglu": 4}[
            self.config.activation
        ]
        return widths * self.tokens * self.config.ffn_size * self.element / self.tensor

    def layer(self, norms: Norms = PRE_NORM, *, recomputed: bool = False) -> float:
        """Bytes of one layer with so many norms.

        recomputed: its attention core is computed again in the backward pass.
        """
        return self._connections(norms) + self._attention(recomputed) + self._feed_forward()

    def layers(self, count: int, norms: Norms) -> float:
        """Bytes that `count` layers with `norms` norms in all keep between forward and backward.

        The recomputation is the one that was asked for.
        """
        if self.recompute == "full":
            return -(-count // self.group) * self.stream
        return count * self.layer(Norms(), recomputed=self.recompute == "selective") + self._norms(norms)

    def working(self, norms: Norms) -> float:
        """Bytes that recomputation brings back for a while.

        A group of layers with so many norms each, or one attention core.
        """
        if self.recompute == "full":
            return self.group * self.layer(norms)
        return (
            self.layer(norms) - self.layer(norms, recomputed=True) if self.recompute == "selective" else 0.0
        )

    def embedding(self) -> float:
        """Bytes kept by the embedding: token and position numbers, its norm and dropout.

        Of images: their patches.
        """
        numbers: float = 8 * self.samples * (self.seq_length + 1) + (
            8 * self.seq_length if self.config.position == "learned" else 0
        )
        if self.config.image is not None:
            numbers = (
                self.samples * self.config.image.patches * self.config.image.patch_numbers * self.element
            )
        if self.config.token_types:
            numbers += 8 * self.tokens
        return (
            numbers
            + self._norms(Norms(stream=int(self.config.depth_plan().embedding_norm)))
            + self._dropout(self.config.hidden_dropout)
        )

    def head(self) -> float:
        """Bytes kept by the final norm, a head's own layer, the output projection and the loss.

        The loss keeps fp32 log-probabilities and labels.
        """
        scheme, config = SCHEMES[self.config.scheme], self.config
        vocab: float = config.vocab_size or config.padded_vocab
        if self.tensor > 1:
            vocab = config.padded_vocab / self.tensor
        labels = 8 * self.labels if self.samples > 1 else 0  # turned to [s, b], which is a copy unless b is 1
        kept = self._norms(Norms(stream=int(scheme.final_norm))) + FP32 * self.labels * vocab + labels
        if config.image is not None:
            # A class token's row is a view, which keeps all rows; a mean is not.
            mean = self.labels * config.hidden_size * self.element
            return kept + (self.narrow if config.image.class_token else mean)
        if config.logit_soft_cap is not None:
            kept += self.element * self.labels * (config.padded_vocab / self.tensor)
        if not config.blueprint.head.targets:
            return kept + self.narrow
        # Of the positions with labels, whole on every rank: the positions, and what is read there.
        picked = self.labels * config.hidden_size * self.element
        if not config.head_transform:
            return kept + picked + 8 * self.labels
        # The dense layer's input and output, the activation, the norm's result.
        return kept + 4 * picked + 2 * FP32 * self.labels + 8 * self.labels

    def whole(self) -> float:
        """Bytes of a whole model on one pipeline stage."""
        layers = self.config.depth_plan().layers
        return self.embedding() + self.layers(len(layers), sum(map(norms_of, layers), Norms())) + self.head()


def norms_of(plan: Layer) -> Norms:
    """Norms of one layer without cross-attention."""
    parts = (plan.attention, plan.mlp)
    stream = sum(part.norm_out + part.residual_from_norm for part in parts)
    norms = sum(part.norm_in + part.norm_branch + part.norm_out for part in parts)
    inner = (int(role in plan.attention.inner) for role in ("q", "k", "v"))
    last = (int(part.norm_last) for part in parts)
    return Norms(norms - stream, stream, len(parts) if plan.gate else 0, *inner, *last)
