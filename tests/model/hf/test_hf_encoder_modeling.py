"""Exported encoders as transformers uses them: heads for fine-tuning, padding, training, saving."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForMaskedLM

from model.config import ModelConfig
from model.hf.export import export
from model.hf.proof import forget
from model.hf.remote.configuration_fathom import FathomConfig
from tests.model.hf.tiny import LOGIT_SCALE, POSITIONS, make_encoder, make_tokens, make_weights, reference

MODELS: dict[str, dict[str, Any]] = {
    "b2t": {
        "num_query_groups": 2,
        "position": "rotary",
        "normalization": "rmsnorm",
        "activation": "swiglu",
    },
    "spannorm": {
        "position": "none",
        "window": 3,
        "global_every": 2,
        "token_types": 0,
        "tie_embeddings": False,
    },
    "deepscalelm_post_ln": {},
    "deepscalelm_pre_ln": {},
}
"""The first two need our own class, BERT and Megatron's BERT compute the others."""
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, dict[str, torch.Tensor], Path]:
    config = make_encoder(request.param, **MODELS[request.param])
    weights, folder = make_weights(config), tmp_path_factory.mktemp("exports") / request.param
    export(weights, config, folder, logit_scale=LOGIT_SCALE, tokenizer=None, seq_length=POSITIONS)
    return config, weights, folder


@pytest.fixture
def case(exported: Any) -> Iterator[tuple[ModelConfig, dict[str, torch.Tensor], Path, Any]]:
    config, weights, folder = exported
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    yield config, weights, folder, model
    forget(model)


def padded(config: ModelConfig) -> dict[str, torch.Tensor]:
    tokens = make_tokens(config)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_for_fine_tuning_is_all_that_is_new(exported: Any, head: str) -> None:
    """And it learns: one batch is fitted."""
    config, _, folder = exported
    model, report = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    new = {name.partition(".")[0] for name in report["missing_keys"]}
    assert new <= {"classifier", "qa_outputs"} or new == {"bert", "classifier"}
    assert all("pooler" in name for name in report["missing_keys"] if name.startswith("bert."))
    assert not {"mismatched_keys", "error_msgs"} & {key for key, value in report.items() if value}
    batch = padded(config)
    labels = {
        "SequenceClassification": {"labels": torch.tensor([0, 1])},
        "TokenClassification": {
            "labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 2, -100)
        },
        "QuestionAnswering": {
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 3]),
        },
    }[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        out = model.train()(**batch, **labels)
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    forget(model)


def test_the_encoder_alone_gives_what_the_head_reads(case: Any) -> None:
    config, _, folder, model = case
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    batch = padded(config)
    with torch.no_grad():
        hidden = base(**batch).last_hidden_state
        states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == config.num_layers + 1
    assert torch.equal(states[-1], hidden)
    forget(base)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_on_either_side_changes_no_classification(tmp_path: Path, pooling: str) -> None:
    from model.hf.remote.modeling_fathom_encoder import FathomForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = FathomForSequenceClassification(
        FathomConfig(**sizes, causal=False, classifier_pooling=pooling, initializer_range=0.5)  # type: ignore[arg-type]
    ).eval()
    tokens, filling = torch.randint(50, (1, 6)), torch.randint(50, (1, 3))
    keep, hide = torch.ones_like(tokens), torch.zeros_like(filling)
    with torch.no_grad():
        alone = model(tokens).logits
        right = model(torch.cat((tokens, filling), 1), torch.cat((keep, hide), 1)).logits
        left = model(torch.cat((filling, tokens), 1), torch.cat((hide, keep), 1)).logits
        nothing = model(filling, hide).logits
    torch.testing.assert_close(right, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(left, alone, rtol=0, atol=1e-6)
    assert nothing.isfinite().all()


def test_loss_gradients_and_gradient_checkpointing(case: Any) -> None:
    config, weights, _, model = case
    batch = padded(config)
    tokens = batch["input_ids"]
    labels = torch.full_like(tokens, -100)
    labels[0, 3], labels[1, 2] = 7, 9
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train().zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    logits = reference(config, weights)(tokens, batch["attention_mask"])[..., :101]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-5, atol=0)
    assert len(grads[0]) == len(list(model.parameters()))
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-7)


def test_saving_and_loading_again_keeps_every_bit(case: Any, tmp_path: Path) -> None:
    config, _, _, model = case
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    batch = padded(config)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    forget(again)


def test_a_fine_tuned_model_is_saved_with_its_code(exported: Any, tmp_path: Path) -> None:
    config, _, folder = exported
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, trust_remote_code=True, num_labels=3).eval()
    model.save_pretrained(tmp_path / "tuned")
    again = auto.from_pretrained(tmp_path / "tuned", trust_remote_code=True).eval()
    batch = padded(config)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert again(**batch).logits.shape == (2, 3)
    forget(again)
    forget(model)


def test_new_words_get_rows_and_no_bias(case: Any) -> None:
    config, _, _, model = case
    batch = padded(config)
    with torch.no_grad():
        before = model(**batch).logits
        model.resize_token_embeddings(105)
        after = model(**batch).logits
    assert after.shape[-1] == 105
    torch.testing.assert_close(after[..., :101], before, rtol=0, atol=1e-6)
    assert model(**batch, labels=batch["input_ids"]).loss.isfinite()


def test_what_our_class_refuses(exported: Any) -> None:
    from model.hf.remote.modeling_fathom import FathomModel
    from model.hf.remote.modeling_fathom_encoder import FathomForMaskedLM

    sizes: dict[str, Any] = {
        "vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="is for encoders, and this model is a decoder"):
        FathomForMaskedLM(FathomConfig(**sizes))
    with pytest.raises(ValueError, match="classifier_pooling='max' is not known"):
        FathomConfig(**sizes, causal=False, classifier_pooling="max")
    with pytest.raises(ValueError, match="this model has no segment table"):
        FathomModel(FathomConfig(**sizes, causal=False))(
            torch.tensor([[1]]), token_type_ids=torch.tensor([[1]])
        )
