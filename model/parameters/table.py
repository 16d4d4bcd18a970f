"""Every parameter of a model, from its configuration alone.

One row says what a parameter is called, how large it is, what it is for, where it stands and how
it is cut. Whoever needs a list of parameters (sizes, initial values, files of other libraries,
memory, statistics by kind of weight) reads these rows.
A new kind of layer or of input is a new row here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypedDict

from model.config import ModelConfig
from model.depth.folded import FoldedLayer, FoldedSublayer
from model.depth.placed import PlacedLayer
from model.depth.sublayer import Layer, Sublayer
from model.errors import UserError
from model.images import ImageConfig
from model.norms import NORMS
from model.parameters.blocks import Blocks
from model.parameters.shards import WHOLE, Shard
from model.speech import KERNEL, SpeechConfig

StackName = str
"""The part of a model that the stream passes through: embedding, a stack's name, head or output."""
SublayerName = Literal["attention", "cross", "mlp"]


class Role(Enum):
    """What a parameter is for."""

    WORD = "word embedding"
    POSITION = "position embedding"
    QKV = "query, key and value"
    Q = "query of cross-attention"
    KV = "key and value of cross-attention"
    ATTENTION_OUTPUT = "attention output"
    FC1 = "first matrix of the feed-forward, or its gate and up projection"
    FC2 = "second matrix of the feed-forward"
    NORM_GAIN = "norm gain"
    NORM_BIAS = "norm bias"
    LINEAR_BIAS = "bias of a linear layer"
    GATE = "gate of the stream"
    OUTPUT = "output layer"
    TOKEN_TYPE = "token type embedding"
    DENSE = "dense layer of the head"
    LOGIT_BIAS = "bias on the logits"
    PATCH = "map from patches to tokens"
    CLASS_TOKEN = "token that stands for the whole image"
    FRAMES = "convolution over frames"


HIDDEN = (Role.QKV, Role.Q, Role.KV, Role.ATTENTION_OUTPUT, Role.FC1, Role.FC2, Role.DENSE)
"""Of matrices from one hidden vector to another."""


