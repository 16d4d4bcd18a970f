"""Every setting that changes what a model computes, known to all who compute it, in fp64.

The model that is trained, the plain evaluation that proves exports, and the class that travels with
them. A new field of `ModelConfig` fails here until it has an entry in `SETTINGS`, with a value that
is not its default and what that needs, or in `NOT_COMPUTED`, with the reason.
Every activation and every scheme: tests/model/hf/test_hf_reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.config import ModelConfig
from model.families.family import Family
from model.families.table import FAMILIES, OWN_SETTINGS
from model.hf.folding.pre_ln import fold
from model.hf.mapping import entries
from model.hf.reference import Evaluation
from model.hf.remote import modeling_fathom, modeling_fathom_encoder
from model.hf.remote.configuration_fathom import FathomConfig
from model.hf.settings.write import SPECIAL, write_config
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.parameters.table import parameter_table
from model.rotary import frequencies
from model.sections import Strict
from model.weights.init import logit_scale
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import POSITIONS, make_config, make_tokens, make_weights

ROTARY: dict[str, Any] = {"position": "rotary", "head_dim": 16}
LINEAR = {"scaling": "linear", "factor": 3.0}
LLAMA3 = {"scaling": "llama3", "factor": 4.0, "original_positions": 40}
YARN = {"scaling": "yarn", "factor": 4.0, "original_positions": 40}
WINDOWS = {**ROTARY, "window": 2, "global_every": 2}
COMPLETEP = {"method": "completep", "base_layers": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "scheme": {"scheme": "peri_ln"},
    "num_layers": {"num_layers": 3},
    "hidden_size": {"hidden_size": 48},
    "num_attention_heads": {"num_attention_heads": 2},
    "num_query_groups": {"num_query_groups": 2},
    "head_dim": {"head_dim": 12},
    "ffn_hidden_size": {"ffn_hidden_size": 40},
    "vocab_size": {"vocab_size": 90},
    "vocab_multiple": {"vocab_multiple": 8},
    "max_position_embeddings": {"max_position_embeddings": 20},
    "normalization": {"normalization": "rmsnorm"},
    "norm_epsilon": {"norm_epsilon": 0.1},
    "activation": {"activation": "geglu"},
    "position": {"position": "rotary"},
    "rotary_base": {**ROTARY, "rotary_base": 50},
    "rotary.share": {**ROTARY, "rotary": {"share": 0.5}},
    "rotary.scaling": {**ROTARY, "rotary": LINEAR},
    "rotary.factor": {**ROTARY, "rotary": LINEAR},
    "rotary.original_positions": {**ROTARY, "rotary": LLAMA3},
    "rotary.low_frequency": {**ROTARY, "rotary": {**LLAMA3, "low_frequency": 0.5}},
    "rotary.high_frequency": {**ROTARY, "rotary": {**LLAMA3, "high_frequency": 8.0}},
    "rotary.beta_fast": {**ROTARY, "rotary": {**YARN, "beta_fast": 1.5}},
    "rotary.beta_slow": {**ROTARY, "rotary": {**YARN, "beta_slow": 0.1}},
    "rotary.attention_factor": {**ROTARY, "rotary": {**YARN, "attention_factor": 2.0}},
    "rotary.truncate": {**ROTARY, "rotary": {**YARN, "truncate": False}},
    "window": {"window": 2},
    "global_every": WINDOWS,
    "rotary_base_local": {**WINDOWS, "rotary_base_local": 50},
    "tie_embeddings": {"tie_embeddings": False},
    "token_types": {"token_types": 2},
    "embedding_norm": {"embedding_norm": True},
    "first_norm": {"embedding_norm": True, "first_norm": False},
    "plain_head": {"plain_head": True},
    "attention.qk_norm": {"attention": {"qk_norm": True}},
    "attention.soft_cap": {"attention": {"soft_cap": 0.5}},
    "attention.qkv_bias": {"bias": False, "attention": {"qkv_bias": True}},
    "logit_soft_cap": {"logit_soft_cap": 2.0},
    "bias": {"bias": False},
    "logit_bias": {"logit_bias": True, "plain_head": True},
    "scheme_options": {"scheme": "deepscalelm_pre_ln", "scheme_options": {"k": 4.0}},
    "transfer.method": {"transfer": COMPLETEP},
    "transfer.base_layers": {"transfer": COMPLETEP},
    "transfer.base_hidden": {"transfer": {**COMPLETEP, "base_hidden": 16}},
    "transfer.base_head_dim": {"transfer": {**COMPLETEP, "base_head_dim": 4}},
    "transfer.alpha": {"transfer": {**COMPLETEP, "alpha": 0.5}},
}
"""Field -> what is set. Settings that a family does not have are left out for it."""

NOT_COMPUTED = {
    "family": "every case has one",
    "hidden_dropout": "in training alone",
    "attention_dropout": "in training alone",
    "init.base": "initial weights; the factor on logits that follows is given to all who compute",
    "init.std": "initial weights",
    "init.token_correlation": "initial weights",
    "init.mask_token_share": "initial weights",
    "init.causal_correction": "initial weights",
    "init.unigram": "initial weights",
}
"""Field -> why its value is nothing to who computes a trained model."""

ONE_STACK = [one for one in FAMILIES.values() if len(one.stacks) == 1 and one.inputs == "tokens"]
"""Families whose models the plain evaluation computes."""


def fields(section: type[Strict], prefix: str = "") -> Iterator[str]:
    """Names of all settings, those of sections with their section's."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Strict):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def takes(family: Family, name: str) -> bool:
    """Whether models of a family have a setting."""
    return name not in OWN_SETTINGS or name in family.settings


