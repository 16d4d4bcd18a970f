"""One compilation for all layers, the same numbers, and hooks that still hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from model import compiled
from model.compiled import compile_layers
from model.config import ModelConfig
from model.errors import UserError
from model.gpt import GPT, transformer_config
from model.init import initialize_
from model.names import named_parameters
from model.scheme import SCHEMES
from parallel.single import single_process

SEQ = 16
LLAMA = {"position": "rotary", "num_query_groups": 2, "activation": "swiglu", "normalization": "rmsnorm", "bias": False}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    single_process()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(scheme: str, layers: int = 8, **sizes: Any) -> GPT:
    fields = {"scheme": scheme, "num_layers": layers, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": SEQ}
    config = ModelConfig(**fields | sizes)
    model = GPT(config, transformer_config(config), seq_length=SEQ)
    initialize_(((one.name, one.parameter, one.shard) for one in named_parameters(model, 0, 1)), config, SEQ, 1)
    return model.train()


def loss_and_gradients(model: GPT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 128, (2, SEQ + 1), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(tokens[:, :-1], torch.arange(SEQ).expand(2, SEQ), None, labels=tokens[:, 1:]).mean()
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def counting() -> tuple[list[int], Callable[..., Any]]:
    """A compiler that only counts, so that what is compiled runs as it is."""
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(len(module.graph.nodes))
        return module.forward

    return graphs, backend


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_all_layers_share_one_compilation(scheme: str) -> None:
    model = build(scheme)
    loss, gradients = loss_and_gradients(model)
    graphs, backend = counting()
    assert compile_layers([model], backend=backend) == 8
    for _ in range(2):
        again, compiled_gradients = loss_and_gradients(model)
    assert len(graphs) == (2 if scheme == "mix_ln" else 1)  # mix_ln has two kinds of layers
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_rotary_grouped_gated_layers_compile_once() -> None:
    model = build("deepscalelm_pre_ln", layers=40, **LLAMA)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    loss_and_gradients(model)
    assert len(graphs) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_hooks_and_evaluation_see_the_layer_itself() -> None:
    model, heard = build("pre_ln"), []
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    layer = model.decoder.layers[3]
    handles = [layer.register_forward_hook(lambda *_: None), layer.mlp_join.register_forward_hook(lambda *_: heard.append(1))]
    loss_and_gradients(model)
    assert heard == [1]
    for handle in handles:
        handle.remove()
    loss_and_gradients(model)
    count = len(graphs)
    model.eval()
    with torch.no_grad():
        tokens = torch.zeros(1, SEQ, dtype=torch.long)
        model(tokens, torch.arange(SEQ).expand(1, SEQ), None, labels=tokens)
    assert len(graphs) == count == 1


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.compile=true needs a C"):
        compile_layers([build("pre_ln", layers=1)])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["pre_ln", "layernorm_scaling"])
def test_inductor_gives_the_same_numbers(scheme: str) -> None:
    model = build(scheme)
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.utils.counters.clear()
    compile_layers([model])
    again, compiled_gradients = loss_and_gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6)
