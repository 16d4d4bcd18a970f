"""The fields of config.json that are read, with the defaults of transformers' own classes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from model.records import Record

ADVICE = "download the model again, or save it again with transformers"

# Bounds that no model comes near: a damaged number is refused before anything of its size is built.
Layers = Annotated[int, Field(ge=1, le=10_000)]
Heads = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 22)]
Rows = Annotated[int, Field(ge=2, le=1 << 30)]
Side = Annotated[int, Field(ge=1, le=1 << 16)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Base = Annotated[float, Field(ge=1, le=1 << 53)]


class Kind(Record):
    """What every config.json says."""

    model_type: str | None = None


class GPT2File(Record):
    """Fields and defaults of transformers' GPT2Config."""

    vocab_size: Rows = 50257
    n_positions: Rows = 1024
    n_embd: Width = 768
    n_layer: Layers = 12
    n_head: Heads = 12
    n_inner: Width | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Epsilon = 1e-5
    resid_pdrop: Dropout = 0.1
    embd_pdrop: Dropout = 0.1
    attn_pdrop: Dropout = 0.1
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


class RotaryFile(Record):
    """Where decoders say what their rotary embedding is."""

    rope_scaling: dict[str, object] | None = None
    rope_parameters: dict[str, object] | None = None

    @property
    def rope(self) -> dict[str, object]:
        """The newer field over the older one."""
        return {**(self.rope_scaling or {}), **(self.rope_parameters or {})}


class LlamaFile(RotaryFile):
    """Fields and defaults of transformers' LlamaConfig, and the one that only Mistral has."""

    vocab_size: Rows = 32000
    hidden_size: Width = 4096
    intermediate_size: Width = 11008
    num_hidden_layers: Layers = 32
    num_attention_heads: Heads = 32
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Rows = 2048
    rms_norm_eps: Epsilon = 1e-6
    rope_theta: Base | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Dropout | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None


class MistralFile(LlamaFile):
    """Fields of transformers' MistralConfig with other defaults than Llama's."""

    intermediate_size: Width = 14336
    num_key_value_heads: Heads | None = 8
    max_position_embeddings: Rows = 131072
    sliding_window: Annotated[int, Field(ge=1, le=1 << 26)] | None = 4096


class EuroBertFile(LlamaFile):
    """Fields of transformers' EuroBertConfig with other defaults than Llama's."""

    vocab_size: Rows = 128256
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    max_position_embeddings: Rows = 8192
    rms_norm_eps: Epsilon = 1e-5


class Qwen2File(LlamaFile):
    """Fields of transformers' Qwen2Config with other defaults than Llama's."""

    vocab_size: Rows = 151936
    intermediate_size: Width = 22016
    max_position_embeddings: Rows = 32768
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Field(ge=0, le=10_000)] = 28
    layer_types: list[str] | None = None


class Qwen3File(Qwen2File):
    """Fields of transformers' Qwen3Config with other defaults than Qwen 2's."""

    head_dim: Heads | None = 128


class GemmaFile(LlamaFile):
    """Fields of transformers' GemmaConfig with other defaults than Llama's."""

    vocab_size: Rows = 256000
    hidden_size: Width = 3072
    intermediate_size: Width = 24576
    num_hidden_layers: Layers = 28
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads | None = 16
    head_dim: Heads | None = 256
    hidden_act: str = "gelu_pytorch_tanh"
    hidden_activation: str | None = None
    max_position_embeddings: Rows = 8192
    tie_word_embeddings: bool = True
    use_bidirectional_attention: bool | None = None


class Gemma2File(GemmaFile):
    """Fields of transformers' Gemma2Config with other defaults than Gemma's."""

    hidden_size: Width = 2304
    intermediate_size: Width = 9216
    num_hidden_layers: Layers = 26
    num_attention_heads: Heads = 8
    num_key_value_heads: Heads | None = 4
    query_pre_attn_scalar: Annotated[float, Field(gt=0, le=1 << 22)] = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1, le=10_000)] = 2
    final_logit_softcapping: Annotated[float, Field(gt=0, le=1e6)] | None = 30.0
    attn_logit_softcapping: Annotated[float, Field(gt=0, le=1e6)] | None = 50.0


class Gemma3File(Gemma2File):
    """Fields of transformers' Gemma3TextConfig with other defaults than Gemma 2's."""

    vocab_size: Rows = 262208
    max_position_embeddings: Rows = 131072
    sliding_window_pattern: Annotated[int, Field(ge=1, le=10_000)] = 6
    final_logit_softcapping: Annotated[float, Field(gt=0, le=1e6)] | None = None
    attn_logit_softcapping: Annotated[float, Field(gt=0, le=1e6)] | None = None
    rope_theta: Base | None = 1000000.0
    rope_local_base_freq: Base = 10000.0


class GPTNeoXFile(RotaryFile):
    """Fields and defaults of transformers' GPTNeoXConfig, and what older ones were called."""

    vocab_size: Rows = 50432
    hidden_size: Width = 6144
    num_hidden_layers: Layers = 44
    num_attention_heads: Heads = 64
    intermediate_size: Width = 24576
    hidden_act: str = "gelu"
    rotary_pct: float | None = None
    rotary_emb_base: Base | None = None
    attention_dropout: Dropout = 0.0
    hidden_dropout: Dropout = 0.0
    max_position_embeddings: Rows = 2048
    layer_norm_eps: Epsilon = 1e-5
    tie_word_embeddings: bool = False
    use_parallel_residual: bool = True
    attention_bias: bool = True


