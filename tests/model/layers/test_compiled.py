"""One compilation for all layers, the same numbers, and hooks that still hear."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.layers import compiled
from model.layers.compiled import compile_joins, compile_layers
from model.layers.transformer_config import transformer_config
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import initialize_
from parallel.launch.one_process import single_process
from pretrain.data.documents import document_parts
from pretrain.data.samples import next_tokens
from pretrain.tasks.task import Batch
from tests.parallel.training import SEQ_LENGTH, SOURCE_LENGTH, VOCAB_SIZE, pairs

SEQ = SEQ_LENGTH
LLAMA: dict[str, Any] = {
    "position": "rotary",
    "num_query_groups": 2,
    "activation": "swiglu",
    "normalization": "rmsnorm",
    "bias": False,
}


RECOMPUTED: dict[str, Any] = {"recompute_granularity": "full", "recompute_method": "uniform"}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    single_process()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(scheme: str, layers: int = 8, core: dict[str, Any] | None = None, **sizes: Any) -> LanguageModel:
    """core: further fields of Megatron-core's configuration."""
    fields = {
        "scheme": scheme,
        "num_layers": layers,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": SEQ,
    }
    config = ModelConfig(**fields | sizes)
    source = SOURCE_LENGTH if config.blueprint.crossed else None
    core_config = transformer_config(config, **(core or {}))
    model = LanguageModel(config, core_config, seq_length=SEQ, source_length=source)
    placed = ((one.name, one.parameter, one.shard) for one in named_parameters(model, 0, 1))
    initialize_(placed, config, SEQ, 1, source_length=source)
    return model.train()


WINDOWS = next_tokens(torch.randint(0, 128, (2, SEQ + 1), generator=torch.Generator().manual_seed(0)))
PAIRS = {name: torch.stack([pairs(row)[name] for row in range(2)]) for name in pairs(0) if name != "weights"}


def loss_and_gradients(
    model: LanguageModel, batch: Batch = WINDOWS
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(batch).mean()
    loss.backward()
    return loss.detach(), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


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
    assert len(graphs) == {"mix_ln": 2, "keel": 2}.get(scheme, 1)  # these have two kinds of layers
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-7)


# An encoder's last layer has the norm after it, where the scheme has one.
CROSSED = {"b2t": 2, "deepscalelm_pre_ln": 3, "mix_ln": 5, "keel": 4}


@pytest.mark.parametrize("scheme", list(CROSSED))
def test_layers_of_two_stacks_are_compiled_by_stack(scheme: str) -> None:
    """What takes the message between stages apart and joins it is no part of what is compiled."""
    model = build(scheme, layers=5, family="seq2seq", encoder_layers=4, vocab_size=VOCAB_SIZE)
    loss, gradients = loss_and_gradients(model, PAIRS)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    for _ in range(3):
        again, compiled_gradients = loss_and_gradients(model, PAIRS)
    assert len(graphs) == CROSSED[scheme]
    assert [len(layers) for layers in model.decoder.layers[0].compiled.guarded.values()] == [9]
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-7)


def test_more_kinds_of_layers_than_pytorch_would_compile() -> None:
    """Five kinds, each with and without gradients."""
    sizes: dict[str, Any] = {"family": "seq2seq", "encoder_layers": 4, "vocab_size": VOCAB_SIZE}
    model = build("mix_ln", layers=5, core=RECOMPUTED | {"recompute_num_layers": 1}, **sizes)
    loss, _ = loss_and_gradients(model, PAIRS)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    for _ in range(2):
        again, _ = loss_and_gradients(model, PAIRS)
    assert len(graphs) == 2 * CROSSED["mix_ln"] > compiled.RECOMPILES
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("documents", [False, True])
def test_rotary_grouped_gated_layers_compile_once(documents: bool) -> None:
    model = build("deepscalelm_pre_ln", layers=40, **LLAMA)
    batch = WINDOWS | (document_parts(WINDOWS["tokens"] % 5, 0) if documents else {})
    loss, gradients = loss_and_gradients(model, batch)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    again, compiled_gradients = loss_and_gradients(model, batch)
    assert len(graphs) == 1
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-4, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize(
    ("scheme", "group"), [("deepscalelm_pre_ln", 1), ("layernorm_scaling", 4), ("mix_ln", 1)]
)
def test_layers_that_are_computed_again(scheme: str, group: int) -> None:
    """A compilation without gradients for the forward pass, one with them for the second.

    Inside a group inputs of the first have no gradients, which is another one.
    """
    model = build(scheme, core=RECOMPUTED | {"recompute_num_layers": group}).double()
    loss, gradients = loss_and_gradients(model)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    for _ in range(3):
        again, compiled_gradients = loss_and_gradients(model)
    shared = model.decoder.layers[0].compiled
    assert len(graphs) == {"mix_ln": 4}.get(scheme, 2 + (group > 1))
    assert [len(layers) for layers in (*shared.guarded.values(), *shared.again.values())] == [8, 8]
    assert float(again) == pytest.approx(float(loss), rel=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-10, atol=1e-14)