@dataclass(frozen=True)
class Cut:
    """How tensor-parallel ranks share a parameter: equal parts along a dimension."""

    dim: int
    stride: int = 1
    """Blocks of the whole dimension of which every rank has its piece, as in `Shard`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One parameter of the whole model."""

    name: str
    """Canonical: with the 0-based number of the layer in its stack.

    Pipeline stage and kind of kernels do not appear in it.
    """
    shape: tuple[int, ...]
    """Of the whole tensor. Matrices are [out, in]."""
    role: Role
    stack: StackName
    layer: int | None = None
    """0-based, over all stacks in the order of the stream; None outside of the layers."""
    index: int | None = None
    """0-based, in its stack, as in its name; None outside of the layers."""
    sublayer: SublayerName | None = None
    """None outside of the layers."""
    cut: Cut | None = None
    """None where every tensor-parallel rank has all of it."""
    blocks: Blocks | None = None
    """Matrices in a layer's linear weight, or in its bias; None for norms, tables and outputs."""
    in_stream: bool = False
    """Of a norm that the stream itself passes on its way to the next layers.

    Such norms act one after the other, so that what they learn multiplies over the depth.
    False for the norms around the stack, and for the last layer's, which stands for the final one.
    """

    @property
    def hidden(self) -> bool:
        """A matrix between the embedding and the output projection, of a layer or of a head."""
        return self.role in HIDDEN

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Shapes [out, in] of the matrices that lie in a whole weight."""
        rows, columns = self.shape
        own = (rows,) if self.blocks is None else self.blocks.rows(rows)
        return tuple((one, columns) for one in own)

    @property
    def elements(self) -> int:
        """Numbers in the whole tensor."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """The name without layer number and last part: `mlp.linear_fc1`, `embedding.norm`."""
        module = self.name.rpartition(".")[0]
        return module if self.layer is None else module.split(".", 3)[3]

    @property
    def leaf(self) -> str:
        """The last part of the name, weight or bias."""
        return self.name.rpartition(".")[2]

    def shard(self, index: int, count: int) -> Shard:
        """What tensor-parallel rank `index` of `count` holds."""
        if self.cut is None or count == 1:
            return WHOLE
        return Shard(self.cut.dim, index, count, self.cut.stride)


def parameter_table(
    config: ModelConfig, *, positions: int | None = None, source_positions: int | None = None
) -> Iterator[Row]:
    """Every parameter of a model, a tied one once, in the order of the stream.

    positions: rows of a learned position table where `model.max_position_embeddings` is not set.
    source_positions: the same of an encoder under a decoder, `model.max_source_positions`.
    Raises UserError while the vocabulary, or the rows of a learned position table, are unknown.
    """
    stacks, hidden = config.blueprint.stacks, config.hidden_size
    plan = config.stack_plan(stacks[-1])
    if config.vocab_size is None:
        raise UserError(
            "model.vocab_size is not known: set it, or prepare the data, whose tokenizer gives it"
        )
    vocabulary = (config.padded_vocab, hidden)
    if config.image is None:
        yield Row(name=WORD_EMBEDDING, shape=vocabulary, role=Role.WORD, stack="embedding", cut=Cut(0))
    else:
        yield from _patches(config.image, hidden, config.bias)
        positions = config.image.tokens
    if config.position == "learned":
        rows = config.max_position_embeddings or positions
        if rows is None:
            raise UserError("model.max_position_embeddings is not known: set it, or take data.seq_length")
        yield _positions("embedding", rows, hidden)
    if config.token_types:
        yield Row(
            name="embedding.tokentype_embeddings.weight",
            shape=(config.token_types, hidden),
            role=Role.TOKEN_TYPE,
            stack="embedding",
        )
    if plan.embedding_norm:
        yield from _norm(config, "embedding.norm", _Where("embedding"))
    if config.blueprint.crossed:
        yield from _source(config, plan.embedding_norm, vocabulary, source_positions)
    owned = {stack.name: config.of(stack) for stack in stacks}
    parts = {stack.name: _parts(owned[stack.name], cross=stack.cross) for stack in stacks}
    for place in config.placed_layers():
        yield from _layer(owned[place.stack.name], parts[place.stack.name], place)
    if plan.final_norm:
        yield from _norm(config, stacks[-1].final_norm, _Where(stacks[-1].name))
    if config.head_transform:
        yield from _head(config)
    if not config.tie_embeddings:
        yield Row(name="output_layer.weight", shape=vocabulary, role=Role.OUTPUT, stack="output", cut=Cut(0))
    if config.logit_bias:
        yield Row(name=LOGIT_BIAS, shape=vocabulary[:1], role=Role.LOGIT_BIAS, stack="output", cut=Cut(0))


def _positions(module: str, rows: int, hidden: int) -> Row:
    name = f"{module}.position_embeddings.weight"
    return Row(name=name, shape=(rows, hidden), role=Role.POSITION, stack="embedding")


def _patches(image: ImageConfig, hidden: int, bias: bool) -> Iterator[Row]:
    """What makes tokens of an image, before their positions."""
    weight = (hidden, image.patch_numbers)
    yield Row(name=f"{PATCHES}.weight", shape=weight, role=Role.PATCH, stack="embedding")
    if bias:
        yield Row(name=f"{PATCHES}.bias", shape=(hidden,), role=Role.LINEAR_BIAS, stack="embedding")
    if image.class_token:
        yield Row(name=CLASS_TOKEN, shape=(1, hidden), role=Role.CLASS_TOKEN, stack="embedding")


def _source(
    config: ModelConfig, normed: bool, vocabulary: tuple[int, int], positions: int | None
) -> Iterator[Row]:
    """What an encoder under a decoder has before its layers, beside shared words."""
    if config.speech is not None:
        yield from _frames(config.speech, config.hidden_size, config.bias)
    elif not config.share_embeddings:
        name = f"{SOURCE_EMBEDDING}.word_embeddings.weight"
        yield Row(name=name, shape=vocabulary, role=Role.WORD, stack="embedding", cut=Cut(0))
    if config.position == "learned":
        rows = config.max_source_positions or positions
        if rows is None:
            raise UserError("model.max_source_positions is not known: set it, or take data.source_length")
        yield _positions(SOURCE_EMBEDDING, rows, vocabulary[1])
    if normed:
        yield from _norm(config, f"{SOURCE_EMBEDDING}.norm", _Where("embedding"))


def _frames(speech: SpeechConfig, hidden: int, bias: bool) -> Iterator[Row]:
    """What makes tokens of the frames of a recording, before their positions."""
    for name, rows, entering in zip(CONVOLUTIONS, (speech.channels, 2 * hidden), speech.widths, strict=True):
        shape = (rows, KERNEL * entering)
        yield Row(name=f"{name}.weight", shape=shape, role=Role.FRAMES, stack="embedding")
        if bias:
            yield Row(name=f"{name}.bias", shape=(rows,), role=Role.LINEAR_BIAS, stack="embedding")


def _head(config: ModelConfig) -> Iterator[Row]:
    width = config.hidden_size
    yield Row(name="head.dense.weight", shape=(width, width), role=Role.DENSE, stack="head")
    if config.bias:
        yield Row(name="head.dense.bias", shape=(width,), role=Role.LINEAR_BIAS, stack="head")
    yield from _norm(config, "head.norm", _Where("head"))
    shape = (config.padded_vocab,)
    yield Row(name=HEAD_BIAS, shape=shape, role=Role.LOGIT_BIAS, stack="head", cut=Cut(0))


def logit_bias_name(config: ModelConfig) -> str:
    """The canonical name of the bias on the logits."""
    return HEAD_BIAS if config.head_transform else LOGIT_BIAS


def layer_rows(config: ModelConfig, plan: Layer, index: int, *, cross: bool = False) -> list[Row]:
    """The parameters of one layer, in the order of the stream.

    plan: its norms. index: 0-based, of a model of one stack. cross: with cross-attention.
    """
    folded = FoldedLayer(FoldedSublayer(), FoldedSublayer())  # no parameter depends on it
    place = PlacedLayer(index, config.stack, index, config.num_layers, plan, folded)
    return list(_layer(config, _parts(config, cross=cross), place))


def qkv_blocks(config: ModelConfig) -> Blocks:
    """Rows of the fused projection: for every group its query heads, its key and its value."""
    shared = config.num_attention_heads // config.groups
    return Blocks((("q", shared), ("k", 1), ("v", 1)), config.groups)


WORD_EMBEDDING = "embedding.word_embeddings.weight"
PATCHES = "embedding.patches"
"""Of a model of images, instead of a table of words."""
CLASS_TOKEN = "embedding.class_token.weight"
SOURCE_EMBEDDING = "source_embedding"
"""What the names of an encoder's input tables begin with, where a decoder has tables too."""
CONVOLUTIONS = f"{SOURCE_EMBEDDING}.first", f"{SOURCE_EMBEDDING}.second"
"""Of a model of speech, in place of its encoder's table of words."""
LOGIT_BIAS = "output_layer.bias"
HEAD_BIAS = "head.bias"
"""The same bias in a head with a layer of its own."""
COLUMNS, ROWS = Cut(0), Cut(1)