def config_of(family: Family, changes: dict[str, Any]) -> ModelConfig:
    own = {name: value for name, value in changes.items() if takes(family, name)}
    return make_config(**{"family": family.name, "num_layers": 4, **own})


def without(family: Family, path: str, changes: dict[str, Any]) -> ModelConfig:
    """The same with the default of one setting; of its whole section where it cannot go alone."""
    name, _, inner = path.partition(".")
    less = {key: value for key, value in changes.items() if key != name}
    if inner:
        section = {key: value for key, value in changes[name].items() if key != inner}
        try:
            return config_of(family, {**less, name: section})
        except ValidationError:
            pass
    return config_of(family, less)


def types_of(config: ModelConfig, tokens: Tensor) -> Tensor | None:
    return (tokens % 2).long() if config.token_types else None


def trained(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of the model that is trained."""
    single_process()
    core = transformer_config(config, dtype=torch.float64)
    chunk = LanguageModel(config, core, seq_length=POSITIONS).double().eval()
    if config.position == "rotary":  # Megatron-core's angles are in fp32
        chunk.rotary_pos_emb.inv_freq = frequencies(config, dtype=torch.float64)
    if config.rotary_base_local is not None:
        chunk.rotary_pos_emb_local.inv_freq = frequencies(config, local=True, dtype=torch.float64)
    types = types_of(config, tokens)
    batch = {"tokens": tokens} | ({} if types is None else {"token_types": types})
    with torch.no_grad():
        for named in named_parameters(chunk, 0, 1):
            named.parameter.copy_(weights[named.name])
        logits: Tensor = chunk(batch)
    return logits[..., : config.vocab_size]


def exported(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits of our own class of transformers, with the settings that an export writes."""
    scale = logit_scale(config)
    plan = fold("fathom", config, scale)
    settings = write_config(
        "fathom",
        config,
        plan,
        positions=config.max_position_embeddings or POSITIONS,
        logit_scale=scale,
        dtype="float64",
        special=dict.fromkeys(SPECIAL),
    )
    (name,) = cast(list[str], settings["architectures"])
    file = modeling_fathom if config.stack.causal else modeling_fathom_encoder
    model = getattr(file, name)(FathomConfig(**cast(dict[str, Any], settings))).double().eval()
    state: dict[str, Tensor] = {}
    for entry in entries("fathom", config, config.max_position_embeddings or POSITIONS):
        exact = weights[entry.canonical] * plan.factors.get(entry.canonical, 1.0)
        state |= dict(zip(entry.hf, entry.conversion.to_hf(exact, config), strict=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= set(model._tied_weights_keys or ())
    types = types_of(config, tokens)
    given = {} if types is None else {"token_type_ids": types}
    with torch.no_grad():
        logits: Tensor = model(tokens, **given).logits
    return logits


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    made = make_weights(config, positions=config.max_position_embeddings or POSITIONS)
    return {name: tensor.double() for name, tensor in made.items()}


def test_every_setting_is_here() -> None:
    elsewhere = {name for name in OWN_SETTINGS if not any(takes(one, name) for one in ONE_STACK)}
    known = {name for name in fields(ModelConfig) if name.partition(".")[0] not in elsewhere}
    unknown = known - set(SETTINGS) - set(NOT_COMPUTED)
    assert not unknown, f"{sorted(unknown)}: give each an entry in SETTINGS or NOT_COMPUTED"
    assert not set(SETTINGS) & set(NOT_COMPUTED)
    assert not (set(SETTINGS) | set(NOT_COMPUTED)) - known, "no such setting"


@pytest.mark.parametrize(
    ("family", "path"),
    [(one, path) for path in SETTINGS for one in ONE_STACK if takes(one, path.partition(".")[0])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_all_who_compute_a_model_know_it(family: Family, path: str) -> None:
    config, plain = config_of(family, SETTINGS[path]), without(family, path, SETTINGS[path])
    assert config != plain
    weights, tokens = weights_of(config), make_tokens(config)
    ours = trained(config, weights, tokens)
    table, other = (
        [(row.name, row.shape) for row in parameter_table(one, positions=POSITIONS)]
        for one in (config, plain)
    )
    if table == other:  # else it changes the model without a doubt
        assert not torch.allclose(ours, trained(plain, weights, tokens), rtol=0, atol=1e-6)
    evaluation = Evaluation(weights, config, logit_scale=logit_scale(config), dtype=torch.float64)
    reference = evaluation(tokens, types=types_of(config, tokens))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    # Its rotary angles are in fp32.
    tolerance = 1e-4 if config.position == "rotary" else 1e-10
    torch.testing.assert_close(exported(config, weights, tokens), reference, rtol=tolerance, atol=tolerance)
