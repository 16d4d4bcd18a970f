"""Which stock architecture computes a model exactly: the first concrete reason why not, or none.

The model's data decide, not the names of its family and scheme.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

from model.config import ModelConfig
from model.errors import UserError
from model.hf.folding.parts import opened
from model.hf.folding.post_ln import post_ln_obstacle
from model.hf.folding.pre_ln import pre_ln_obstacle, sandwich_obstacle
from model.hf.names.conversions import Target
from model.hf.packaging import PACKAGINGS, packaging
from model.norms import NORMS
from model.words import printable

# Our activation -> the name transformers has for the same function.
UNGATED_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
LLAMA_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}


def obstacle(target: Target, config: ModelConfig) -> str | None:
    """The first concrete reason why `target` cannot compute this model, or None."""
    if target not in packaging(config).targets:
        kinds = " or ".join(row.kind for row in PACKAGINGS.values() if target in row.targets)
        return f"it is a {kinds}, the model a {packaging(config).kind}"
    return next((reason for form in FORMS[target] if (reason := form(config))), None)


def targets(architecture: str, config: ModelConfig) -> list[Target]:
    """Targets to try, best first.

    Raises UserError where the one asked for is not exact, or unknown.
    """
    if architecture == "auto":
        able = [target for target in packaging(config).targets if obstacle(target, config) is None]
        if not able:
            first = packaging(config).targets[0]
            raise UserError(
                f"no class of transformers computes this model (scheme {config.scheme}), not even {first}: "
                f"{obstacle(first, config)}; it cannot be exported"
            )
        return able
    target = next((known for known in FORMS if known == architecture), None)
    if target is None:
        raise UserError(
            f"--architecture {printable(architecture, 60)} is not known; "
            f"choose auto or one of {', '.join(packaging(config).targets)}"
        )
    if reason := obstacle(target, config):
        raise UserError(
            f"--architecture {target} cannot compute this model (scheme {config.scheme}): {reason}; "
            "use auto or fathom"
        )
    return [target]


def _pre_ln(config: ModelConfig) -> str | None:
    return pre_ln_obstacle(config.depth_plan())


def _post_ln(config: ModelConfig) -> str | None:
    return post_ln_obstacle(config.depth_plan())


def _each_pre_ln(config: ModelConfig, *, embedding_norm: bool) -> str | None:
    """The form of both stacks, an encoder's last norm being a norm after its stack."""
    for stack in config.blueprint.stacks:
        plan = opened(config.stack_plan(stack))
        if reason := pre_ln_obstacle(plan, embedding_norm=embedding_norm):
            return f"in the {stack.name}, {reason}"
    return None


def _pre_ln_of_blenderbot(config: ModelConfig) -> str | None:
    return _each_pre_ln(config, embedding_norm=False)


def _pre_ln_of_mbart(config: ModelConfig) -> str | None:
    if not config.stack_plan(config.blueprint.stacks[-1]).embedding_norm:
        return "it always has norms after the embeddings: train with model.embedding_norm=true"
    return _each_pre_ln(config, embedding_norm=True)


def _each_post_ln(config: ModelConfig) -> str | None:
    for stack in config.blueprint.stacks:
        plan = config.stack_plan(stack)
        if reason := post_ln_obstacle(plan):
            return f"in the {stack.name}, {reason}"
        if plan.final_norm:
            return f"it has no norm after the last layer, the model one (in the {stack.name})"
    return None


def _norms_of_bart(config: ModelConfig) -> str | None:
    if config.stack_plan(config.blueprint.stacks[-1]).embedding_norm:
        return None
    return "it always has norms after the embeddings: train with model.embedding_norm=true"


def _like_marian(config: ModelConfig) -> str | None:
    if config.stack_plan(config.blueprint.stacks[-1]).embedding_norm:
        return "it has no norms after the embeddings, the model has (model.embedding_norm)"
    if config.position != "sinusoidal":
        return f"its positions are fixed sines and cosines, the model's {config.position}"
    return None


