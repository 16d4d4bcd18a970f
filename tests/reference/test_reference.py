"""The references against torch's own layers and against transformers' rotary embedding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import (
    b2t,
    deepnorm,
    deepscalelm,
    gpt,
    layernorm_scaling,
    mix_ln,
    parts,
    peri_ln,
    post_ln,
    pre_ln,
    spannorm,
)
from tests.reference.parts import Options, Weights

WIDTH, HEADS, FFN = 24, 4, 40


def _weights(layer: nn.TransformerEncoderLayer) -> Weights:
    """Weights of a torch layer under the references' names."""
    attention = layer.self_attn
    q, k, v = attention.in_proj_weight.chunk(3)
    bq, bk, bv = attention.in_proj_bias.chunk(3)
    weights = {
        "q": q,
        "k": k,
        "v": v,
        "bq": bq,
        "bk": bk,
        "bv": bv,
        "o": attention.out_proj.weight,
        "bo": attention.out_proj.bias,
    }
    weights |= {
        "fc1": layer.linear1.weight,
        "bfc1": layer.linear1.bias,
        "fc2": layer.linear2.weight,
        "bfc2": layer.linear2.bias,
    }
    weights |= {
        "ln1": layer.norm1.weight,
        "ln1_b": layer.norm1.bias,
        "ln2": layer.norm2.weight,
        "ln2_b": layer.norm2.bias,
    }
    return weights


def _torch_layer(norm_first: bool, activation: str = "relu") -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, FFN, 0.0, activation, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def _x(tokens: int = 7) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_plain_layers_equal_torch(norm_first: bool, activation: str, causal: bool) -> None:
    layer = _torch_layer(norm_first, activation)
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64) if causal else None
    reference = (pre_ln if norm_first else post_ln).layer(
        _x(), _weights(layer), Options(HEADS, activation=activation, causal=causal)
    )
    assert torch.allclose(reference, layer(_x(), src_mask=mask), rtol=0, atol=1e-12)


def test_grouped_attention_equals_torch() -> None:
    torch.manual_seed(2)
    groups, d = 2, 6
    q, k, v, o = (
        torch.randn(rows, cols, dtype=torch.float64)
        for rows, cols in ((HEADS * d, WIDTH), (groups * d, WIDTH), (groups * d, WIDTH), (WIDTH, HEADS * d))
    )
    ours = parts.attention(_x(), {"q": q, "k": k, "v": v, "o": o}, Options(HEADS, groups))
    heads = [(_x() @ w.T).view(2, 7, -1, d).transpose(1, 2) for w in (q, k, v)]
    theirs = (
        F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True)
        .transpose(1, 2)
        .flatten(2)
        @ o.T
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_rotary_equals_llama() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    angle = torch.outer(
        torch.arange(9.0, dtype=torch.float64), 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    )
    both = torch.cat((angle, angle), dim=-1)[None]
    theirs, _ = llama.apply_rotary_pos_emb(x, x, both.cos(), both.sin())
    assert torch.allclose(
        parts.rotate(x, parts.plain_frequencies(10000.0, x.shape[-1])), theirs, rtol=0, atol=1e-12
    )


def test_b2t_adds_the_layer_input_before_the_last_norm() -> None:
    layer, o = _torch_layer(False), Options(HEADS)
    w, x = _weights(layer), _x()
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    h = layer.norm1(x + layer._sa_block(x, mask, None, is_causal=False))
    assert torch.allclose(
        b2t.encoder_layer(x, w, o), layer.norm2(x + h + layer._ff_block(h)), rtol=0, atol=1e-12
    )
    assert torch.allclose(spannorm.layer(x, w, o), layer.norm2(x + layer._ff_block(h)), rtol=0, atol=1e-12)