class _Fields(TypedDict):
    """Of a `Row`."""

    stack: StackName
    layer: int | None
    index: int | None
    sublayer: SublayerName | None


@dataclass(frozen=True)
class _Where:
    """Where a parameter stands; as the fields of `Row`."""

    stack: StackName
    layer: int | None = None
    index: int | None = None
    sublayer: SublayerName | None = None

    @property
    def fields(self) -> _Fields:
        return {"stack": self.stack, "layer": self.layer, "index": self.index, "sublayer": self.sublayer}


@dataclass(frozen=True)
class _Linear:
    """A linear layer of a sublayer. cut: of its weight; a bias is cut where outputs are."""

    name: str
    role: Role
    shape: tuple[int, int]
    cut: Cut
    blocks: Blocks


@dataclass(frozen=True)
class _Part:
    """What a sublayer is made of, in every layer alike. entrance: name of the norm before it."""

    sublayer: SublayerName
    module: str
    entrance: str
    linears: tuple[_Linear, ...]


def _parts(config: ModelConfig, *, cross: bool = False) -> list[_Part]:
    hidden, ffn, width = config.hidden_size, config.ffn_size, config.kv_channels
    heads, groups = config.num_attention_heads, config.groups
    inner, halves = heads * width, 2 if config.gated else 1
    qkv, out, up = qkv_blocks(config), Blocks((("o", 1),)), Blocks((("fc1", 1),) * halves)
    q, kv = Blocks((("q", 1),)), Blocks((("k", 1), ("v", 1)), heads)
    attention = (
        _Linear("linear_qkv", Role.QKV, (inner + 2 * groups * width, hidden), COLUMNS, qkv),
        _Linear("linear_proj", Role.ATTENTION_OUTPUT, (hidden, inner), ROWS, out),
    )
    crossed = (
        _Linear("linear_q", Role.Q, (inner, hidden), COLUMNS, q),
        _Linear("linear_kv", Role.KV, (2 * inner, hidden), COLUMNS, kv),
        _Linear("linear_proj", Role.ATTENTION_OUTPUT, (hidden, inner), ROWS, out),
    )
    mlp = (
        _Linear("linear_fc1", Role.FC1, (halves * ffn, hidden), Cut(0, halves), up),
        _Linear("linear_fc2", Role.FC2, (hidden, ffn), ROWS, Blocks((("fc2", 1),))),
    )
    parts = [
        _Part("attention", "self_attention", "input_layernorm", attention),
        _Part("cross", "cross_attention", "pre_cross_attn_layernorm", crossed),
        _Part("mlp", "mlp", "pre_mlp_layernorm", mlp),
    ]
    return [part for part in parts if cross or part.sublayer != "cross"]