def _tables_of_positions(config: ModelConfig) -> str | None:
    """One table of positions for each stack, of one length; fixed positions are written into it."""
    if config.position not in ("learned", "sinusoidal"):
        return f"it has a table of positions, the model {config.position}"
    longest = (config.max_source_positions, config.max_position_embeddings)
    if config.position == "learned" and longest[0] != longest[1]:
        return (
            f"its two tables of positions have one length, the model's {longest[0]} and {longest[1]} "
            "(max_source_positions, max_position_embeddings)"
        )
    return None


def _crossed(config: ModelConfig) -> str | None:
    """What these classes share: LayerNorm, a plain feed-forward, heads that span the width."""
    if reason := _layernorm(config):
        return reason
    if config.activation not in UNGATED_ACTIVATIONS:
        return f"its feed-forward has no {config.activation}"
    owned = (config.of(stack) for stack in config.blueprint.stacks)
    return next((reason for own in owned if (reason := _plain_heads(own))), None)


def _positions_of_speech(config: ModelConfig) -> str | None:
    if config.position != "sinusoidal":
        return f"its positions are fixed sines and cosines, the model's {config.position}"
    return None


def _one_table(config: ModelConfig) -> str | None:
    if not config.share_embeddings:
        return "encoder and decoder read one table of words, the model's one each (share_embeddings=false)"
    return _tied(config)


def _pre_ln_of_modernbert(config: ModelConfig) -> str | None:
    plan = config.depth_plan().with_first_norm()
    if plan is None:
        return (
            "it has a norm on the embedding, and none before the first attention: "
            "train with model.embedding_norm=true and model.first_norm=false"
        )
    return pre_ln_obstacle(replace(plan, embedding_norm=False))


def _norms_of_bert(config: ModelConfig) -> str | None:
    plan = config.depth_plan()
    if not plan.embedding_norm:
        return "it always has a norm after the embedding: train with model.embedding_norm=true"
    return "it has no norm after the last layer, the model one" if plan.final_norm else None


def _no_logit_bias(config: ModelConfig) -> str | None:
    return "it has no bias on its logits (model.logit_bias=true)" if config.logit_bias else None


def _tied(config: ModelConfig) -> str | None:
    return None if config.tie_embeddings else "its output projection is the table of words"


def _head_of_bert(config: ModelConfig) -> str | None:
    if not config.head_transform:
        return "it has a dense layer, an activation and a norm before its output projection"
    return None


def _head_of_eurobert(config: ModelConfig) -> str | None:
    """The output projection reads the last norm, with a bias where linear layers have one."""
    if config.head_transform:
        return "its output projection reads the last norm: train with model.plain_head=true"
    if config.logit_bias != config.bias:
        return (
            f"its logits have a bias where its linear layers have one: model.logit_bias={config.logit_bias}, "
            f"model.bias={config.bias}"
        )
    return None


def _eurobert_is_installed(config: ModelConfig) -> str | None:
    """Transformers has the class since March 2026."""
    known = find_spec("transformers.models.eurobert")
    return None if known else "the installed transformers has no such class: update it"


def _sees_all(config: ModelConfig) -> str | None:
    if config.window is None:
        return None
    return f"its tokens see the whole sequence, the model's {config.window} others (model.window)"


def _window_of_mistral(config: ModelConfig) -> str | None:
    every = config.global_every
    return (
        None if every is None else f"all its layers have the window, the model's not (global_every={every})"
    )


def _plain_rotary(config: ModelConfig) -> str | None:
    """Older versions of transformers read nothing but the bases."""
    scaling = config.rotary.scaling
    return None if scaling == "none" else f"its frequencies are plain, the model's scaled ({scaling})"


def _window_of_modernbert(config: ModelConfig) -> str | None:
    if config.window is not None and (config.global_every is None or config.global_first):
        return "its first layer sees the whole sequence: train with model.global_every"
    return None


