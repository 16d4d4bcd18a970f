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

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.cost.flops import Recompute
from model.cost.held import Chunk, Norms, chunk_of, norms_of
from model.depth.schemes import SCHEMES
from model.families.family import Stack
from model.loss_kernels import LOSS_KERNELS, LossKernelName, rows_at_once
from model.norms import NORMS, WIDEST_AFTER_ACTIVATION
from model.speech import FRAMES_PER_TOKEN, STRIDE, SpeechConfig

FP32 = 4
SEED = 8
"""Bytes from which joins in one pass draw their masks again."""

PRE_NORM = Norms(branch=2)
"""Those of a plain pre-norm layer."""


@dataclass(frozen=True)
class Activations:
    """What one micro-batch on one rank looks like.

    Of an encoder under a decoder: as the decoder sees it; `of` gives the encoder's side.
    """

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
    source_length: int | None = None
    """Tokens of every sequence that an encoder under the decoder reads; None without one."""
    loss_chunk: int | None = None
    """`train.loss_chunk`: positions whose logits exist at once."""
    loss_kernel: LossKernelName = "local"
    """`train.loss_kernel`: what takes the output projection and the loss together."""
    context: int = 1
    """Context-parallel size: a rank has that part of every sequence, and all keys and values."""
    documents: bool = False
    """Documents of one sequence do not see each other."""
    joined: bool = False
    """`train.kernels: local_joined`, on a GPU."""

    def of(self, stack: Stack) -> Activations:
        """The same micro-batch as the layers of one of the model's stacks see it.

        Raises ValueError where the length of a source is needed and missing.
        """
        if stack.cross and self.source_length is None:
            raise ValueError(f"a model of family {self.config.family} needs the length of its source")
        if self.source_length is None or stack.cross:
            return self
        own = self.config.of(stack)
        return replace(self, config=own, seq_length=self.source_length, source_length=None)

    @property
    def sides(self) -> tuple[Activations, ...]:
        """What the layers of every stack see, in the order of the stream."""
        return tuple(self.of(stack) for stack in self.config.blueprint.stacks)

    @property
    def message(self) -> float:
        """Bytes that a rank hands on to the next pipeline stage: the streams of all stacks."""
        return sum(side.stream for side in self.sides)

    @property
    def sublayers(self) -> int:
        """Of a layer."""
        return 2 if self.source_length is None else 3

    @property
    def labels(self) -> float:
        """Labels of a micro-batch."""
        return self.tokens * self.targets

    @property
    def logit_rows(self) -> float:
        """Rows of logits that exist at once."""
        if self.loss_chunk is not None:
            return min(self.labels, self.loss_chunk * self.samples)
        if LOSS_KERNELS[self.loss_kernel].fused:
            return rows_at_once(self.labels, self.config.hidden_size, self.config.padded_vocab)
        return self.labels

    @property
    def logits_again(self) -> bool:
        """Whether the backward pass makes the logits again."""
        return self.loss_chunk is not None or LOSS_KERNELS[self.loss_kernel].fused

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one rank."""
        return self.samples * self.seq_length // self.context

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
        # A norm in the pass of a join keeps that join's sum, not a copy for the branch. A gate
        # between them reads the same sum, and what it gives is computed again.
        fed = norms.fed if self.joined else 0
        gates = 0 if self.joined else norms.gates
        normed = (norms.branch - fed) * self._norm(self.narrow)
        normed += (norms.stream + fed) * self._norm(self.stream)
        return normed + gates * self.stream + self._head_norms(norms)

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
        ends = (norms.contexts, query, 1.0 + copies), (norms.hidden, config.ffn_size, self._hidden_copies)
        for count, size, kept in ends:
            total += count * (tokens * kept * size * self.element + kind.statistics * FP32 * self.tokens)
        return total

    @property
    def _hidden_copies(self) -> float:
        """Tensors of the hidden width that its norm keeps, beside those of `_feed_forward`.

        In one pass with the activation, what enters both is kept, for a ReLU too.
        """
        config = self.config
        if self.joined and self.tensor == 1 and config.ffn_size <= WIDEST_AFTER_ACTIVATION:
            return float(config.activation == "relu")
        return 2.0 if NORMS[config.normalization].keeps_normed and not self.fused else 1.0

    def _dropout(self, probability: float) -> float:
        """The mask: a byte per element where fused, else scaled and in the format of the stream."""
        return 0 if probability == 0 else self.narrow / self.element if self.fused else self.narrow

    def _connections(self, norms: Norms) -> float:
        """What lies around a layer's branches.

        Norms, dropout, and the inputs of their first matrices.
        """
        mask = self._dropout(self.config.hidden_dropout)
        if self.joined:
            mask = SEED * (mask > 0)
        return self._norms(norms) + self.sublayers * (mask + self.narrow)

    def _attention(self, recomputed: bool) -> float:
        config, n = self.config, self.tokens * self.element / self.tensor
        query, key = config.num_attention_heads * config.kv_channels, config.groups * config.kv_channels
        if self.context > 1 and not recomputed:
            return self._cut_attention(n * query, n * key)
        kept = n * (query + 2 * key)
        if config.position == "rotary":
            kept += n * (query + key)
        elif self._copies_queries:
            kept += n * query
        if config.attention.soft_cap is not None and not recomputed:
            if config.num_attention_heads > config.groups:
                kept = self._expanded()
            return kept + n * query + self._scores()
        return kept + n * query + (0 if recomputed else self._core(self.seq_length))

    def _cut_attention(self, query: float, key: float) -> float:
        """Bytes of attention over sequences that are cut, where nothing is computed again.

        Queries, with the projection where they are a view of it; the keys and values of all ranks;
        what attention gives of each of the two pieces, and both together.
        query, key: bytes of this rank's queries, and of its keys or values.
        """
        config = self.config
        copied = config.position == "rotary" or self._copies_queries
        kept = query + (query if copied else 0.0)
        if config.attention.qk_norm or not copied:
            kept += query + 2 * key
        if config.attention.soft_cap is None:
            return kept + 2 * self.context * key + query + self._core(self.seq_length)
        # Copies of the keys and values that each piece sees, one for a query head; not of those of
        # all ranks. A mask of rows shows all of them.
        seen = self.context if config.window is not None else (2 * self.context + 1) / 2
        share = 1.0 if config.window is not None else seen / (2 * self.context)
        return kept + 2 * seen * query + self._scores() * share

    def _core(self, keys: int) -> float:
        """Bytes that fused attention over so many keys keeps beside its inputs and its output.

        A row's logarithm of its sum, and a mask of any form: added to scores, in their format.
        """
        statistics = FP32 * self.tokens * self.config.num_attention_heads / self.tensor
        return statistics + (self.element * self.tokens * keys if self.config.blueprint.crossed else 0.0)

    def _cross_attention(self, recomputed: bool) -> float:
        """Queries and what attention gives of the decoder's tokens, keys and values of a source.

        The source itself is the same for all layers, but where they read it as a copy.
        """
        if self.source_length is None:
            return 0.0
        inner = self.config.num_attention_heads * self.config.kv_channels * self.element / self.tensor
        source = self.samples * self.source_length
        kept = 2 * inner * (self.tokens + source) + (0.0 if recomputed else self._core(self.source_length))
        return kept + (self._source_side.narrow if self.fp32_stream else 0.0)

    @property
    def _source_side(self) -> Activations:
        return self.sides[0]

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

        A ReLU's gradient needs its result only. In one pass the activated gate is computed again.
        """
        ungated = 1 if self.config.activation == "relu" else 2
        gated = 3 if self.joined else 4
        widths = gated if self.config.gated else ungated
        return widths * self.tokens * self.config.ffn_size * self.element / self.tensor

    def layer(self, norms: Norms = PRE_NORM, *, recomputed: bool = False) -> float:
        """Bytes of one layer with so many norms.

        recomputed: its attention core is computed again in the backward pass.
        """
        attention = self._attention(recomputed) + self._cross_attention(recomputed)
        return self._connections(norms) + attention + self._feed_forward()

    def chunk(self, parts: Chunk) -> float:
        """Bytes that the layers of a chunk keep between forward and backward.

        The recomputation is the one that was asked for.
        """
        if self.recompute == "full":
            return sum(self._checkpoints(parts)) + self._masks() + self._shared_mask()
        kept = self._shared_mask()
        for part in parts:
            side, again = self.of(part.stack), self.recompute == "selective"
            kept += part.count * side.layer(Norms(), recomputed=again) + side._norms(part.norms)
        kept += self._masks() if self.recompute == "selective" else 0.0
        return kept + self._beside(parts)

    def _beside(self, parts: Chunk) -> float:
        """Bytes of the stream that a chunk's layers do not change but keep, once for all of them.

        For a decoder's layers what the encoder gave; for an encoder's the decoder's embedding, the
        other half of the message that they take apart.
        """
        if self.source_length is None:
            return 0.0
        first, last = parts[0].stack, parts[-1].stack
        if not last.cross:
            return self.stream
        # Copies in another format stand for an encoder's last stream, but not for a message.
        return 0.0 if self.fp32_stream and not first.cross else self._source_side.stream

    def _checkpoints(self, parts: Chunk) -> Iterator[float]:
        """Bytes of what each group of layers of a chunk starts from.

        That is the whole message; and in the groups after the first the streams that the group
        before has changed.
        """
        yield self.message
        stacks = [part.stack for part in parts for _ in range(part.count)]
        starts = range(0, len(stacks), self.group)
        for start, after in itertools.pairwise(starts):
            changed = dict.fromkeys(stacks[start:after])
            yield sum(self.of(stack).stream for stack in changed)

    def _masks(self) -> float:
        """Bytes of masks that recomputation reads again, the same for all layers: a byte a pair."""
        if self.source_length is None:
            return 0.0
        source, target = self.source_length, self.seq_length
        return float(self.samples * (target**2 + (source + target) * source))

    def _shared_mask(self) -> float:
        """Bytes of the mask that all layers of one stack add to their scores, where there is one.

        Layers with a window have their own beside that of the others. A sum keeps none of it.
        """
        config = self.config
        if config.blueprint.crossed or (config.attention.soft_cap is not None and self.recompute == "none"):
            return 0.0
        local = config.local_layers
        masks = (local > 0) + (self.documents and local < config.num_layers)
        rows = self.samples if self.documents else 1
        return float(masks * rows * self.seq_length**2 * self.element / self.context)

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

        Of images: their patches. Under a decoder with an encoder: of both.
        """
        return sum(side._embedding() for side in self.sides)

    def _embedding(self) -> float:
        numbers: float = 8 * self.samples * (self.seq_length + 1) + (
            8 * self.seq_length if self.config.position == "learned" else 0
        )
        if self.documents and self.config.position == "learned":
            numbers += 8 * (self.tokens - self.seq_length)
        if self.config.image is not None:
            numbers = (
                self.samples * self.config.image.patches * self.config.image.patch_numbers * self.element
            )
        if self.context > 1:  # inputs and labels are apart; labels are turned, or counted here
            numbers = 8 * self.tokens * (2 if self.samples == 1 else 1)
            numbers += 8 * self.seq_length / self.context if self.config.position == "learned" else 0
        if self.config.blueprint.crossed:  # inputs and labels apart, and a position for every token
            numbers = 8 * self.tokens * (1 + (self.config.position == "learned"))
        if self.config.token_types:
            numbers += 8 * self.tokens
        if self.config.speech is not None and self.source_length is None:
            numbers += self._convolutions(self.config.speech)
        normed = self._norms(Norms(stream=int(self.config.norms_embedding)))
        return numbers + normed + self._dropout(self.config.hidden_dropout)

    def _convolutions(self, speech: SpeechConfig) -> float:
        """Bytes kept by the convolutions over frames, which every tensor-parallel rank has whole.

        Of each what it reads, what enters its gate, and which places belong to a clip.
        """
        place, kept = FRAMES_PER_TOKEN, 0.0
        for entering, leaving in zip(
            speech.widths, (speech.channels, 2 * self.config.hidden_size), strict=True
        ):
            kept += self.tokens * place * (entering * self.element + 1)
            place //= STRIDE
            kept += self.tokens * place * leaving * self.element
        return kept

    def head(self) -> float:
        """Bytes kept by the final norm, a head's own layer, the output projection and the loss.

        The loss keeps labels and, where its logits are not made again, `logits_kept`.
        """
        scheme, config = SCHEMES[self.config.scheme], self.config
        kept = self._norms(Norms(stream=int(scheme.final_norm)))
        fused = LOSS_KERNELS[self.loss_kernel].fused
        if fused or self.loss_chunk is None:
            # Labels are turned to [s, b], which is a copy unless b is 1.
            kept += self.logits_kept() + (8 * self.labels if self.samples > 1 else 0)
        elif self.sequence_parallel:  # a chunk is rows of all ranks
            kept += 8 * self.labels
        if config.image is not None:
            # A class token's row is a view, which keeps all rows; a mean is not.
            mean = self.labels * config.hidden_size * self.element
            return kept + (self.narrow if config.image.class_token else mean)
        if not config.blueprint.head.targets:
            return kept + self.narrow
        # Of the positions with labels, whole on every rank: the positions, and what is read there.
        picked = self.labels * config.hidden_size * self.element
        if not config.head_transform:
            return kept + picked + 8 * self.labels
        # The dense layer's input and output, the activation, the norm's result.
        return kept + 4 * picked + 2 * FP32 * self.labels + 8 * self.labels

    def logits_kept(self) -> float:
        """Bytes that the loss keeps of the logits that exist at once.

        Their log-probabilities in fp32, and what a soft cap makes of them; fused kernels nothing.
        """
        if LOSS_KERNELS[self.loss_kernel].fused:
            return 0.0
        config, padded = self.config, self.config.padded_vocab / self.tensor
        vocab = padded if self.tensor > 1 else config.vocab_size or padded
        capped = 0 if config.logit_soft_cap is None else self.element * padded
        return self.logit_rows * (FP32 * vocab + capped)

    def whole(self) -> float:
        """Bytes of a whole model on one pipeline stage."""
        places = self.config.placed_layers()
        norms = [norms_of(place.plan, cross=place.stack.cross) for place in places]
        return self.embedding() + self.chunk(chunk_of(places, norms)) + self.head()
