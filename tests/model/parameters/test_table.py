"""The table of parameters against the models that are built, whole and cut."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.families.table import FAMILIES
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.parameters.shards import full_shape
from model.parameters.table import Cut, Role, Row, layer_rows, parameter_table
from model.stack import Stack
from parallel.config import ParallelConfig
from parallel.launch.one_process import single_process
from tests.distributed import Group, launch, rebuild

LENGTH, SOURCE = 16, 12
KINDS: list[dict[str, Any]] = [
    dict(kind)
    for kind in itertools.product(
        (("normalization", "layernorm"), ("normalization", "rmsnorm")),
        (("position", "learned"), ("position", "rotary"), ("position", "none")),
        (("tie_embeddings", True), ("tie_embeddings", False)),
        (("activation", "gelu"), ("activation", "swiglu")),
        (("num_query_groups", None), ("num_query_groups", 2)),
        (("bias", True), ("bias", False)),
    )
]
"""Every combination of what decides which parameters there are, beside the scheme."""


def config(scheme: str = "pre_ln", **changes: Any) -> ModelConfig:
    """4 layers, so that mix_ln has both kinds.

    Heads are wider than the stream, so that sizes differ.
    """
    sizes = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "head_dim": 6,
        "ffn_hidden_size": 40,
        "vocab_size": 100,
    }
    return ModelConfig.model_validate({"scheme": scheme, **sizes, **changes})


def table(model: ModelConfig) -> dict[str, Row]:
    rows = list(parameter_table(model, positions=LENGTH, source_positions=SOURCE))
    assert len({row.name for row in rows}) == len(rows)
    return {row.name: row for row in rows}


def build(model: ModelConfig, **parallel: Any) -> LanguageModel:
    sizes = transformer_config(model, **parallel)
    return LanguageModel(model, sizes, seq_length=LENGTH, source_length=SOURCE)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_built_model_has_exactly_these_parameters(scheme: str) -> None:
    """Each scheme with a tenth of the combinations, all combinations in all."""
    single_process()
    for kind in KINDS[list(SCHEMES).index(scheme) :: len(SCHEMES)]:
        model = config(scheme, **kind)
        built = {one.name: tuple(one.parameter.shape) for one in named_parameters(build(model), 0, 1)}
        assert {name: row.shape for name, row in table(model).items()} == built, kind


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_exactly_these_parameters(family: str) -> None:
    """With all that only some families have, in the order of the modules."""
    single_process()
    own: dict[str, Any] = {"token_types": 2, "embedding_norm": True, "logit_bias": True, "plain_head": True}
    own |= {"encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_hidden_size": 24}
    own |= {"max_source_positions": 9, "share_embeddings": False}
    own |= {"first_norm": False, "window": 3, "global_every": 2, "rotary_base_local": 9, "position": "rotary"}
    own |= {"global_first": 1, "speech": {"filters": 6, "channels": 4}}
    own |= {"image": {"height": 4, "width": 6, "patch": 2, "pool": "mean"}}
    settings = FAMILIES[family].settings
    least: dict[str, Any] = {"family": family}
    if "image" in settings:
        least |= {"image": {"height": 4, "patch": 2}, "tie_embeddings": False}
        own["position"] = "sinusoidal"
    if "speech" in settings:
        least |= {"speech": own["speech"]}
    chosen = {name: own[name] for name in (*settings, "position")}
    for kind in (least, {**least, **chosen}, {**least, "bias": False}):
        model = config(**kind)
        built = {one.name: tuple(one.parameter.shape) for one in named_parameters(build(model), 0, 1)}
        rows = table(model)
        assert {name: row.shape for name, row in rows.items()} == built, kind
        stacks = {stack.name for stack in FAMILIES[family].stacks}
        assert {row.stack for row in rows.values() if row.layer is not None} == stacks


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_with_cross_attention_has_exactly_these_parameters(scheme: str) -> None:
    single_process()
    stack = Stack(scheme, num_layers=4, hidden_size=16, num_attention_heads=4, head_dim=6, cross=True)
    for index, layer in enumerate(stack.layers):
        rows = layer_rows(stack.model_config, stack.plan.layers[index], index, cross=True)
        assert {f"{row.module}.{row.leaf}": row.shape for row in rows} == {
            name: tuple(parameter.shape) for name, parameter in layer.named_parameters()
        }


def cuts_of_a_rank(kinds: list[dict[str, Any]]) -> list[dict[str, tuple[Any, ...]]]:
    """Runs inside one of two tensor-parallel ranks.

    Of every parameter of each model: its local shape, and the dimension along which Megatron-core
    says that it is cut.
    """
    found = []
    for kind in kinds:
        model = config(**kind)
        topology = rebuild(ParallelConfig(tensor=2), model)
        chunk = build(model, **topology.core_fields())
        local: dict[str, tuple[Any, ...]] = {}
        for one in named_parameters(chunk, topology.tensor_rank, 2):
            parameter: Any = one.parameter
            cut = getattr(parameter, "tensor_model_parallel", False)
            local[one.name] = tuple(parameter.shape), parameter.partition_dim if cut else None
        found.append(local)
    return found


def test_two_tensor_parallel_ranks_hold_exactly_these_cuts() -> None:
    # Every scheme, and both values of each choice; which choices meet makes no difference to a cut.
    kinds = [{"scheme": scheme, **KINDS[7 * number]} for number, scheme in enumerate(SCHEMES)]
    kinds.append({"family": "bert", "token_types": 2, "embedding_norm": True})
    for rank, found in enumerate(launch(Group(2, cuts_of_a_rank, (kinds,)))[0]):
        for kind, local in zip(kinds, found, strict=True):
            rows = table(config(**kind))
            assert rows.keys() == local.keys()
            for name, (shape, dim) in local.items():
                row = rows[name]
                assert full_shape(shape, row.shard(rank, 2)) == row.shape, (name, kind)
                assert dim == (None if row.cut is None else row.cut.dim), (name, kind)


def test_what_a_row_says() -> None:
    rows = table(config("peri_ln", activation="swiglu", num_query_groups=2, tie_embeddings=False))
    bias = rows["decoder.layers.3.mlp.linear_fc1.bias"]
    assert (bias.role, bias.stack, bias.layer, bias.sublayer) == (Role.LINEAR_BIAS, "decoder", 3, "mlp")
    assert (bias.module, bias.leaf, bias.elements) == ("mlp.linear_fc1", "bias", 80)
    assert bias.cut == Cut(0, stride=2)
    qkv = rows["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert (qkv.role, qkv.cut, qkv.sublayer) == (Role.QKV, Cut(0), "attention")
    assert qkv.blocks is not None
    assert qkv.blocks.roles == ("q", "k", "v")
    norm = rows["decoder.layers.0.self_attention_branch_norm.weight"]
    assert (norm.role, norm.sublayer, norm.cut, norm.blocks) == (Role.NORM_GAIN, "attention", None, None)
    ends = {name: (row.role, row.stack) for name, row in rows.items() if row.layer is None}
    assert ends == {
        "embedding.word_embeddings.weight": (Role.WORD, "embedding"),
        "embedding.position_embeddings.weight": (Role.POSITION, "embedding"),
        "embedding.norm.weight": (Role.NORM_GAIN, "embedding"),
        "embedding.norm.bias": (Role.NORM_BIAS, "embedding"),
        "decoder.final_layernorm.weight": (Role.NORM_GAIN, "decoder"),
        "decoder.final_layernorm.bias": (Role.NORM_BIAS, "decoder"),
        "output_layer.weight": (Role.OUTPUT, "output"),
    }
    assert rows["embedding.norm.bias"].module == "embedding.norm"


def test_a_set_number_of_positions_comes_before_the_length_of_the_data() -> None:
    name = "embedding.position_embeddings.weight"
    assert table(config())[name].shape == (LENGTH, 16)
    assert table(config(max_position_embeddings=9))[name].shape == (9, 16)
