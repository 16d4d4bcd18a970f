"""Exports of every scheme against the references, and everything the exporter refuses."""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.hf.folding.pre_ln import fold
from model.hf.mapping import entries
from model.hf.proof import ProofError
from model.hf.result import Export
from model.hf.weight_files import parse_size, write_weights
from tests.model.hf.tiny import (
    POSITIONS,
    export_tiny,
    make_config,
    make_tokens,
    make_weights,
    reference,
)

KINDS = list(itertools.product((4, 2), ("layernorm", "rmsnorm"), ("learned", "rotary"), (True, False)))
# Every pair of values meets in these, with the activations spread over them.
PAIRS = [
    (4, "layernorm", "learned", True),
    (4, "rmsnorm", "rotary", False),
    (2, "layernorm", "rotary", False),
    (2, "rmsnorm", "learned", True),
    (2, "rmsnorm", "rotary", True),
]
FOLDS_INTO_LLAMA = {
    "normalization": "rmsnorm",
    "position": "rotary",
    "activation": "swiglu",
    "bias": False,
    "num_query_groups": 2,
}
ACTIVATIONS = ("gelu", "swiglu", "relu2", "geglu", "silu", "gelu_tanh")


def run(tmp_path: Path, config: Any, weights: dict[str, Tensor], **given: Any) -> Export:
    return export_tiny(weights, config, tmp_path / "out", **given)


def check_scheme(tmp_path: Path, scheme: str, kind: tuple[int, str, str, bool], number: int) -> None:
    groups, normalization, position, tied = kind
    config = make_config(
        scheme, num_query_groups=groups, normalization=normalization, position=position, tie_embeddings=tied,
        activation=ACTIVATIONS[number % 6], bias=number % 3 != 0,
        **({"rotary_base": 500} if position == "rotary" else {}),
        hidden_dropout=0.1, attention_dropout=0.1,
    )  # fmt: skip
    weights = make_weights(config)
    for architecture in ("auto", "fathom"):
        result = run(
            tmp_path,
            config,
            weights,
            architecture=architecture,
            prove_with=reference(config, weights),
            overwrite=True,
        )
        assert result.proof.difference <= (1e-5 if result.proof.epsilon_effect == 0 else 1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 101
    assert load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight"].shape == (101, 32)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_over_pairs_of_kinds(tmp_path: Path, scheme: str) -> None:
    for number, kind in enumerate(PAIRS):
        check_scheme(tmp_path, scheme, kind, number)


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "number"), list(itertools.product(SCHEMES, range(len(KINDS)))))
def test_every_scheme_in_every_kind(tmp_path: Path, scheme: str, number: int) -> None:
    check_scheme(tmp_path, scheme, KINDS[number], number)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2", "silu"])
