"""Every setting that changes what a model computes, known to all who compute it, in fp64.

The model that is trained, the plain evaluation that proves exports, and the class that travels with
them. A new field of `ModelConfig` fails here until it has an entry in `SETTINGS`, with a value that
is not its default and what that needs, or in `NOT_COMPUTED`, with the reason.
Every activation and every scheme: tests/model/hf/test_hf_reference.py, for encoder-decoders
test_hf_crossed_reference.py beside it. What models of speech compute: test_hf_speech.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.config import ModelConfig
from model.families.family import Family
from model.families.table import FAMILIES, OWN_SETTINGS
from model.hf.folding.pre_ln import fold
from model.hf.mapping import entries
from model.hf.proof import Inputs, evaluation, proof_inputs
from model.hf.remote import (
    modeling_fathom,
    modeling_fathom_encoder,
    modeling_fathom_images,
    modeling_fathom_seq2seq,
)
from model.hf.remote.configuration_fathom import FathomConfig
from model.hf.settings.write import SPECIAL, START, write_config
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.parameters.table import parameter_table
from model.rotary import frequencies
from model.sections import Strict
from model.weights.init import logit_scale
from parallel.launch.one_process import single_process
from tests.model.hf.tiny import POSITIONS, make_config, make_weights

OWN_CODE = (modeling_fathom, modeling_fathom_encoder, modeling_fathom_images, modeling_fathom_seq2seq)
OWN_BASE: dict[str, dict[str, Any]] = {
    "vit": {
        "tie_embeddings": False,
        "image": {"height": 6, "width": 8, "channels": 2, "patch": 2},
    },
    "seq2seq": {"encoder_layers": 2, "num_layers": 3, "max_source_positions": POSITIONS},
}
"""What models of a family are made of here, unless a setting changes it."""
ROTARY: dict[str, Any] = {"position": "rotary", "head_dim": 16}
LINEAR = {"scaling": "linear", "factor": 3.0}
LLAMA3 = {"scaling": "llama3", "factor": 4.0, "original_positions": 40}
YARN = {"scaling": "yarn", "factor": 4.0, "original_positions": 40}
WINDOWS = {**ROTARY, "window": 2, "global_every": 2}
COMPLETEP = {"method": "completep", "base_layers": 2}

SETTINGS: dict[str, dict[str, Any]] = {
    "scheme": {"scheme": "peri_ln"},
    "num_layers": {"num_layers": 6},
    "encoder_layers": {"encoder_layers": 5},
    "hidden_size": {"hidden_size": 48},
    "num_attention_heads": {"num_attention_heads": 2},
    "encoder_attention_heads": {"encoder_attention_heads": 2},
    "num_query_groups": {"num_query_groups": 2},
    "head_dim": {"head_dim": 12},
    "ffn_hidden_size": {"ffn_hidden_size": 40},
    "encoder_ffn_hidden_size": {"encoder_ffn_hidden_size": 40},
    "vocab_size": {"vocab_size": 90},
    "vocab_multiple": {"vocab_multiple": 8},
    "max_position_embeddings": {"max_position_embeddings": 20},
    "max_source_positions": {"max_source_positions": 15},
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
    "global_first": {**WINDOWS, "global_first": 1},
    "rotary_base_local": {**WINDOWS, "rotary_base_local": 50},
    "tie_embeddings": {"tie_embeddings": False},
    "share_embeddings": {"share_embeddings": False},
    "token_types": {"token_types": 2},
    "embedding_norm": {"embedding_norm": True},
    "first_norm": {"embedding_norm": True, "first_norm": False},
    "plain_head": {"plain_head": True},
    "image.height": {"image": {"height": 12}},
    "image.width": {"image": {"width": 6}},
    "image.channels": {"image": {"channels": 3}},
    "image.patch": {"image": {"patch": 1}},
    "image.pool": {"image": {"pool": "mean"}},
    "attention.qk_norm": {"attention": {"qk_norm": True}},
    "attention.soft_cap": {"attention": {"soft_cap": 0.5}},
    "attention.qkv_bias": {"bias": False, "attention": {"qkv_bias": True}},
    "logit_soft_cap": {"logit_soft_cap": 2.0},
    "bias": {"bias": False},
    "logit_bias": {"logit_bias": True, "plain_head": True},
    "scheme_options": {"scheme": "deepscalelm_pre_ln", "scheme_options": {"k": 4.0}},
    "transfer.method": {"transfer": COMPLETEP},
    "transfer.base_layers": {"transfer": COMPLETEP},
    "transfer.base_encoder_layers": {"transfer": {**COMPLETEP, "base_encoder_layers": 1}},
    "transfer.base_hidden": {"transfer": {**COMPLETEP, "base_hidden": 16}},
    "transfer.base_head_dim": {"transfer": {**COMPLETEP, "base_head_dim": 4}},
    "transfer.alpha": {"transfer": {**COMPLETEP, "alpha": 0.5}},
}
"""Field -> what is set. Settings that a family does not have are left out for it."""
INSTEAD: dict[tuple[str, str], dict[str, Any]] = {
    ("vit", "position"): {"position": "none"},
    ("vit", "tie_embeddings"): {"tie_embeddings": True},
}
"""The same for one family alone."""

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
    "image.zero_head": "initial weights",
    "image.patch_correlation": "initial weights",
}
"""Field -> why its value is nothing to who computes a trained model."""

REFUSED = {
    ("gpt", "transfer.base_encoder_layers"),
    ("bert", "transfer.base_encoder_layers"),
    *(
        ("seq2seq", name)
        for name in ("num_query_groups", *(s for s in SETTINGS if s.startswith("attention.")))
    ),
    *(
        ("vit", name)
        for name in SETTINGS
        if name.startswith(("rotary", "transfer.")) or name in ("max_position_embeddings", "tie_embeddings")
    ),
}
"""Families and settings that they refuse, each in a line of its own (tests of `ModelConfig`)."""
TESTED = [family for family in FAMILIES.values() if family.inputs != "frames"]
CASES = [
    (family, path)
    for path in SETTINGS
    for family in TESTED
    if (path.partition(".")[0] not in OWN_SETTINGS or path.partition(".")[0] in family.settings)
    and (family.name, path) not in REFUSED
]


def fields(section: type[Strict], prefix: str = "") -> Iterator[str]:
    """Names of all settings, those of sections with their section's."""
    for name, field in section.model_fields.items():
        kinds = get_args(field.annotation) or (field.annotation,)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Strict)]
        if sections:
            yield from fields(sections[0], f"{prefix}{name}.")
        else:
            yield prefix + name