class ModernBertFile(Record):
    """Fields and defaults of transformers' ModernBertConfig, and what older ones were called."""

    vocab_size: Rows = 50368
    hidden_size: Width = 768
    intermediate_size: Width = 1152
    num_hidden_layers: Layers = 22
    num_attention_heads: Heads = 12
    hidden_activation: str = "gelu"
    classifier_activation: str = "gelu"
    max_position_embeddings: Rows = 8192
    norm_eps: Epsilon = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    decoder_bias: bool = True
    attention_dropout: Dropout = 0.0
    embedding_dropout: Dropout = 0.0
    mlp_dropout: Dropout = 0.0
    layer_types: list[str] | None = None
    global_attn_every_n_layers: Annotated[int, Field(ge=1, le=10_000)] = 3
    local_attention: Annotated[int, Field(ge=2, le=1 << 26)] = 128
    rope_parameters: dict[str, dict[str, object] | None] | None = None
    rope_scaling: dict[str, object] | None = None
    global_rope_theta: Base = 160000.0
    local_rope_theta: Base = 10000.0
    tie_word_embeddings: bool = True


class Rope(Record):
    """`rope_parameters` of transformers 5, or `rope_scaling` of older ones."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Base | None = None
    partial_rotary_factor: float | None = None
    factor: Annotated[float, Field(ge=1, le=1 << 20)] | None = None
    original_max_position_embeddings: Rows | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: Annotated[float, Field(ge=0, le=100)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=100)] | None = None
    truncate: bool | None = None


class OPTFile(Record):
    """Fields and defaults of transformers' OPTConfig."""

    vocab_size: Rows = 50272
    hidden_size: Width = 768
    word_embed_proj_dim: Width | None = None
    ffn_dim: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    max_position_embeddings: Rows = 2048
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    layer_norm_elementwise_affine: bool = True
    enable_bias: bool = True
    dropout: Dropout = 0.1
    attention_dropout: Dropout = 0.0
    layerdrop: float = 0.0
    tie_word_embeddings: bool = True


class BertFile(Record):
    """Fields and defaults of transformers' BertConfig; Megatron's BERT has the same fields."""

    vocab_size: Rows = 30522
    hidden_size: Width = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    intermediate_size: Width = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Dropout = 0.1
    attention_probs_dropout_prob: Dropout = 0.1
    max_position_embeddings: Rows = 512
    type_vocab_size: Annotated[int, Field(ge=0, le=1 << 16)] = 2
    layer_norm_eps: Epsilon = 1e-12
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


class CrossedFile(Record):
    """Fields and defaults of transformers' BartConfig; MBart's are the same."""

    vocab_size: Rows = 50265
    max_position_embeddings: Rows = 1024
    encoder_layers: Layers = 12
    encoder_ffn_dim: Width = 4096
    encoder_attention_heads: Heads = 16
    decoder_layers: Layers = 12
    decoder_ffn_dim: Width = 4096
    decoder_attention_heads: Heads = 16
    d_model: Width = 1024
    activation_function: str = "gelu"
    dropout: Dropout = 0.1
    attention_dropout: Dropout = 0.0
    activation_dropout: float = 0.0
    encoder_layerdrop: float = 0.0
    decoder_layerdrop: float = 0.0
    scale_embedding: bool = False
    is_decoder: bool = False
    tie_word_embeddings: bool = True
    decoder_vocab_size: Rows | None = None
    share_encoder_decoder_embeddings: bool = True


class BlenderbotFile(CrossedFile):
    """Fields of transformers' BlenderbotConfig with other defaults than BART's."""

    vocab_size: Rows = 8008
    max_position_embeddings: Rows = 128
    encoder_layers: Layers = 2
    encoder_ffn_dim: Width = 10240
    encoder_attention_heads: Heads = 32
    decoder_layers: Layers = 24
    decoder_ffn_dim: Width = 10240
    decoder_attention_heads: Heads = 32
    d_model: Width = 2560


class MarianFile(CrossedFile):
    """Fields of transformers' MarianConfig with other defaults than BART's."""

    vocab_size: Rows = 58101


class Special(Record):
    """Ids that begin and end a text and fill up; several where a list.

    In config.json, and in generation_config.json, which goes before it.
    """

    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    """Of an encoder-decoder: what its decoder reads first."""


class ViTFile(Record):
    """Fields and defaults of transformers' ViTConfig."""

    architectures: list[str] | None = None
    image_size: Side | tuple[Side, Side] = 224
    patch_size: Side | tuple[Side, Side] = 16
    num_channels: Annotated[int, Field(ge=1, le=1 << 12)] = 3
    hidden_size: Width = 768
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    intermediate_size: Width = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: Dropout = 0.0
    attention_probs_dropout_prob: Dropout = 0.0
    layer_norm_eps: Epsilon = 1e-12
    qkv_bias: bool = True
    id2label: Annotated[dict[str, str], Field(min_length=2, max_length=1 << 20)] = Field(
        default_factory=lambda: {"0": "LABEL_0", "1": "LABEL_1"}
    )


class ProcessorFile(Record):
    """Fields and defaults of transformers' ViTImageProcessor that say what pixels become."""

    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5, 0.5, 0.5)


class FramesFile(Record):
    """Fields and defaults of Speech2TextFeatureExtractor that say what frames become."""

    feature_extractor_type: str | None = None
    num_mel_bins: Annotated[int, Field(ge=1, le=1 << 10)] = 80
    sampling_rate: int = 16_000
    do_ceptral_normalize: bool = True
    normalize_means: bool = True
    normalize_vars: bool = True


class FathomFile(Record):
    """Sizes of our own class, which must be those of the section `pretraining`."""

    vocab_size: Rows = 32000
    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 12
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    max_position_embeddings: Rows = 2048
    logit_scale: float = 1.0
    type_vocab_size: int = 0
    encoder_layers: Layers | None = None
    pretraining: dict[str, object] | None = None