def test_b2t_decoder_with_cross_attention() -> None:
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, FFN, 0.0, batch_first=True, dtype=torch.float64)
    w = _weights(layer)  # type: ignore[arg-type]
    cross = layer.multihead_attn
    w |= {"c" + name: part for name, part in zip("qkv", cross.in_proj_weight.chunk(3), strict=True)}
    w |= {"cb" + name: part for name, part in zip("qkv", cross.in_proj_bias.chunk(3), strict=True)}
    w |= {
        "co": cross.out_proj.weight,
        "cbo": cross.out_proj.bias,
        "ln3": layer.norm3.weight,
        "ln3_b": layer.norm3.bias,
    }
    x, memory = _x(), _x(5) * 0.7
    mask = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
    h1 = layer.norm1(x + layer._sa_block(x, mask, None))
    h2 = layer.norm2(h1 + layer._mha_block(h1, memory, None, None))
    expected = layer.norm3(x + h2 + layer._ff_block(h2))
    assert torch.allclose(b2t.decoder_layer(x, memory, w, Options(HEADS)), expected, rtol=0, atol=1e-12)
    hidden = torch.zeros(2, 1, 1, 5, dtype=torch.bool)
    hidden[:, ..., 4] = True
    short = b2t.decoder_layer(x, memory[:, :4], w, Options(HEADS))
    assert torch.allclose(
        b2t.decoder_layer(x, memory, w, Options(HEADS), hide_memory=hidden), short, rtol=0, atol=1e-12
    )


def test_schemes_reduce_to_their_plain_forms() -> None:
    """Limits where two schemes are the same function."""
    w, x, o = [_weights(_torch_layer(False)) for _ in range(4)], _x(), Options(HEADS)
    same = {"rtol": 0, "atol": 1e-11}
    assert torch.equal(mix_ln.stack(x, w, o, post_fraction=1.0), post_ln.stack(x, w, o))
    assert torch.equal(mix_ln.stack(x, w, o, post_fraction=0.0), pre_ln.stack(x, w, o))
    assert torch.equal(layernorm_scaling.layer(x, w[0], o, 1), pre_ln.layer(x, w[0], o))
    # lambda^2 + beta^2 = 1 with beta^2 = 1/2: the residual and the branch weigh the same.
    # So post-norm's scale drops out (but for epsilon).
    lam, beta = deepscalelm.constants(2)
    assert lam == pytest.approx(beta)
    plain = Options(HEADS, eps=1e-14)
    scaled = deepscalelm.post_ln_layer(x, w[0], plain, lam, beta)
    assert torch.allclose(scaled, post_ln.layer(x, w[0], plain), **same)  # type: ignore[arg-type]
    # DeepNorm is post-norm with the branches divided by a.
    divided = dict(w[0])
    for name in ("o", "bo", "fc2", "bfc2"):
        divided[name] = w[0][name] / 2
    assert torch.allclose(deepnorm.layer(x, w[0], plain, 2.0), post_ln.layer(x, divided, plain), **same)  # type: ignore[arg-type]


def test_peri_ln_branches_have_unit_size() -> None:
    w, x = _weights(_torch_layer(True)), _x()
    ones, zeros = torch.ones(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    w |= {"ln1_out": ones, "ln1_out_b": zeros, "ln2_out": ones, "ln2_out_b": zeros}
    added = peri_ln.layer(x, w, Options(HEADS, eps=0.0)) - x
    assert (added.square().mean(-1) <= 4 + 1e-9).all()
    scaled = {**w, **{name: 5 * w[name] for name in ("o", "bo", "fc2", "bfc2")}}
    assert torch.allclose(peri_ln.layer(x, scaled, Options(HEADS, eps=0.0)), x + added, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scheme", list(gpt.FAMILIES))
def test_gpt_is_causal_and_uses_every_parameter(scheme: str) -> None:
    shape = gpt.Shape(
        scheme, num_layers=4, heads=4, groups=2, activation="swiglu", position="learned", logit_scale=0.5
    )
    torch.manual_seed(4)
    parameters = {
        name: (torch.randn(size, dtype=torch.float64) * 0.3).requires_grad_()
        for name, size in gpt.parameter_shapes(shape, 16, 12, 30, 6, tied=False).items()
    }
    tokens = torch.randint(28, (2, 6))
    logits = gpt.logits(parameters, shape, tokens)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 28
    assert torch.equal(gpt.logits(parameters, shape, changed)[:, :4], logits[:, :4])
    loss = gpt.loss(parameters, shape, tokens, tokens.roll(-1, 1), vocab_size=28)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    for name, gradient in zip(parameters, gradients, strict=True):
        assert torch.count_nonzero(gradient), name
    assert torch.count_nonzero(gradients[-1][28:]) == 0