def test_hooks_and_evaluation_see_the_layer_itself() -> None:
    model, heard = build("pre_ln"), []
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    layer = model.decoder.layers[3]
    handles = [
        layer.register_forward_hook(lambda *_: None),
        layer.mlp_join.register_forward_hook(lambda *_: heard.append(1)),
    ]
    loss_and_gradients(model)
    assert heard == [1]
    for handle in handles:
        handle.remove()
    loss_and_gradients(model)
    count = len(graphs)
    model.eval()
    with torch.no_grad():
        tokens = torch.zeros(1, SEQ, dtype=torch.long)
        model({"tokens": tokens, "labels": tokens})
    assert len(graphs) == count == 1


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight layers are three calls: of three, three and two."""
    monkeypatch.setattr(compiled, "GROUPED_FROM", 8)
    monkeypatch.setattr(compiled, "GROUP", 3)


# By the kinds of layers in each call.
GROUPS = {"pre_ln": 2, "b2t": 2, "layernorm_scaling": 2, "mix_ln": 3, "keel": 3, "gpas": 2}


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("scheme", list(GROUPS))
def test_layers_of_a_deep_stack_are_called_together(scheme: str) -> None:
    model = build(scheme).double()
    loss, gradients = loss_and_gradients(model)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    for _ in range(2):
        again, compiled_gradients = loss_and_gradients(model)
    assert len(graphs) == GROUPS[scheme]
    torch.testing.assert_close(again, loss, rtol=1e-13, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("grouped")
@pytest.mark.parametrize("place", [3, 4])
def test_a_group_with_a_hook_runs_as_it_is(place: int) -> None:
    """On its first layer or on another one; the other groups stay compiled."""
    model, heard = build("pre_ln"), []
    expected = loss_of(model, 2)
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    layer = model.decoder.layers[place]
    handle = layer.register_forward_hook(lambda one, args, out: heard.append(out[0].detach()))
    torch.testing.assert_close(loss_of(model, 2), expected, rtol=1e-6, atol=0)
    assert len(graphs) == 2  # of three layers and of two
    handle.remove()
    torch.testing.assert_close(loss_of(model, 2), expected, rtol=1e-6, atol=0)
    assert len(heard) == 1
    model.eval()
    torch.testing.assert_close(loss_of(model, 2), expected, rtol=1e-6, atol=0)
    assert len(graphs) == 2


@pytest.mark.usefixtures("grouped")
def test_two_stacks_and_layers_computed_again_are_called_one_by_one() -> None:
    for model in (
        build("pre_ln", core=RECOMPUTED | {"recompute_num_layers": 1}),
        build("b2t", family="seq2seq"),
    ):
        compile_layers([model], backend=counting()[1])
        assert {len(group) for group in model.decoder.layers[0].compiled.groups.values()} == {1}


def loss_of(model: LanguageModel, batch: int) -> torch.Tensor:
    tokens = torch.randint(0, 128, (batch, SEQ + 1), generator=torch.Generator().manual_seed(batch))
    loss: torch.Tensor = model({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}).mean()
    return loss.detach()


def test_an_input_of_another_shape_is_guarded_again() -> None:
    model = build("mix_ln")
    expected = {batch: loss_of(model, batch) for batch in (2, 3)}
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    shared = model.decoder.layers[0].compiled
    for batch, count in ((2, 2), (2, 2), (3, 4), (2, 4), (3, 4)):
        torch.testing.assert_close(loss_of(model, batch), expected[batch], rtol=1e-6, atol=0)
        assert len(graphs) == count
    assert {kind[0][1]: len(layers) for kind, layers in shared.guarded.items()} == {2: 8, 3: 8}


@pytest.mark.parametrize("guards", [False, True])
def test_a_changed_attribute_is_seen_with_all_guards_only(
    guards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing changes an attribute between two steps; FATHOM_GUARDS=1 is for whoever tries to."""
    monkeypatch.setenv("FATHOM_GUARDS", str(int(guards)))
    model = build("pre_ln")
    compile_layers([model], backend=counting()[1])
    before = [loss_of(model, 2) for _ in range(2)][1]
    for layer in model.decoder.layers:
        layer.input_layernorm.eps = 10.0
    after = loss_of(model, 2)
    model.eval()  # where layers run as they are
    expected = loss_of(model, 2)
    assert not torch.allclose(expected, before, rtol=1e-4, atol=0)
    torch.testing.assert_close(after, expected if guards else before, rtol=1e-6, atol=0)


