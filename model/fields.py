"""The fields of a model's configuration. What follows from them is in `model/config.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.families.table import DEFAULT_FAMILY, summaries
from model.images import ImageConfig
from model.sections import LAYERS, AttentionConfig, InitConfig, RotaryConfig, Strict, TransferConfig
from model.speech import SpeechConfig

Activation = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"]


class ModelFields(Strict):
    """A model. Sizes are whole-model sizes, never per-rank ones."""

    family: str = Field(
        DEFAULT_FAMILY,
        description=f"What the model is made of. {summaries()}.",
    )
    scheme: str = Field(
        "deepscalelm_pre_ln",
        description="Depth scheme: norm positions, residual constants and weight gains, by name.",
    )
    num_layers: int = Field(
        ge=1,
        le=LAYERS,
        description="Transformer layers of the model (each has an attention and a feed-forward sublayer); "
        "of the decoder where there is an encoder too.",
    )
    encoder_layers: int | None = Field(
        None, ge=1, le=LAYERS, description="Layers of the encoder under a decoder; null: as many as it has."
    )
    hidden_size: int = Field(ge=1, le=1 << 20, description="Width of the residual stream.")
    num_attention_heads: int = Field(ge=1, le=1 << 16, description="Query heads.")
    num_query_groups: int | None = Field(
        None,
        ge=1,
        le=1 << 16,
        description="Key/value heads for grouped-query attention; null means one per query head.",
    )
    head_dim: int | None = Field(
        None, ge=1, le=1 << 16, description="Width of one head; null means hidden_size / num_attention_heads."
    )
    ffn_hidden_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="Feed-forward width; "
        "null means 4 x hidden_size, or 8/3 x rounded up to 64 for gated activations.",
    )
    encoder_attention_heads: int | None = Field(
        None, ge=1, le=1 << 16, description="Query heads of the encoder under a decoder; null: the decoder's."
    )
    encoder_ffn_hidden_size: int | None = Field(
        None,
        ge=1,
        le=1 << 24,
        description="Feed-forward width of the encoder under a decoder; null: the decoder's.",
    )
    vocab_size: int | None = Field(
        None,
        ge=2,
        le=1 << 30,
        description="Vocabulary before padding; null takes it from the tokenizer of the data. "
        "Of images, their classes.",
    )
    vocab_multiple: int = Field(
        128,
        ge=1,
        le=1 << 20,
        description="The embedding is padded to a multiple of this; "
        "independent of the parallel layout, so that checkpoints are too.",
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, le=1 << 26, description="Longest sequence; null means data.seq_length."
    )
    max_source_positions: int | None = Field(
        None,
        ge=1,
        le=1 << 26,
        description="Longest sequence of the encoder under a decoder; null means data.source_length.",
    )
    normalization: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Kind of every norm.")
    norm_epsilon: float = Field(1e-5, ge=1e-30, le=1, description="Epsilon inside every norm.")
    activation: Activation = Field(
        "gelu",
        description="Feed-forward activation. gelu is the exact one, gelu_tanh GPT-2's approximation of it; "
        "swiglu, geglu and geglu_tanh are gated.",
    )
    position: Literal["learned", "sinusoidal", "rotary", "none"] = Field(
        "learned",
        description="Position information: a learned table, fixed sines and cosines (not for gpt and bert), "
        "rotary embedding of queries and keys, or none.",
    )
    rotary_base: int = Field(10000, ge=1, le=10**12, description="Base period of rotary embeddings.")
    rotary: RotaryConfig = Field(default_factory=RotaryConfig, description="Share and scaling of it.")
    window: int | None = Field(
        None,
        ge=1,
        le=1 << 26,
        description="Tokens that attention sees before its own, and in an encoder after it too; null: all. "
        "Theory and initial weights take attention as seeing the whole sequence.",
    )
    global_every: int | None = Field(
        None,
        ge=2,
        le=LAYERS,
        description="The first layer, or that after global_first, and every so-manieth after it see all "
        "tokens in spite of the window; "
        "null: none.",
    )
    global_first: int = Field(
        0,
        ge=0,
        le=LAYERS,
        description="With global_every, how many layers with a window come before the first that sees all "
        "tokens (Gemma 2: 1; Gemma 3: 5).",
    )
    rotary_base_local: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Base period of rotary embeddings in layers with a window; null: rotary_base.",
    )
    tie_embeddings: bool = Field(True, description="Use the word embedding as output projection.")
    share_embeddings: bool = Field(
        True, description="Encoder and decoder read one table of words; false: each its own."
    )
    token_types: Literal[0, 2] = Field(
        0,
        description="Rows of a table of token types beside those of words and positions; 0: no table. "
        "Samples are then cut in two at a random place.",
    )
    embedding_norm: bool | None = Field(
        None, description="A norm on the embedding; null leaves it to the scheme."
    )
    first_norm: bool = Field(
        True,
        description="false: the first attention reads what the norm on the embedding gives, and has no norm "
        "of its own, as in ModernBERT.",
    )
    plain_head: bool = Field(
        False,
        description="No dense layer, activation and norm between the last layer and the output projection, "
        "and no bias on the logits but that of logit_bias, as in EuroBERT.",
    )
    image: ImageConfig | None = Field(None, description="Images and their patches.")
    speech: SpeechConfig | None = Field(None, description="Recordings and their convolutions.")
    attention: AttentionConfig = Field(
        default_factory=AttentionConfig, description="Bounds on its scores, biases of its parts."
    )
    logit_soft_cap: float | None = Field(
        None, gt=0, le=1e6, description="Logits z become cap tanh(z / cap) (Gemma 2: 30); null: none."
    )
    bias: bool = Field(True, description="Biases in all linear layers of the stack.")
    logit_bias: bool = Field(
        False,
        description="A trained bias on the logits, one number for each token; "
        "exports then need Fathom's own class, but for encoders of EuroBERT's kind and encoder-decoders.",
    )
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout after the embedding and after every branch."
    )
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on attention probabilities.")
    scheme_options: dict[str, float | bool] = Field(
        default_factory=dict,
        description="Options of the scheme, e.g. {rescale: false} for b2t, "
        "{k: 4.0, alpha: 1.0} for deepscalelm_*. An option the scheme lacks is refused.",
    )
    init: InitConfig = Field(default_factory=InitConfig, description="Initialisation.")
    transfer: TransferConfig = Field(
        default_factory=TransferConfig, description="Settings that carry over between sizes."
    )
