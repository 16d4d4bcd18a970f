"""Configuration of a Fathom model: a decoder, an encoder, or both, whose depth scheme is data.

This file travels with the weights and needs transformers only.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from transformers import PretrainedConfig

# One sublayer (attention, cross-attention or feed-forward) with input x, F its linear layers,
# x_layer the input of its layer:
#   u  = input_scale * norm_in(x)
#   b  = norm_branch(F(u))
#   R  = residual_scale * (norm_in(x) if residual_from_norm else x)
#   x' = norm_out(R + branch_scale * b + skip_scale * x_layer)
# Inside attention each head's queries, keys and values are normed where norm_q, norm_k, norm_v say.
# With norm_last what enters the last matrix of F is normed.
# Norms that are off are the identity. The depth plan lists only what differs from these values.
SUBLAYER: dict[str, bool | float] = {
    "norm_in": False,
    "norm_branch": False,
    "norm_out": False,
    "residual_from_norm": False,
    "input_scale": 1.0,
    "branch_scale": 1.0,
    "residual_scale": 1.0,
    "skip_scale": 0.0,
    "norm_q": False,
    "norm_k": False,
    "norm_v": False,
    "norm_last": False,
}
POOLINGS = ("cls", "mean")


def _known(pooling: str) -> str:
    if pooling not in POOLINGS:
        raise ValueError(f"classifier_pooling={pooling!r} is not known; choose one of {', '.join(POOLINGS)}")
    return pooling


class FathomConfig(PretrainedConfig):
    """A decoder or an encoder, layer by layer, or a decoder that reads an encoder.

    depth_plan: runs of equal layers from the bottom up, each
        {"layers": count, "attention": {...}, "mlp": {...}} with the keys of SUBLAYER,
        "cross": {...} where they attend to an encoder, after their attention,
        and "gate": true where each sum x of these layers becomes x - silu(gate) x.
    activation: gelu, gelu_tanh, relu, relu2, silu, or gated swiglu, geglu, geglu_tanh.
    normalization: layernorm or rmsnorm.
    position: learned, sinusoidal, rotary or none; sinusoid_scale: factor on sines and cosines.
    sinusoid: {"first": number of the first position, "steps": entries from the fastest to one that
        turns 10000 times slower}; 0 and hidden_size / 2 where None.
    window: how many tokens before its own a position sees, and in an encoder after it too;
        all where None. global_every: the layer after the first global_first and every so-manieth
        one after it see all anyway.
    rotary_base_local: rotary_base of layers with a window, where they have their own.
    rotary_share: share of a head that turns, its first entries.
    rotary_frequencies: radians per position of each pair of entries, where they are not those of
        rotary_base, and rotary_factor: on cosines and sines; neither of layers with their own base.
    qkv_bias: whether queries, keys and values have biases where `bias` gives none.
    attention_soft_cap, logit_soft_cap: scores and logits x become cap tanh(x / cap).
    logit_scale: factor on the last hidden state, before the output projection.
    logit_bias: whether the logits have a bias; those of an encoder with BERT's head always do.
    plain_head: whether an encoder has no layer of its own before the output projection.
    causal: whether a position sees only those before it; false for an encoder.
    type_vocab_size: rows of an encoder's segment table, 0 for none.
    classifier_pooling: what classifies a sequence of an encoder, cls for its first token, or mean.
    classifier_dropout: before a classifier; hidden_dropout where None.
    encoder_depth_plan: of the encoder under a decoder, as depth_plan; None where there is none.
    encoder_layers, encoder_attention_heads, encoder_head_dim, encoder_intermediate_size,
        max_source_positions: of that encoder; the decoder's where None.
    share_embeddings: whether encoder and decoder read one table of words.
    image_size: rows and columns of a classifier's images; None where there are none. patch_size,
        num_channels: of its patches. image_pooling: class_token, or mean of all patches.
    speech: {"filters": numbers of a frame that an encoder hears, "channels": of its first
        convolution, of which a gate leaves half}; None where it reads text.
    Raises ValueError where the depth plan and num_hidden_layers disagree,
    for an unknown key in the plan, and for an unknown pooling.
    """

    model_type = "fathom"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 2048,
        activation: str = "gelu",
        normalization: str = "layernorm",
        norm_epsilon: float = 1e-5,
        position: str = "learned",
        rotary_base: float = 10000.0,
        window: int | None = None,
        global_every: int | None = None,
        global_first: int = 0,
        rotary_base_local: float | None = None,
        rotary_share: float = 1.0,
        rotary_frequencies: list[float] | None = None,
        rotary_factor: float = 1.0,
        bias: bool = True,
        qkv_bias: bool = False,
        attention_soft_cap: float | None = None,
        logit_soft_cap: float | None = None,
        embedding_norm: bool = False,
        final_norm: bool = True,
        logit_scale: float = 1.0,
        logit_bias: bool = False,
        plain_head: bool = False,
        depth_plan: list[dict[str, Any]] | None = None,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        causal: bool = True,
        type_vocab_size: int = 0,
        classifier_pooling: str = "cls",
        classifier_dropout: float | None = None,
        sinusoid_scale: float = 1.0,
        sinusoid: dict[str, int] | None = None,
        encoder_depth_plan: list[dict[str, Any]] | None = None,
        encoder_layers: int | None = None,
        encoder_attention_heads: int | None = None,
        encoder_head_dim: int | None = None,
        encoder_intermediate_size: int | None = None,
        max_source_positions: int | None = None,
        share_embeddings: bool = True,
        image_size: list[int] | None = None,
        patch_size: int = 16,
        num_channels: int = 3,
        image_pooling: str = "class_token",
        speech: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.activation = activation
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.position = position
        self.rotary_base = rotary_base
        self.window = window
        self.global_every = global_every
        self.global_first = global_first
        self.rotary_base_local = rotary_base_local
        self.rotary_share = rotary_share
        self.rotary_frequencies = rotary_frequencies
        self.rotary_factor = rotary_factor
        self.bias = bias
        self.qkv_bias = qkv_bias
        self.attention_soft_cap = attention_soft_cap
        self.logit_soft_cap = logit_soft_cap
        self.embedding_norm = embedding_norm
        self.final_norm = final_norm
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.plain_head = plain_head
        self.depth_plan = depth_plan or [
            {"layers": num_hidden_layers, "attention": {"norm_in": True}, "mlp": {"norm_in": True}}
        ]
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.causal = causal
        self.type_vocab_size = type_vocab_size
        self.classifier_pooling = _known(classifier_pooling)
        self.classifier_dropout = classifier_dropout
        self.sinusoid_scale = sinusoid_scale
        self.sinusoid = sinusoid or {"first": 0, "steps": hidden_size // 2}
        self.encoder_depth_plan = encoder_depth_plan
        self.encoder_layers = encoder_layers
        self.encoder_attention_heads = encoder_attention_heads
        self.encoder_head_dim = encoder_head_dim
        self.encoder_intermediate_size = encoder_intermediate_size
        self.max_source_positions = max_source_positions
        self.share_embeddings = share_embeddings
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.image_pooling = image_pooling
        self.speech = speech
        self.sublayers()
        # transformers 4 has this field and its default, transformers 5 has neither.
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def sublayers(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(attention, feed-forward) coefficients of every layer, defaults filled in.

        Raises ValueError as the class does.
        """
        expanded = []
        for run in self.depth_plan:
            pair = (run["attention"], run["mlp"])
            for given in (*pair, run.get("cross") or {}):
                if unknown := set(given) - set(SUBLAYER):
                    raise ValueError(
                        f"depth_plan has unknown keys {sorted(unknown)}; known: {', '.join(SUBLAYER)}"
                    )
            expanded += [({**SUBLAYER, **pair[0]}, {**SUBLAYER, **pair[1]})] * run["layers"]
        if len(expanded) != self.num_hidden_layers:
            raise ValueError(
                f"depth_plan describes {len(expanded)} layers, but num_hidden_layers={self.num_hidden_layers}"
            )
        return expanded

    def is_local(self, layer: int) -> bool:
        """Whether a layer, counted from 0, sees no more than the window."""
        if self.window is None or self.global_every is None:
            return self.window is not None
        return (layer - self.global_first) % self.global_every != 0

    def crosses(self) -> list[dict[str, Any] | None]:
        """Coefficients of every layer's cross-attention, defaults filled in; None without one."""
        found: list[dict[str, Any] | None] = []
        for run in self.depth_plan:
            given = run.get("cross")
            found += [None if given is None else {**SUBLAYER, **given}] * run["layers"]
        return found

    def of_encoder(self) -> FathomConfig:
        """The encoder under a decoder, as a configuration of its own."""
        own = copy.deepcopy(self)
        own.depth_plan, own.encoder_depth_plan = self.encoder_depth_plan or self.depth_plan, None
        own.num_hidden_layers = self.encoder_layers or self.num_hidden_layers
        own.num_attention_heads = self.encoder_attention_heads or self.num_attention_heads
        own.num_key_value_heads = own.num_attention_heads
        own.head_dim = self.encoder_head_dim or self.head_dim
        own.intermediate_size = self.encoder_intermediate_size or self.intermediate_size
        own.max_position_embeddings = self.max_source_positions or self.max_position_embeddings
        # Its last norm is its last layer's.
        own.causal, own.is_encoder_decoder, own.final_norm = False, False, False
        own.sublayers()
        return own

    def gates(self) -> list[bool]:
        """Whether each layer has a gate."""
        return [gate for run in self.depth_plan for gate in [bool(run.get("gate"))] * run["layers"]]


__all__ = ["SUBLAYER", "FathomConfig"]