def test_layers_that_a_hook_kept_from_compiling_are_not_trusted() -> None:
    model = build("mix_ln")
    graphs, backend = counting()
    compile_layers([model], backend=backend)
    handles = [layer.register_forward_hook(lambda *_: None) for layer in model.decoder.layers[1:]]
    expected = loss_of(model, 2)
    assert len(graphs) == 1
    for handle in handles:
        handle.remove()
    for _ in range(2):
        torch.testing.assert_close(loss_of(model, 2), expected, rtol=1e-6, atol=0)
    assert len(graphs) == 2


def test_a_later_stage_of_a_pipeline_is_compiled_too() -> None:
    config = ModelConfig(
        scheme="b2t",
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=SEQ,
    )
    stage = LanguageModel(
        config, transformer_config(config), seq_length=SEQ, pre_process=False, post_process=False
    ).train()
    initialize_(
        ((one.name, one.parameter, one.shard) for one in named_parameters(stage, 0, 1)), config, SEQ, 1
    )
    graphs, backend = counting()

    def output() -> torch.Tensor:
        stream = torch.randn(SEQ, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        stage.set_input_tensor([stream])
        result: torch.Tensor = stage({"tokens": torch.zeros(2, SEQ, dtype=torch.long)})
        return result.detach()

    expected = output()
    compile_layers([stage], backend=backend)
    for _ in range(3):
        torch.testing.assert_close(output(), expected, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


def test_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.compile=true needs a C"):
        compile_layers([build("pre_ln", layers=1)])


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("scheme", ["pre_ln", "layernorm_scaling", "deepscalelm_pre_ln"])
def test_inductor_gives_the_same_numbers(
    scheme: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if together:
        monkeypatch.setattr(compiled, "GROUPED_FROM", 8)
        monkeypatch.setattr(compiled, "GROUP", 4)
    model = build(scheme)
    loss, gradients = loss_and_gradients(model)
    torch._dynamo.utils.counters.clear()
    compile_layers([model])
    again, compiled_gradients = loss_and_gradients(model)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_joins_are_compiled_where_one_pass_would_do(scheme: str) -> None:
    """Every set of coefficients once, whatever the depth.

    Joins that are one operation stay as they are.
    """
    model = build(scheme, layers=12)
    graphs, backend = counting()
    eager_loss, eager = loss_and_gradients(model)
    joins = [join for layer in model.decoder.layers for join in (layer.self_attention_join, layer.mlp_join)]
    expected = [join for join in joins if join.kernels > 1]
    assert compile_joins([model], backend=backend) == len(expected)
    loss, gradients = loss_and_gradients(model)
    assert len(graphs) == len(
        {(join.residual_scale, join.branch_scale, join.skip_scale) for join in expected}
    )
    assert torch.equal(loss, eager_loss)
    assert all(torch.equal(gradient, eager[name]) for name, gradient in gradients.items())
    model.eval()
    loss_and_gradients(model)
    model.train()
    assert loss_and_gradients(model)[0] == loss
    assert len(graphs) == len(
        {(join.residual_scale, join.branch_scale, join.skip_scale) for join in expected}
    )


def test_joins_that_are_computed_again_are_compiled_twice() -> None:
    model = build("b2t", layers=4, core=RECOMPUTED | {"recompute_num_layers": 1})
    graphs, backend = counting()
    eager_loss, eager = loss_and_gradients(model)
    compile_joins([model], backend=backend)
    loss, gradients = loss_and_gradients(model)
    assert len(graphs) == 2
    assert torch.equal(loss, eager_loss)
    assert all(torch.equal(gradient, eager[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(
    ("scheme", "share"),
    [("pre_ln", 0.0), ("b2t", 0.5), ("deepscalelm_pre_ln", 0.0), ("deepnorm", 0.0), ("spannorm", 0.0)],
)
def test_which_joins_take_more_than_one_operation(scheme: str, share: float) -> None:
    model = build(scheme, layers=4)
    assert compile_joins([model], backend=counting()[1]) == share * 2 * 4


def test_compiled_joins_give_the_same_numbers() -> None:
    """In fp64, where only the order of additions may differ."""
    model = build("b2t", layers=3).double()
    loss, gradients = loss_and_gradients(model)
    assert compile_joins([model])
    compiled_loss, compiled_gradients = loss_and_gradients(model)
    assert float(compiled_loss) == pytest.approx(float(loss), rel=1e-13)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-10, atol=1e-14)