@pytest.mark.parametrize(("bias", "tied"), [(True, True), (False, False)])
def test_gpt2_has_the_activations_biases_and_ties_it_says(
    tmp_path: Path, activation: str, bias: bool, tied: bool
) -> None:
    config = make_config("pre_ln", activation=activation, bias=bias, tie_embeddings=tied)
    weights = make_weights(config)
    result = run(tmp_path, config, weights, prove_with=reference(config, weights))
    assert result.architecture == "gpt2"
    assert ("lm_head.weight" in load_file(tmp_path / "out/model.safetensors")) is not tied


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize(("bias", "groups"), [(True, 4), (False, 2)])
def test_llama_has_the_activations_biases_and_groups_it_says(
    tmp_path: Path, activation: str, bias: bool, groups: int
) -> None:
    config = make_config(
        "pre_ln",
        activation=activation,
        bias=bias,
        num_query_groups=groups,
        head_dim=12,
        normalization="rmsnorm",
        position="rotary",
    )
    weights = make_weights(config)
    assert run(tmp_path, config, weights, prove_with=reference(config, weights)).architecture == "llama"


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
@pytest.mark.parametrize(("bias", "tied"), [(True, True), (False, False)])
def test_opt_has_the_activations_biases_and_ties_it_says(
    tmp_path: Path, activation: str, bias: bool, tied: bool
) -> None:
    config = make_config("deepnorm", activation=activation, bias=bias, tie_embeddings=tied, norm_epsilon=1e-6)
    weights = make_weights(config)
    result = run(tmp_path, config, weights, prove_with=reference(config, weights))
    assert (result.architecture, result.epsilon, result.proof.epsilon_effect) == ("opt", 1e-5, 0)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert ("model.decoder.layers.0.fc1.bias" in tensors) is bias
    assert "trust_remote_code" not in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("scheme", "options", "place"),
    [("deepscalelm_post_ln", {}, "first"), ("mix_ln", {"post_fraction": 1.0}, "last")],
)
def test_a_norm_around_a_post_ln_stack_is_a_layer_without_branches(
    tmp_path: Path, scheme: str, options: dict[str, float], place: str
) -> None:
    config = make_config(scheme, scheme_options=options)
    weights = make_weights(config)
    result = run(tmp_path, config, weights, prove_with=reference(config, weights))
    assert (result.architecture, result.proof.tolerance) == ("opt", 1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 6
    assert f"The {place} layer is one more than in pretraining" in (tmp_path / "out/README.md").read_text()
    tensors = load_file(tmp_path / "out/model.safetensors")
    extra = {"first": 0, "last": 5}[place]
    for layer in range(6):
        assert bool(tensors[f"model.decoder.layers.{layer}.fc2.weight"].any()) is (layer != extra)
        assert bool(tensors[f"model.decoder.layers.{layer}.self_attn.out_proj.bias"].any()) is (
            layer != extra
        )


@pytest.mark.parametrize("damage", ["coefficient", "reference", "nan"])
def test_a_failing_proof_leaves_nothing(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("b2t")
    weights = make_weights(config)
    prove_with = reference(config, weights)
    if damage == "coefficient":
        from model.hf.settings import write_fathom as write

        honest = write.depth_plan
        monkeypatch.setattr(
            write,
            "depth_plan",
            lambda plan: [{**run, "mlp": {**run["mlp"], "skip_scale": 0.999}} for run in honest(plan)],
        )
    elif damage == "reference":
        right, prove_with = prove_with, lambda tokens: 1.001 * right(tokens)
    else:
        weights["decoder.layers.2.mlp.linear_fc2.weight"][0, 0] = float("nan")
    with pytest.raises(
        UserError,
        match=r"not finite" if damage == "nan" else r"largest logit difference \d.*e-0\d.*allowed 1.*e-05",
    ):
        run(tmp_path, config, weights, prove_with=prove_with)
    assert list(tmp_path.iterdir()) == []


def test_the_proof_finds_a_wrong_mapping_below_the_epsilon_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fold of DeepScaleLM moves logits by some 1e-5.

    An error of that size elsewhere must not hide behind it.
    """
    from model.hf import weight_files

    config = make_config("deepscalelm_pre_ln")
    weights = make_weights(config)
    assert 2e-5 < run(tmp_path, config, weights).proof.epsilon_effect < 1e-4
    honest = weight_files.hf_tensors
    monkeypatch.setattr(
        weight_files,
        "hf_tensors",
        lambda entry, *rest: {
            n: t * (1 + 5e-5 * (entry.canonical == "decoder.final_layernorm.weight"))
            for n, t in honest(entry, *rest).items()
        },
    )
    with pytest.raises(ProofError, match="gpt2 model does not compute this model"):
        run(tmp_path, config, weights, overwrite=True)


def test_auto_takes_fathom_where_one_epsilon_is_too_coarse(tmp_path: Path) -> None:
    config = make_config("deepscalelm_pre_ln", norm_epsilon=1e-2)
    weights = make_weights(config)
    with pytest.raises(
        UserError, match=r"--architecture gpt2 .* one epsilon for all norms.*standard deviations"
    ):
        run(tmp_path, config, weights, architecture="gpt2")
    assert list(tmp_path.iterdir()) == []
    result = run(tmp_path, config, weights, prove_with=reference(config, weights))
    assert result.architecture == "fathom"
    assert "one epsilon for all norms" in result.skipped[0]
    assert result.proof.difference <= 1e-5
    assert result.skipped[0] in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("architecture", "model", "reason"),
    [
        ("gpt2", {"scheme": "b2t"}, "no norm after the last layer"),
        ("gpt2", {"scheme": "peri_ln"}, "a norm after the embedding"),
        ("gpt2", {"scheme": "mix_ln"}, "attention sublayer of layer 1 has no norm before its branch"),
        ("gpt2", {"normalization": "rmsnorm"}, "the model RMSNorm"),
        ("gpt2", {"position": "rotary"}, "the model rotary"),
        ("gpt2", {"activation": "swiglu"}, "no swiglu"),
        ("gpt2", {"num_query_groups": 2}, "no grouped-query attention"),
        ("gpt2", {"head_dim": 16}, "head_dim=16"),
        ("llama", {}, "the model LayerNorm"),
        ("llama", {"normalization": "rmsnorm"}, "the model learned"),
        ("llama", {"normalization": "rmsnorm", "position": "rotary"}, "activation is gelu"),
        (
            "llama",
            {
                "normalization": "rmsnorm",
                "position": "rotary",
                "activation": "swiglu",
                "hidden_size": 30,
                "head_dim": 8,
            },
            "divisible",
        ),
        ("opt", {}, "attention sublayer of layer 1 has a norm before its branch"),
        ("opt", {"scheme": "b2t"}, "adds the layer's input a second time"),
        ("opt", {"scheme": "post_ln", "normalization": "rmsnorm"}, "the model RMSNorm"),
        ("opt", {"scheme": "post_ln", "position": "none"}, "the model none"),
        ("opt", {"scheme": "post_ln", "activation": "geglu"}, "no geglu"),
        ("opt", {"scheme": "post_ln", "num_query_groups": 2}, "no grouped-query attention"),
        ("opt", {"scheme": "post_ln", "head_dim": 16}, "head_dim=16"),
        (
            "roberta",
            {},
            "choose auto or one of gpt2, llama, mistral, qwen2, qwen3, gpt_neox, gemma2, gemma3_text, opt, "
            "gemma, fathom",
        ),
    ],
)
def test_an_inexact_architecture_is_refused_with_the_reason(
    tmp_path: Path, architecture: str, model: dict[str, Any], reason: str
) -> None:
    config = make_config(**model)
    with pytest.raises(UserError, match=reason):
        run(tmp_path, config, make_weights(config), architecture=architecture)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    config, name = make_config(), "decoder.layers.3.mlp.linear_fc1.weight"
    weights = make_weights(config)
    for change, reason in (
        (lambda w: w.pop(name), "no tensor"),
        (lambda w: w.__setitem__(name, w[name][:, :-1]), "has shape"),
        (lambda w: w.__setitem__("decoder.layers.9.x", w[name]), "has no place for"),
    ):
        damaged = dict(weights)
        change(damaged)
        with pytest.raises(UserError, match=reason):
            run(tmp_path, config, damaged, prove_with=reference(config, weights))
    assert list(tmp_path.iterdir()) == []


def test_shards_have_the_size_asked_for_and_load(tmp_path: Path) -> None:
    config = make_config("b2t")
    result = run(tmp_path, config, make_weights(config), max_shard_size="30KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 4
    assert all(path.stat().st_size < 33_000 for path in shards)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert {tmp_path / "out" / name for name in index["weight_map"].values()} == set(shards)
    assert (
        index["metadata"]["total_size"]
        == 4 * result.parameters
        == sum(4 * t.numel() for path in shards for t in load_file(path).values())
    )


def test_converting_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    """One shard, and the tensor that is being converted.

    Bytes of tensors that are alive are measured on every read of a model stored in many shards.
    """
    config = make_config("b2t", num_layers=12, activation="swiglu")
    weights, alive, most = make_weights(config), [0], [0]
    entries_ = entries("fathom", config, POSITIONS)

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            return counted(super().__getitem__(name).clone())

    def counted(tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        alive[0] += size
        most[0] = max(most[0], alive[0])
        weakref.finalize(tensor.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - size))
        return tensor

    largest = max(tensor.nbytes for tensor in weights.values())
    total = sum(tensor.nbytes for tensor in weights.values())
    shard = 2 * largest
    write_weights(tmp_path, entries_, Lazy(weights), config, fold("fathom", config, 1.0), shard, 4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 10
    assert most[0] <= shard + largest < total / 5
    assert alive[0] == 0


def test_deepscalelm_folds_into_llama(tmp_path: Path) -> None:
    config = make_config("deepscalelm_pre_ln", norm_epsilon=1e-6, **FOLDS_INTO_LLAMA)
    weights = make_weights(config)
    result = run(tmp_path, config, weights, architecture="llama", prove_with=reference(config, weights))
    assert (result.architecture, result.folded) == ("llama", True)
    assert 0 < result.proof.epsilon_effect < 1e-4
    assert "trust_remote_code" not in (tmp_path / "out/README.md").read_text()
    assert not list((tmp_path / "out").glob("*.py"))


def test_bfloat16_is_rounded_after_the_proof(tmp_path: Path) -> None:
    config = make_config("b2t")
    weights = make_weights(config)
    exact = run(tmp_path, config, weights)
    full = load_file(tmp_path / "out/model.safetensors")
    rounded = run(tmp_path, config, weights, dtype="bfloat16", overwrite=True)
    assert rounded.proof == exact.proof
    assert 1e-4 < rounded.dtype_difference < 0.1
    stored = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(tensor, full[name].bfloat16()) for name, tensor in stored.items())
    from transformers import AutoConfig

    assert AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True).dtype == torch.bfloat16


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    config = make_config()
    weights = make_weights(config)
    weights["decoder.final_layernorm.weight"] *= 1e6
    with pytest.raises(UserError, match="transformer.ln_f.weight does not fit"):
        run(tmp_path, config, weights, dtype="float16")
    with pytest.raises(UserError, match="--dtype int8 is"):
        run(tmp_path, config, weights, dtype="int8")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_or_replaced_whole(tmp_path: Path) -> None:
    config, out = make_config(), tmp_path / "out"
    weights = make_weights(config)
    out.mkdir()
    (out / "precious.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else than an exported model"):
            run(tmp_path, config, weights, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="an exported model is there already.*--overwrite"):
        run(tmp_path, config, weights)
    run(tmp_path, config, weights, overwrite=True)
    assert not (out / "precious.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_at_the_target_meanwhile_is_kept(tmp_path: Path, overwrite: bool) -> None:
    config, out = make_config("b2t"), tmp_path / "out"
    weights = make_weights(config)
    honest = reference(config, weights)

    def prove_with(tokens: Tensor) -> Tensor:
        out.mkdir()
        (out / "thesis.tex").write_text("x")
        return honest(tokens)

    with pytest.raises(UserError, match="something else than an exported model"):
        run(tmp_path, config, weights, prove_with=prove_with, overwrite=overwrite)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == [
        "out",
        "out/thesis.tex",
    ]


@pytest.mark.parametrize("mask", [0o077, 0o002])
def test_modes_are_those_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
    config, before = make_config("b2t"), os.umask(mask)
    try:
        run(tmp_path, config, make_weights(config))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 6
    assert set(modes.values()) == {0o666 & ~mask}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    config = make_config("b2t")
    (tmp_path / "out").write_text("x")
    for place, reason in (("out", "is a file"), ("out/deeper", "cannot"), ("n" * 5000, "cannot be written")):
        with pytest.raises(UserError, match=reason) as refused:
            export_tiny(make_weights(config), config, tmp_path / place)
        assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_tells_where_the_model_comes_from(tmp_path: Path) -> None:
    config = make_config("b2t", scheme_options={"rescale": False})
    run(tmp_path, config, make_weights(config), provenance={"name": "deep", "step": 300, "commit": "abc|def"})
    card = (tmp_path / "out/README.md").read_text()
    for part in (
        "# deep",
        "`b2t`",
        "Takase",
        "| step | 300 |",
        "abc&#124;def",
        "rescale=False",
        "trust_remote_code=True",
        "FathomForCausalLM",
        "tags: [fathom, b2t]",
    ):
        assert part in card


def test_given_tokens_are_part_of_the_proof(tmp_path: Path) -> None:
    config = make_config()
    weights, seen = make_weights(config), []
    given = make_tokens(config, batch=3, length=10)

    def prove_with(tokens: Tensor) -> Tensor:
        seen.append(tokens)
        return reference(config, weights)(tokens)

    result = run(tmp_path, config, weights, prove_with=prove_with, prove_tokens=given)
    assert torch.equal(seen[0][:3], given)
    assert result.proof.tokens == 50


def test_the_cache_of_modelling_files_stays_clean(tmp_path: Path) -> None:
    import sys

    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    def copies() -> Iterator[str]:
        return (path.name for path in Path(HF_MODULES_CACHE, "transformers_modules").glob("*dot_out*"))

    assert os.environ["HF_MODULES_CACHE"] == HF_MODULES_CACHE, (
        "transformers was imported before tests/conftest.py: other processes write there too"
    )
    before = set(copies())
    config = make_config("b2t")
    run(tmp_path, config, make_weights(config))
    assert set(copies()) == before
    assert not [name for name in sys.modules if "dot_out" in name]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), (123, 123), ("10K", 10_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "5 potatoes", "0GB", "5", "0.0001KB", "9" * 400 + "GB", "\u0665GB"]
)
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size "):
        parse_size(text)