def _layer(config: ModelConfig, parts: list[_Part], place: PlacedLayer) -> Iterator[Row]:
    """config: with the sizes of the layer's stack."""
    stack, prefix, plan = place.stack.name, place.prefix, place.plan
    norms: dict[SublayerName, Sublayer] = {
        "attention": plan.attention,
        "cross": plan.cross,
        "mlp": plan.mlp,
    }
    for part in parts:
        at = norms[part.sublayer]
        where = _Where(stack, place.number, place.index, part.sublayer)
        if at.norm_in:
            passed = at.residual_from_norm
            yield from _norm(config, prefix + part.entrance, where, in_stream=passed)
        for linear in part.linears:
            yield from _linear(config, f"{prefix}{part.module}.{linear.name}", linear, where)
            for role in at.inner if linear.role is Role.QKV else ():
                name = f"{prefix}{part.module}.{role}_layernorm"
                yield from _norm(config, name, where, width=config.kv_channels)
            if at.norm_last and linear.cut is ROWS:
                name = f"{prefix}{part.module}.{linear.name}.input_norm"
                yield from _norm(config, name, where, width=linear.shape[1], cut=COLUMNS)
        if at.norm_branch:
            yield from _norm(config, f"{prefix}{part.module}_branch_norm", where)
        if at.norm_out:
            passed = not (place.last and part.sublayer == "mlp")
            name = f"{prefix}{part.module}_output_norm"
            yield from _norm(config, name, where, in_stream=passed)
    if plan.gate:
        where = _Where(stack, place.number, place.index)
        yield Row(name=f"{prefix}gpas.gate", shape=(1,), role=Role.GATE, **where.fields)


def _linear(config: ModelConfig, name: str, linear: _Linear, where: _Where) -> Iterator[Row]:
    yield Row(
        name=f"{name}.weight",
        shape=linear.shape,
        role=linear.role,
        cut=linear.cut,
        blocks=linear.blocks,
        **where.fields,
    )
    if config.bias or (config.attention.qkv_bias and linear.role is Role.QKV):
        yield Row(
            name=f"{name}.bias",
            shape=linear.shape[:1],
            role=Role.LINEAR_BIAS,
            cut=linear.cut if linear.cut.dim == 0 else None,
            blocks=linear.blocks,
            **where.fields,
        )


def _norm(
    config: ModelConfig,
    name: str,
    where: _Where,
    *,
    width: int | None = None,
    cut: Cut | None = None,
    in_stream: bool = False,
) -> Iterator[Row]:
    roles = {"weight": Role.NORM_GAIN, "bias": Role.NORM_BIAS}
    for leaf in NORMS[config.normalization].leaves:
        yield Row(
            name=f"{name}.{leaf}",
            shape=(width or config.hidden_size,),
            role=roles[leaf],
            cut=cut,
            in_stream=in_stream,
            **where.fields,
        )
