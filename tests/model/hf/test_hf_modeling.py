"""The modelling file that travels with an export, as transformers uses it.

Generation, caches, padding, training, saving.
"""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.hf.proof import forget
from model.hf.reference import generate
from model.hf.remote.configuration_fathom import FathomConfig
from tests.model.hf.tiny import (
    LOGIT_SCALE,
    export_tiny,
    make_config,
    make_tokens,
    make_weights,
    reference,
)

MODELS: dict[str, dict[str, Any]] = {
    "post_ln": {
        "num_query_groups": 2,
        "position": "rotary",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "tie_embeddings": False,
    },
    "b2t": {"num_query_groups": 2, "window": 3},
    "spannorm": {"position": "none"},
    "peri_ln": {
        "position": "rotary",
        "rotary": {"share": 0.5},
        "attention": {"soft_cap": 0.5, "qk_norm": True},
        "logit_soft_cap": 2.0,
    },
    "mix_ln": {
        "position": "rotary",
        "rotary": {"scaling": "yarn", "factor": 4.0, "original_positions": 20, "beta_fast": 3.0},
        "window": 4,
        "global_every": 2,
        "rotary_base_local": 50,
    },
    "keel": {"normalization": "rmsnorm"},
    "gpas": {
        "attention": {"qkv_bias": True},
        "bias": False,
        "num_query_groups": 2,
        "position": "rotary",
        "window": 4,
        "global_every": 2,
        "rotary_base_local": 50,
    },
    "subln": {"activation": "swiglu", "num_query_groups": 2},
    "hybridnorm": {"position": "rotary", "normalization": "rmsnorm", "num_query_groups": 2},
    "pre_ln": {},
    "deepscalelm_post_ln": {},
    "layernorm_scaling": {
        "position": "rotary",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "num_query_groups": 2,
    },
}


@pytest.fixture(params=MODELS)
def case(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[ModelConfig, dict[str, torch.Tensor], Path, Any]]:
    config = make_config(request.param, **MODELS[request.param])
    weights, folder = make_weights(config), tmp_path / "out"
    export_tiny(weights, config, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    yield config, weights, folder, model
    forget(model)


def test_greedy_generation_equals_ours_with_and_without_a_cache(case: Any) -> None:
    config, weights, _, model = case
    for prompt in ([7], [3, 1, 4, 1, 5]):
        ours = list(generate(weights, config, prompt, 12, temperature=0, logit_scale=LOGIT_SCALE))
        for use_cache in (True, False):
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                do_sample=False,
                use_cache=use_cache,
                pad_token_id=0,
            )
            assert out[0, len(prompt) :].tolist() == ours


def test_left_padding_changes_nothing(case: Any) -> None:
    config, _, _, model = case
    tokens = make_tokens(config, batch=2, length=6)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    batch = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for row, start in ((0, 3), (1, 0)):
        alone = model.generate(
            tokens[row : row + 1, start:], max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert batch[row, start:].tolist() == alone[0].tolist()


def test_left_padding_takes_no_positions_in_a_plain_pass(case: Any) -> None:
    config, _, _, model = case
    if model.config.model_type == "gpt2":
        pytest.skip("transformers' own class asks for position_ids")
    tokens = make_tokens(config, batch=2, length=6)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        batch = model(tokens, attention_mask=mask)
        torch.testing.assert_close(batch.logits[0, 3:], model(tokens[:1, 3:]).logits[0], rtol=0, atol=2e-5)
        following = make_tokens(config, batch=2, length=2, seed=5)
        whole = torch.cat([tokens, following], 1)
        longer = torch.cat([mask, torch.ones_like(following)], 1)
        continued = model(following, attention_mask=longer, past_key_values=batch.past_key_values)
        torch.testing.assert_close(
            continued.logits, model(whole, attention_mask=longer).logits[:, 6:], rtol=0, atol=2e-5
        )


def test_a_cache_of_fixed_length_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = make_config("b2t")
    export_tiny(make_weights(config), config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    with pytest.raises(
        ValueError, match="caches of fixed length .* are not supported; use the default cache"
    ):
        model(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 1, 2, 2))
    forget(model)


def test_beam_search_runs_on_the_cache(case: Any) -> None:
    config, _, _, model = case
    tokens = make_tokens(config, batch=1, length=4)
    with_cache, without = (
        model.generate(tokens, max_new_tokens=6, num_beams=3, do_sample=False, use_cache=c, pad_token_id=0)
        for c in (True, False)
    )
    assert with_cache.tolist() == without.tolist()


def test_continuing_from_a_given_cache_in_pieces(case: Any) -> None:
    config, _, _, model = case
    tokens, cache = make_tokens(config), None
    pieces: list[torch.Tensor] = []
    with torch.no_grad():
        whole = model(tokens).logits
        for part in tokens.split([5, 1, 7, 3], dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache, pieces = out.past_key_values, [*pieces, out.logits]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)


def test_saving_and_loading_again_keeps_every_bit(case: Any, tmp_path: Path) -> None:
    config, _, _, model = case
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    tokens = make_tokens(config)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, again(tokens).logits)
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in again.state_dict().items()
    }
    forget(again)