def _one_base(config: ModelConfig) -> str | None:
    local = config.rotary_base_local
    return f"all its layers turn alike, the model's not (rotary_base_local={local})" if local else None


def _norms_of_gemma2(config: ModelConfig) -> str | None:
    return sandwich_obstacle(config.depth_plan())


def _norms_of_gemma3(config: ModelConfig) -> str | None:
    plan = config.depth_plan().without_score_norms()
    if plan is None:
        return "it norms queries and keys: train with model.attention.qk_norm=true"
    return sandwich_obstacle(plan)


def _no_cap_on_scores(config: ModelConfig) -> str | None:
    cap = config.attention.soft_cap
    return None if cap is None else f"its scores have no soft cap, the model's one (soft_cap={cap})"


def _no_soft_caps(config: ModelConfig) -> str | None:
    for name, cap in (
        ("attention.soft_cap", config.attention.soft_cap),
        ("logit_soft_cap", config.logit_soft_cap),
    ):
        if cap is not None:
            return f"it has no soft caps, the model one (model.{name}={cap})"
    return None


def _one_switch_of_biases(config: ModelConfig) -> str | None:
    alone = config.attention.qkv_bias
    return (
        "its queries, keys and values have no biases alone (model.attention.qkv_bias=true)" if alone else None
    )


PLAIN = (_no_soft_caps, _one_switch_of_biases)
"""What a class has not that knows nothing of these options."""


def _biases_of_qwen2(config: ModelConfig) -> str | None:
    if config.bias or not config.attention.qkv_bias:
        return (
            "its queries, keys and values have biases and no other linear layer has: train with "
            "model.bias=false and model.attention.qkv_bias=true"
        )
    return None


def _pre_ln_of_qwen3(config: ModelConfig) -> str | None:
    plan = config.depth_plan().without_score_norms()
    if plan is None:
        return "it norms queries and keys: train with model.attention.qk_norm=true"
    return pre_ln_obstacle(plan)


def _like_gpt_neox(config: ModelConfig) -> str | None:
    """LayerNorm, rotary positions, a plain feed-forward, biases everywhere."""
    if reason := _layernorm(config):
        return reason
    if config.position != "rotary":
        return f"it has rotary positions, the model {config.position}"
    if config.activation not in UNGATED_ACTIVATIONS:
        return f"its feed-forward has no {config.activation}"
    return None if config.bias else "its linear layers have biases (model.bias=false)"


def _no_bias(config: ModelConfig) -> str | None:
    return "its linear layers have no biases (model.bias=true)" if config.bias else None


def _layernorm(config: ModelConfig) -> str | None:
    core = NORMS[config.normalization].core
    return None if config.normalization == "layernorm" else f"it has LayerNorm, the model {core}"


def _no_token_types(config: ModelConfig) -> str | None:
    return "it has no table of token types" if config.token_types else None


def _like_llama(config: ModelConfig) -> str | None:
    """RMSNorm, rotary positions, a gated feed-forward."""
    if config.normalization != "rmsnorm":
        return f"it has RMSNorm, the model {NORMS[config.normalization].core}"
    return _rotary_and_gated(config)


def _rotary_and_gated(config: ModelConfig) -> str | None:
    problems = (
        (config.position != "rotary", f"it has rotary positions, the model {config.position}"),
        (
            config.rotary.share != 1,
            f"it turns whole heads, the model a share (rotary.share={config.rotary.share})",
        ),
        (
            config.activation not in LLAMA_ACTIVATIONS,
            f"its feed-forward is gated by silu or gelu, the model's activation is {config.activation}",
        ),
        (
            config.hidden_size % config.num_attention_heads != 0,
            f"it wants hidden_size divisible by num_attention_heads={config.num_attention_heads}",
        ),
    )
    return next((reason for present, reason in problems if present), None)


