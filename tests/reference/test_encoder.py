"""The encoder reference against transformers' BERT classes, and masks against shorter batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.reference import encoder, gpt
from tests.reference.encoder import Batch, Encoder

WIDTH, FFN, VOCAB, TOKENS = 16, 24, 30, 7


def _model(scheme: str, token_types: int = 0, embedding_norm: bool | None = None, **given: object) -> Encoder:
    return Encoder(gpt.Shape(scheme, num_layers=3, heads=4, **given), token_types, embedding_norm)  # type: ignore[arg-type]


def _parameters(model: Encoder, bias: bool = True) -> dict[str, Tensor]:
    torch.manual_seed(4)
    shapes = encoder.parameter_shapes(model, WIDTH, FFN, VOCAB, TOKENS, bias=bias)
    return {
        name: (torch.randn(size, dtype=torch.float64) * 0.4).requires_grad_() for name, size in shapes.items()
    }


def _padded() -> Batch:
    torch.manual_seed(5)
    keep = torch.arange(TOKENS)[None] < torch.tensor([TOKENS, 4])[:, None]
    types = torch.randint(2, (2, TOKENS))
    return Batch(torch.randint(VOCAB, (2, TOKENS)), keep.long(), types=types)


_BERT = {
    "self_attention.linear_proj": "attention.output.dense",
    "mlp.linear_fc1": "intermediate.dense",
    "mlp.linear_fc2": "output.dense",
}
_POST = {"pre_mlp_layernorm": "attention.output.LayerNorm", "mlp_output_norm": "output.LayerNorm"}
_PRE = {"input_layernorm": "attention.ln", "pre_mlp_layernorm": "ln"}


@pytest.mark.parametrize(
    ("kind", "scheme", "norms"), [("Bert", "post_ln", _POST), ("MegatronBert", "pre_ln", _PRE)]
)
def test_it_is_bert(kind: str, scheme: str, norms: dict[str, str]) -> None:
    """BERT is post-LN with a norm on the embedding, Megatron's BERT pre-LN without one."""
    transformers = pytest.importorskip("transformers")
    model = _model(scheme, 2, kind == "Bert")
    ours = _parameters(model)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=FFN,
        max_position_embeddings=TOKENS,
        layer_norm_eps=1e-5,
    )
    theirs = getattr(transformers, f"{kind}ForMaskedLM")(config).double().eval()
    top, transform = "bert.embeddings.", "cls.predictions.transform."
    state = {
        f"{top}word_embeddings.weight": ours["embedding.word_embeddings.weight"],
        f"{top}position_embeddings.weight": ours["embedding.position_embeddings.weight"],
        f"{top}token_type_embeddings.weight": ours["embedding.tokentype_embeddings.weight"],
        "cls.predictions.decoder.weight": ours["embedding.word_embeddings.weight"],
    }
    state |= dict.fromkeys(("cls.predictions.bias", "cls.predictions.decoder.bias"), ours["head.bias"])
    outer = {"embedding.norm": f"{top}LayerNorm", "encoder.final_layernorm": "bert.encoder.ln"}
    outer |= {"head.dense": f"{transform}dense", "head.norm": f"{transform}LayerNorm"}
    for index in range(3):
        weights = gpt.layer_weights(
            {name.replace("encoder.", "decoder.", 1): value for name, value in ours.items()},
            index,
            model.stack,
            {},
        )
        for own, name in zip("qkv", ("query", "key", "value"), strict=True):
            state[f"bert.encoder.layer.{index}.attention.self.{name}.weight"] = weights[own]
            state[f"bert.encoder.layer.{index}.attention.self.{name}.bias"] = weights["b" + own]
        for name, hf in {**_BERT, **norms}.items():
            outer[f"encoder.layers.{index}.{name}"] = f"bert.encoder.layer.{index}.{hf}"
    for name, hf in outer.items():
        state |= {
            f"{hf}.{leaf}": ours[f"{name}.{leaf}"] for leaf in ("weight", "bias") if f"{name}.{leaf}" in ours
        }
    theirs.load_state_dict(state, strict=True)
    batch = _padded()
    expected = theirs(batch.tokens, attention_mask=batch.keep, token_type_ids=batch.types).logits
    assert batch.keep is not None
    seen = batch.keep.bool()
    assert torch.allclose(encoder.logits(ours, model, batch)[seen], expected[seen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_documents_and_padding_are_as_if_alone(position: str) -> None:
    model = _model("pre_ln", position=position)
    parameters = _parameters(model)
    tokens = torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(6))
    documents = torch.tensor([[1, 1, 1, 2, 2, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    together = encoder.logits(parameters, model, Batch(tokens, documents=documents, positions=positions))
    padded = encoder.logits(parameters, model, Batch(tokens, keep=(torch.arange(TOKENS) < 3)[None].long()))
    for result, part in ((together, slice(0, 3)), (together, slice(3, 5)), (padded, slice(0, 3))):
        alone = encoder.logits(parameters, model, Batch(tokens[:, part]))
        assert torch.allclose(result[:, part], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", list(gpt.FAMILIES))
def test_every_token_and_every_parameter_counts(scheme: str) -> None:
    model = _model(scheme, 2, True, groups=2, activation="swiglu", logit_scale=0.5)
    parameters, batch = _parameters(model), _padded()
    labels = torch.full((2, TOKENS), encoder.IGNORED)
    labels[0, 0], labels[1, 3] = 3, 5
    embedded = parameters["embedding.position_embeddings.weight"]
    loss = encoder.loss(parameters, model, batch, labels, vocab_size=VOCAB - 2)
    gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
    for name, gradient in gradients.items():
        assert torch.count_nonzero(gradient), name
    # Row 0 has its only target in front, and sees the last position.
    assert torch.count_nonzero(gradients["embedding.position_embeddings.weight"][-1]) == embedded.shape[1]
    assert torch.count_nonzero(gradients["head.bias"][VOCAB - 2 :]) == 0