@pytest.mark.parametrize("wanted", [False, True])
def test_inference_keeps_one_layers_output(tmp_path: Path, wanted: bool) -> None:
    """A thousand layers' outputs of a batch would be a hundred gigabytes."""
    config, kept = make_config("b2t", num_layers=8), 0
    export_tiny(make_weights(config), config, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    outputs: list[weakref.ref[torch.Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))

    def count(*_: Any) -> None:
        nonlocal kept
        kept = sum(output() is not None for output in outputs)

    model.model.norm.register_forward_pre_hook(count)
    with torch.no_grad():
        out = model(make_tokens(config), output_hidden_states=wanted)
    assert len(outputs) == 8
    assert kept == (8 if wanted else 1)
    assert (out.hidden_states is not None) is wanted
    if wanted:
        assert len(out.hidden_states) == 9
    forget(model)


def test_loss_gradients_and_gradient_checkpointing(case: Any) -> None:
    config, weights, _, model = case
    tokens = make_tokens(config)
    model.train()
    grads, calls = [], []
    layer = next(
        module
        for name, module in model.named_modules()
        if name.endswith((".layers.0.mlp", ".h.0.mlp", ".layers.0.fc1"))
    )
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        calls.clear()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected = torch.nn.functional.cross_entropy(
        reference(config, weights)(tokens)[:, :-1, :101].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert len(grads[0]) == len(list(model.parameters()))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_logits_of_the_last_positions_only(case: Any) -> None:
    config, _, _, model = case
    tokens = make_tokens(config)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, logits_to_keep=3).logits, model(tokens).logits[:, -3:], rtol=0, atol=1e-6
        )


def test_half_precision_stays_near(case: Any) -> None:
    config, _, folder, model = case
    tokens = make_tokens(config)
    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        exact, near = model(tokens).logits, half(tokens).logits
    assert near.dtype == torch.bfloat16
    assert float((near.float() - exact).abs().mean() / exact.std()) < 0.05
    forget(half)


def test_an_export_loads_without_this_repository(tmp_path: Path) -> None:
    config = make_config("b2t")
    export_tiny(make_weights(config), config, tmp_path / "out")
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; import torch;"
        f"m = A.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True); "
        "print(m(torch.tensor([[1, 2]])).logits.shape);"
        "assert not [n for n in sys.modules "
        "if n == 'model' or n.startswith(('model.', 'megatron', 'deepspeed'))]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "", "HF_HOME": str(tmp_path / "home")},
    )
    assert "torch.Size([1, 2, 101])" in done.stdout, done.stderr


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_configuration_file_holds_the_plan(scheme: str, tmp_path: Path) -> None:
    from dataclasses import asdict

    config = make_config(scheme, num_layers=7)
    export_tiny(make_weights(config), config, tmp_path / "out", architecture="fathom")
    loaded = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    plan = SCHEMES[scheme].plan(7)
    assert [tuple(pair) for pair in loaded.sublayers()] == [
        (asdict(layer.attention), asdict(layer.mlp)) for layer in plan
    ]
    runs = {"layernorm_scaling": 7, "mix_ln": 2, "keel": 2}.get(scheme, 1)
    assert len(loaded.depth_plan) == runs


@pytest.mark.parametrize("tied", [True, False])
def test_a_configuration_of_defaults_makes_a_model(tied: bool) -> None:
    from model.hf.remote.modeling_fathom import FathomForCausalLM

    assert (FathomConfig().num_hidden_layers, FathomConfig().tie_word_embeddings) == (12, True)
    sizes: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    if not tied:
        sizes["tie_word_embeddings"] = False
    model = FathomForCausalLM(FathomConfig(**sizes)).eval()
    assert ("lm_head.weight" in model.state_dict()) is not tied
    new = model.generate(torch.tensor([[3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert new.shape == (1, 4)


def test_a_broken_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="describes 3 layers, but num_hidden_layers=4"):
        FathomConfig(num_hidden_layers=4, depth_plan=[{"layers": 3, "attention": {}, "mlp": {}}])
    with pytest.raises(ValueError, match=r"unknown keys \['norm_inn'\]"):
        FathomConfig(
            num_hidden_layers=1, depth_plan=[{"layers": 1, "attention": {"norm_inn": True}, "mlp": {}}]
        )
