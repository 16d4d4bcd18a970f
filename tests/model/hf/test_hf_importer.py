"""Reading Hugging Face models: bit-exact both ways, or refused with the reason."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    EuroBertConfig,
    EuroBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.hf.export import export
from model.hf.importer import import_model
from model.hf.proof import proof_inputs
from model.hf.reference import Evaluation
from tests.model.hf.foreign import BERT, GPT2, LLAMA, MODERNBERT, OPT, save
from tests.model.hf.tiny import LOGIT_SCALE, POSITIONS, export_tiny, make_config, make_weights, reference


def check(model: PreTrainedModel, folder: Path, tmp_path: Path) -> Any:
    """Logits equal, and the way back gives the very tensors of the source."""
    imported = import_model(folder, vocab_multiple=16)
    inputs = proof_inputs(imported.config, 16)
    weights = dict(imported.weights)
    with torch.no_grad():
        theirs = inputs.seen(model(**inputs.arguments()).logits)
    for ours in (
        Evaluation(weights, imported.config, logit_scale=imported.logit_scale),
        reference(imported.config, weights, imported.logit_scale),
    ):
        torch.testing.assert_close(inputs.ask(ours)[..., :101], theirs, rtol=1e-5, atol=1e-5)
    assert weights["embedding.word_embeddings.weight"].shape == (112, 32)
    assert not weights["embedding.word_embeddings.weight"][101:].any()
    export(
        imported.weights,
        imported.config,
        tmp_path / "back",
        logit_scale=imported.logit_scale,
        tokenizer=None,
        seq_length=imported.positions,
    )
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "back/model.safetensors")
    assert before.keys() - set(imported.left_out) == after.keys()
    if imported.layout == "opt":  # the two rows that belong to no position
        before["model.decoder.embed_positions.weight"][:2] = 0
    assert all(torch.equal(before[name], after[name]) for name in after)
    return imported


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_gpt2(tmp_path: Path, tied: bool, activation: str) -> None:
    model = save(
        GPT2LMHeadModel(
            GPT2Config(**{**GPT2, "activation_function": activation, "tie_word_embeddings": tied})
        ),
        tmp_path / "source",
    )
    imported = check(model, tmp_path / "source", tmp_path)
    assert (imported.config.scheme, imported.config.hidden_dropout) == ("pre_ln", 0.1)


def test_gpt2_as_openai_configured_it(tmp_path: Path) -> None:
    """Only sizes are given: everything else is what `GPT2Config` says.

    The tanh approximation of GELU is part of it.
    """
    model = save(
        GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=24, n_embd=32, n_layer=2, n_head=4)),
        tmp_path / "source",
    )
    imported = check(model, tmp_path / "source", tmp_path)
    assert (imported.config.activation, imported.config.tie_embeddings) == ("gelu_tanh", True)
    assert json.loads((tmp_path / "back/config.json").read_text())["activation_function"] == "gelu_new"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
)
def test_llama(tmp_path: Path, settings: dict[str, Any]) -> None:
    imported = check(
        save(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings})), tmp_path / "source"),
        tmp_path / "source",
        tmp_path,
    )
    assert imported.config.rotary_base == (500000 if "head_dim" in settings else 10000)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "beta_fast": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 20,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        LLAMA3,
        YARN,
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False},
    ],
)
def test_scaled_rotary_embeddings(tmp_path: Path, rope: dict[str, Any]) -> None:
    settings = {**LLAMA, "head_dim": 16, "rope_parameters": {**rope, "rope_theta": 500.0}}
    model = save(LlamaForCausalLM(LlamaConfig(**settings)), tmp_path / "source")
    config = check(model, tmp_path / "source", tmp_path).config
    assert (config.rotary.scaling, config.rotary.factor) == (rope["rope_type"], rope["factor"])
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["rope_parameters"].items() >= {key: rope[key] for key in rope if "mscale" not in key}.items()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation_function": "gelu_new", "tie_word_embeddings": False, "enable_bias": False},
    ],
)
def test_opt_with_norms_after_the_sublayers(tmp_path: Path, settings: dict[str, Any]) -> None:
    imported = check(
        save(OPTForCausalLM(OPTConfig(**{**OPT, **settings})), tmp_path / "source"),
        tmp_path / "source",
        tmp_path,
    )
    assert (imported.config.scheme, imported.config.norm_epsilon) == ("post_ln", 1e-5)
    assert imported.config.activation == ("gelu_tanh" if settings else "relu")
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "opt"


def test_a_post_ln_export_comes_back_as_opt_bit_by_bit(tmp_path: Path) -> None:
    config = make_config("post_ln", init={"base": "normal"}, max_position_embeddings=POSITIONS)
    weights = make_weights(config)
    weights["embedding.word_embeddings.weight"][101:] = 0
    export_tiny(weights, config, tmp_path / "out", logit_scale=1.0, architecture="opt")
    imported = import_model(tmp_path / "out", vocab_multiple=16)
    assert imported.config.model_dump(exclude={"num_query_groups", "head_dim"}) == config.model_dump(
        exclude={"num_query_groups", "head_dim"}
    )
    assert set(imported.weights) == set(weights)
    assert all(torch.equal(imported.weights[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_bert(tmp_path: Path, activation: str) -> None:
    """As Google trained it, with a second task whose weights have no place."""
    config = BertConfig(**BERT, hidden_act=activation)
    model = save(BertForPreTraining(config), tmp_path / "source")
    plain = BertForMaskedLM.from_pretrained(tmp_path / "source").eval()
    imported = check(plain, tmp_path / "source", tmp_path)
    assert imported.config.norm_epsilon == model.config.layer_norm_eps == 1e-12
    assert (imported.config.scheme, imported.config.hidden_dropout) == ("post_ln", 0.1)
    assert imported.left_out == (
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
    )


def test_bert_in_old_files(tmp_path: Path) -> None:
    """Gains and biases of norms were called gamma and beta, and tied tensors were stored."""
    model = save(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "source")
    path = tmp_path / "source/model.safetensors"
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(path).items()
    }
    tensors |= {
        "bert.embeddings.position_ids": torch.arange(24)[None],
        "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone(),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    imported = import_model(tmp_path / "source")
    inputs = proof_inputs(imported.config, 16)
    with torch.no_grad():
        theirs = inputs.seen(model(**inputs.arguments()).logits)
    ours = inputs.ask(Evaluation(imported.weights, imported.config, logit_scale=1.0))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_megatron_bert(tmp_path: Path) -> None:
    model = MegatronBertForMaskedLM(MegatronBertConfig(**BERT))
    imported = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path)
    assert (imported.config.scheme, imported.config.token_types) == ("pre_ln", 2)
    assert not imported.left_out


@pytest.mark.parametrize("bias", [False, True])
def test_eurobert(tmp_path: Path, bias: bool) -> None:
    sizes = {**LLAMA, "num_key_value_heads": 2, "pad_token_id": None, "tie_word_embeddings": not bias}
    model = EuroBertForMaskedLM(EuroBertConfig(**sizes, attention_bias=bias, mlp_bias=bias))
    imported = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path)
    assert (imported.config.family, imported.config.plain_head) == ("bert", True)
    assert imported.config.logit_bias is bias


@pytest.mark.parametrize("bias", [False, True])
def test_modernbert(tmp_path: Path, bias: bool) -> None:
    given = {"norm_bias": True, "attention_bias": bias, "mlp_bias": bias, "classifier_bias": bias}
    model = ModernBertForMaskedLM(ModernBertConfig(**MODERNBERT, **given))
    config = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path).config
    assert (config.window, config.global_every) == (3, 3)
    assert (config.rotary_base, config.rotary_base_local) == (160000, 10000)
    assert (config.first_norm, config.embedding_norm, config.bias) == (False, True, bias)


def test_a_modernbert_without_biases_in_its_norms_gets_zeros(tmp_path: Path) -> None:
    """As the published ones. All its tensors come back; the biases beside them are zero."""
    model = save(ModernBertForMaskedLM(ModernBertConfig(**MODERNBERT)), tmp_path / "source")
    imported = import_model(tmp_path / "source", vocab_multiple=16)
    inputs = proof_inputs(imported.config, 16)
    with torch.no_grad():
        theirs = inputs.seen(model(**inputs.arguments()).logits)
    ours = Evaluation(dict(imported.weights), imported.config, logit_scale=1.0)
    torch.testing.assert_close(inputs.ask(ours), theirs, rtol=1e-5, atol=1e-5)
    export(
        imported.weights,
        imported.config,
        tmp_path / "back",
        logit_scale=1.0,
        tokenizer=None,
        seq_length=imported.positions,
    )
    before, after = (load_file(tmp_path / part / "model.safetensors") for part in ("source", "back"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    more = after.keys() - before.keys()
    assert len(more) == 2 * 4 - 1 + 3
    assert all(name.endswith("norm.bias") and not after[name].any() for name in more)


def test_a_bert_without_a_head_is_refused(tmp_path: Path) -> None:
    save(BertModel(BertConfig(**BERT)), tmp_path / "source")
    with pytest.raises(UserError, match="have no head of a masked language model"):
        import_model(tmp_path / "source")


def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    model = save(
        MistralForCausalLM(MistralConfig(**{**LLAMA, "num_key_value_heads": 2, "sliding_window": None})),
        tmp_path / "source",
    )
    check(model, tmp_path / "source", tmp_path)


def test_mistral_with_a_window(tmp_path: Path) -> None:
    model = save(
        MistralForCausalLM(MistralConfig(**{**LLAMA, "num_key_value_heads": 2, "sliding_window": 5})),
        tmp_path / "source",
    )
    imported = check(model, tmp_path / "source", tmp_path)
    assert (imported.layout, imported.config.window) == ("mistral", 4)
    settings = json.loads((tmp_path / "back/config.json").read_text())
    assert (settings["architectures"], settings["sliding_window"]) == (["MistralForCausalLM"], 5)


@pytest.mark.parametrize("rope", [{}, LLAMA3])
def test_qwen2(tmp_path: Path, rope: dict[str, Any]) -> None:
    given: dict[str, Any] = {"num_key_value_heads": 2, "tie_word_embeddings": not rope}
    given["rope_parameters"] = {"rope_theta": 1000000.0, "rope_type": "default", **rope}
    model = save(Qwen2ForCausalLM(Qwen2Config(**{**LLAMA, **given})), tmp_path / "source")
    config = check(model, tmp_path / "source", tmp_path).config
    assert (config.bias, config.attention.qkv_bias, config.rotary_base) == (False, True, 1000000)
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["architectures"] == ["Qwen2ForCausalLM"]


def test_qwen3(tmp_path: Path) -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, "num_key_value_heads": 2, "head_dim": 12}))
    config = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path).config
    assert (config.attention.qk_norm, config.kv_channels) == (True, 12)
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert back["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["sliding_attention"] * 3, (4, None, 0)),
        (["full_attention", "sliding_attention", "full_attention"], (4, 2, 0)),
        (["sliding_attention", "full_attention", "sliding_attention"], (4, 2, 1)),
        (["sliding_attention", "sliding_attention", "full_attention"], (4, 3, 2)),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen_with_windows(tmp_path: Path, family: str, kinds: list[str], expected: Any) -> None:
    given = {**LLAMA, "num_key_value_heads": 2, "layer_types": kinds, "sliding_window": 5}
    given |= {"use_sliding_window": True, "max_window_layers": 0}
    model = (
        Qwen2ForCausalLM(Qwen2Config(**given))
        if family == "qwen2"
        else Qwen3ForCausalLM(Qwen3Config(**given, head_dim=8))
    )
    imported = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path)
    config = imported.config
    assert (imported.layout, (config.window, config.global_every, config.global_first)) == (family, expected)
    back = json.loads((tmp_path / "back/config.json").read_text())
    assert (back["architectures"], back["layer_types"]) == ([type(model).__name__], kinds)


@pytest.mark.parametrize("tied", [False, True])
def test_gpt_neox_with_one_sublayer_after_the_other(tmp_path: Path, tied: bool) -> None:
    sizes = {**LLAMA, "num_attention_heads": 2, "tie_word_embeddings": tied}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, use_parallel_residual=False))
    config = check(save(model, tmp_path / "source"), tmp_path / "source", tmp_path).config
    assert (config.rotary.share, config.rotary_width) == (0.25, 4)


def test_a_depth_scheme_with_norms_of_queries_and_keys_is_exported_as_qwen3(tmp_path: Path) -> None:
    """The factor that transfer puts on scores goes into the norm of the queries."""
    transfer = {"method": "completep", "base_hidden": 16, "base_head_dim": 4}
    llama = {"normalization": "rmsnorm", "activation": "swiglu", "position": "rotary", "bias": False}
    config = make_config(
        "layernorm_scaling", **llama, attention={"qk_norm": True}, transfer=transfer, num_query_groups=2
    )
    weights = make_weights(config)
    result = export_tiny(weights, config, tmp_path / "out")
    assert result.architecture == "qwen3"


def test_old_files_in_shards_without_prefix_and_with_masks(tmp_path: Path) -> None:
    """The Hub's GPT-2 has no `transformer.` in its names and carries the causal mask.

    Several files have an index.
    """
    folder = tmp_path / "source"
    save(GPT2LMHeadModel(GPT2Config(**GPT2)), folder)
    plain = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {name.removeprefix("transformer."): tensor for name, tensor in plain.items()} | {
        "h.0.attn.bias": torch.ones(1, 1, 24, 24),
        "h.0.attn.masked_bias": torch.ones(()),
    }
    places: dict[str, str] = {}
    for number, names in enumerate((sorted(old)[::2], sorted(old)[1::2])):
        save_file({name: old[name].contiguous() for name in names}, folder / f"part{number}.safetensors")
        places |= dict.fromkeys(names, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    weights = import_model(folder).weights
    assert torch.equal(
        weights["decoder.layers.1.mlp.linear_fc2.weight"], plain["transformer.h.1.mlp.c_proj.weight"].T
    )
    (folder / "part1.safetensors").unlink()
    with pytest.raises(UserError, match=r"part1.safetensors is missing"):
        import_model(folder)


@pytest.mark.parametrize(("scheme", "number"), list(itertools.product(SCHEMES, range(3))))
def test_our_exports_come_back_bit_by_bit(tmp_path: Path, scheme: str, number: int) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {
            "num_query_groups": 2,
            "normalization": "rmsnorm",
            "position": "rotary",
            "activation": "swiglu",
            "bias": False,
            "tie_embeddings": False,
        },
        {"family": "bert", "token_types": 2, "embedding_norm": True},
    ]
    config = make_config(
        scheme, **kinds[number], scheme_options={"rescale": False} if scheme == "b2t" else {}
    )
    weights = make_weights(config)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "head.bias"):
        if name in weights:
            weights[name][101:] = 0
    export_tiny(weights, config, tmp_path / "out", architecture="fathom")
    imported = import_model(tmp_path / "out")
    assert imported.config == config
    assert (imported.logit_scale, imported.positions) == (LOGIT_SCALE, POSITIONS)
    assert set(imported.weights) == set(weights)
    assert all(torch.equal(imported.weights[name], tensor) for name, tensor in weights.items())