def _like_gpt2(config: ModelConfig) -> str | None:
    """LayerNorm, learned positions, a plain feed-forward, heads that span the width."""
    if reason := _layernorm(config):
        return reason
    if config.position != "learned":
        return f"it has learned positions, the model {config.position}"
    if config.activation not in UNGATED_ACTIVATIONS:
        return f"its feed-forward has no {config.activation}"
    return _plain_heads(config)


def _plain_heads(config: ModelConfig) -> str | None:
    problems = (
        (
            config.groups != config.num_attention_heads,
            f"it has no grouped-query attention, the model {config.groups} key/value heads",
        ),
        (
            config.kv_channels * config.num_attention_heads != config.hidden_size,
            f"its heads span hidden_size, the model has head_dim={config.kv_channels}",
        ),
    )
    return next((reason for present, reason in problems if present), None)


def _reads_class_token(config: ModelConfig) -> str | None:
    assert config.image is not None
    if config.image.class_token:
        return None
    return "it reads a class token: train with model.image.pool=class_token"


FORMS: dict[Target, tuple[Callable[[ModelConfig], str | None], ...]] = {
    "gpt2": (*PLAIN, _no_logit_bias, _pre_ln, _like_gpt2, _sees_all),
    "llama": (*PLAIN, _no_logit_bias, _pre_ln, _like_llama, _sees_all),
    "mistral": (*PLAIN, _no_logit_bias, _pre_ln, _like_llama, _no_bias, _window_of_mistral),
    "qwen2": (_no_soft_caps, _no_logit_bias, _pre_ln, _like_llama, _one_base, _biases_of_qwen2),
    "qwen3": (*PLAIN, _no_logit_bias, _pre_ln_of_qwen3, _like_llama, _one_base, _no_bias),
    "gpt_neox": (*PLAIN, _no_logit_bias, _pre_ln, _like_gpt_neox, _plain_rotary, _plain_heads, _sees_all),
    "gemma": (*PLAIN, _no_logit_bias, _pre_ln, _like_llama, _sees_all, _no_bias),
    "gemma2": (
        _one_switch_of_biases,
        _no_logit_bias,
        _norms_of_gemma2,
        _like_llama,
        _one_base,
        _no_bias,
    ),
    "gemma3_text": (
        _one_switch_of_biases,
        _no_cap_on_scores,
        _no_logit_bias,
        _norms_of_gemma3,
        _like_llama,
        _no_bias,
    ),
    "opt": (*PLAIN, _no_logit_bias, _post_ln, _like_gpt2, _sees_all),
    "bert": (*PLAIN, _post_ln, _norms_of_bert, _like_gpt2, _tied, _head_of_bert, _sees_all),
    "megatron-bert": (*PLAIN, _pre_ln, _like_gpt2, _tied, _head_of_bert, _sees_all),
    "eurobert": (
        *PLAIN,
        _pre_ln,
        _like_llama,
        _no_token_types,
        _head_of_eurobert,
        _sees_all,
        _eurobert_is_installed,
    ),
    "modernbert": (
        *PLAIN,
        _pre_ln_of_modernbert,
        _layernorm,
        _rotary_and_gated,
        _plain_rotary,
        _plain_heads,
        _no_token_types,
        _head_of_bert,
        _window_of_modernbert,
    ),
    "bart": (*PLAIN, _each_post_ln, _norms_of_bart, _crossed, _tables_of_positions, _one_table),
    "mbart": (*PLAIN, _pre_ln_of_mbart, _crossed, _tables_of_positions, _one_table),
    "blenderbot": (*PLAIN, _pre_ln_of_blenderbot, _crossed, _tables_of_positions, _one_table),
    "marian": (*PLAIN, _each_post_ln, _like_marian, _crossed, _tied),
    "speech_to_text": (
        *PLAIN,
        _no_logit_bias,
        _pre_ln_of_blenderbot,
        _crossed,
        _tied,
        _positions_of_speech,
    ),
    "vit": (*PLAIN, _pre_ln, _like_gpt2, _reads_class_token),
    "fathom": (),
}
"""What a target computes: each tells why a model is something else, or None."""