def takes(family: Family, name: str) -> bool:
    """Whether models of a family have a setting."""
    return name not in OWN_SETTINGS or name in family.settings


def config_of(family: Family, changes: dict[str, Any]) -> ModelConfig:
    values: dict[str, Any] = {"family": family.name, "num_layers": 4, **OWN_BASE.get(family.name, {})}
    for name, value in changes.items():
        if takes(family, name):
            values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return make_config(**values)


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


def asked(config: ModelConfig) -> Inputs:
    """Padded where the family knows padding; as long as its learned positions reach."""
    return proof_inputs(config, config.max_position_embeddings or 16, None, config.max_source_positions)


def batch_of(config: ModelConfig, inputs: Inputs) -> dict[str, Tensor]:
    """What the training gives the model for the same."""
    if inputs.images:
        return {"images": inputs.tokens.double()}
    given = {
        "tokens": inputs.tokens,
        "token_types": inputs.types,
        "documents": inputs.keep,
        "source": inputs.source,
        "source_documents": inputs.source_keep,
    }
    return {name: value for name, value in given.items() if value is not None}


def trained(config: ModelConfig, weights: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Logits of the model that is trained."""
    single_process()
    core = transformer_config(config, dtype=torch.float64)
    length = POSITIONS if config.image is None else config.image.tokens
    source = POSITIONS if config.blueprint.crossed else None
    chunk = LanguageModel(config, core, seq_length=length, source_length=source).double().eval()
    if config.position == "rotary":  # Megatron-core's angles are in fp32
        chunk.angles.bases[0].inv_freq = frequencies(config, dtype=torch.float64)
    if config.rotary_base_local is not None:
        chunk.angles.bases[1].inv_freq = frequencies(config, local=True, dtype=torch.float64)
    with torch.no_grad():
        for named in named_parameters(chunk, 0, 1):
            named.parameter.copy_(weights[named.name])
        logits: Tensor = chunk(batch_of(config, inputs))[..., : config.vocab_size]
    return logits[:, 0] if inputs.images else inputs.seen(logits)


def exported(config: ModelConfig, weights: dict[str, Tensor], inputs: Inputs) -> Tensor:
    """Logits of our own class of transformers, with the settings that an export writes."""
    own = config.max_position_embeddings if config.image is None else config.image.tokens
    scale, lengths = logit_scale(config), (own or POSITIONS, POSITIONS)
    special: dict[str, Any] = dict.fromkeys((*SPECIAL, START) if config.blueprint.crossed else SPECIAL)
    if inputs.images:
        special["id2label"] = {str(number): str(number) for number in range(config.vocab_size or 0)}
    plan = fold("fathom", config, scale)
    settings = write_config(
        "fathom",
        config,
        plan,
        positions=lengths[0],
        logit_scale=scale,
        dtype="float64",
        special=special,
    )
    (name,) = cast(list[str], settings["architectures"])
    file = next(file for file in OWN_CODE if hasattr(file, name))
    model = getattr(file, name)(FathomConfig(**cast(dict[str, Any], settings))).double().eval()
    state: dict[str, Tensor] = {}
    for entry in entries("fathom", config, *lengths):
        exact = weights[entry.canonical] * plan.factors.get(entry.canonical, 1.0)
        state |= dict(zip(entry.hf, entry.conversion.to_hf(exact, config), strict=True))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= set(model._tied_weights_keys or ())
    given = {"pixel_values": inputs.tokens.double()} if inputs.images else inputs.arguments()
    with torch.no_grad():
        return inputs.seen(model(**given).logits)


def weights_of(config: ModelConfig) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in make_weights(config).items()}


def table_of(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    rows = parameter_table(config, positions=POSITIONS, source_positions=POSITIONS)
    return [(row.name, row.shape) for row in rows]


def test_every_setting_is_here() -> None:
    elsewhere = {name for name in OWN_SETTINGS if not any(takes(family, name) for family in TESTED)}
    known = {name for name in fields(ModelConfig) if name.partition(".")[0] not in elsewhere}
    unknown = known - set(SETTINGS) - set(NOT_COMPUTED)
    assert not unknown, f"{sorted(unknown)}: give each an entry in SETTINGS or NOT_COMPUTED"
    assert not set(SETTINGS) & set(NOT_COMPUTED)
    assert not (set(SETTINGS) | set(NOT_COMPUTED)) - known, "no such setting"


@pytest.mark.parametrize(("family", "path"), sorted(REFUSED))
def test_what_is_left_out_is_refused(family: str, path: str) -> None:
    with pytest.raises(ValidationError, match=rf"model\.(family={family}|image)"):
        config_of(FAMILIES[family], INSTEAD.get((family, path), SETTINGS[path]))


@pytest.mark.parametrize(
    ("family", "path"), CASES, ids=lambda value: value if isinstance(value, str) else value.name
)
def test_all_who_compute_a_model_know_it(family: Family, path: str) -> None:
    changes = INSTEAD.get((family.name, path), SETTINGS[path])
    config, plain = config_of(family, changes), without(family, path, changes)
    assert config != plain
    weights, inputs = weights_of(config), asked(config)
    ours = trained(config, weights, inputs)
    if table_of(config) == table_of(plain):  # else it changes the model without a doubt
        other = asked(plain)
        assert other.tokens.shape != inputs.tokens.shape or not torch.allclose(
            ours, trained(plain, weights, inputs), rtol=0, atol=1e-6
        )
    reference = inputs.ask(evaluation(weights, config, logit_scale=logit_scale(config), dtype=torch.float64))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    # Its rotary angles are in fp32.
    tolerance = 1e-4 if config.position == "rotary" else 1e-10
    theirs = exported(config, weights, inputs)
    torch.testing.assert_close(theirs, reference, rtol=tolerance, atol=tolerance)
