"""The probe: statistics against plain autograd, tokens, rules, pictures and files, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from model.config import ModelConfig
from model.depth.scheme import LAYER_ROLES
from model.errors import UserError
from model.parameters.names import named_parameters
from model.stack import Stack
from parallel.launch.one_process import single_process
from pretrain.config.scheme_choice import parse_variant
from pretrain.probe.measure import (
    Probe,
    coincidence,
    log_mean_square,
    probe,
    token_correlation,
    zipf_tokens,
)
from pretrain.probe.report import as_json, page, text, write_json, write_plot
from pretrain.probe.rules import RULES, findings, trainable, verdict
from pretrain.probe.setup import Choices, memory_needed, probes
from pretrain.train.build import build_chunks, seed_everything
from tests.model.narrow import without_units
from tests.pretrain.small import small_config, small_data, small_trainer

LENGTH = 12


def model(scheme: str = "pre_ln", layers: int = 3, **more: Any) -> ModelConfig:
    fields = {
        "num_layers": layers,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "vocab_size": 50,
        "max_position_embeddings": LENGTH,
    }
    return parse_variant(scheme).apply(ModelConfig.model_validate({**fields, **more}))


def measured(config: ModelConfig, seeds: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float64) -> Probe:
    return probe(
        config,
        single_process(),
        seq_length=LENGTH,
        tokens=lambda seed: zipf_tokens(50, 2, LENGTH + 1, seed),
        seeds=seeds,
        dtype=dtype,
        source="synthetic",
    )


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "groups"), [("pre_ln", None), ("b2t", 2), ("deepscalelm_post_ln", 1)])
def test_every_statistic_is_what_autograd_gives(scheme: str, groups: int | None) -> None:
    config = model(scheme, num_query_groups=groups, hidden_dropout=0.1)
    found = measured(config)
    topology = single_process()
    seed_everything(5, topology)
    (chunk,) = build_chunks(config, topology, seq_length=LENGTH, dtype=torch.float64, seed=5)
    streams: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        for stream in ([kwargs["hidden_states"]] if not streams else []) + [output[0]]:
            stream.retain_grad()
            streams.append(stream)

    for layer in chunk.decoder.layers:
        layer.register_forward_hook(keep, with_kwargs=True)
    tokens = zipf_tokens(50, 2, LENGTH + 1, 5)
    loss = chunk(tokens[:, :-1], torch.arange(LENGTH).expand(2, LENGTH), None, labels=tokens[:, 1:]).mean()
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()))
    assert found.embedding_variance == pytest.approx(float(streams[0].detach().var()))
    late = [
        float(stream.grad[LENGTH // 2 :].square().mean()) for stream in streams if stream.grad is not None
    ]
    everywhere = [float(stream.grad.square().mean()) for stream in streams if stream.grad is not None]
    norms = kind_norms(chunk, config)
    for index, layer in enumerate(found.layers):
        assert layer.layer == index + 1
        assert layer.forward_variance == pytest.approx(float(streams[index + 1].detach().var()))
        assert layer.token_correlation == pytest.approx(plain_correlation(streams[index + 1]))
        assert layer.grad_variance_late == pytest.approx(late[index] / late[config.num_layers - 1])
        assert layer.grad_variance == pytest.approx(everywhere[index] / everywhere[config.num_layers - 1])
        assert layer.log10_grad_variance_late == pytest.approx(
            math.log10(layer.grad_variance_late), abs=1e-12
        )
        assert layer.weight_grad_norms == pytest.approx(norms[index])
        assert layer.weight_grad_norm == pytest.approx(
            math.sqrt(sum(norm**2 for norm in norms[index].values()))
        )


@pytest.mark.parametrize("scheme", ["deepscalelm_pre_ln", "deepscalelm_post_ln", "deepnorm"])
def test_units_in_which_layers_compute_do_not_show(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model(scheme, layers=4)
    found = measured(config)
    without_units(monkeypatch)
    plain = measured(config)
    assert found.embedding_variance == pytest.approx(plain.embedding_variance, rel=1e-10)
    for ours, theirs in zip(found.layers, plain.layers, strict=True):
        both = [{**vars(layer), **layer.weight_grad_norms} for layer in (ours, theirs)]
        for key in both[0].keys() - {"weight_grad_norms"}:
            assert both[0][key] == pytest.approx(both[1][key], rel=1e-9, abs=1e-12), key


def test_bfloat16_shows_what_float32_shows(data: Path, tmp_path: Path) -> None:
    """At a depth at which DeepScaleLM's residual constant does not survive a product in bfloat16."""
    config = written(tmp_path, data)
    single, half = (
        next(probes(config, [], Choices(scheme="deepscalelm_pre_ln", layers=300, dtype=dtype)))
        for dtype in ("float32", "bfloat16")
    )
    assert (half.dtype, half.loss) == ("bfloat16", pytest.approx(single.loss, rel=0.01))
    for ours, theirs in zip(half.layers, single.layers, strict=True):
        assert ours.forward_variance == pytest.approx(theirs.forward_variance, rel=0.02)
        assert ours.grad_variance_late == pytest.approx(theirs.grad_variance_late, rel=0.1)
    assert half.layers[-1].forward_variance_theory == single.layers[-1].forward_variance_theory
    wide = next(
        probes(config, ["train.fp32_residual=true"], Choices(scheme="pre_ln", layers=2, dtype="bfloat16"))
    )
    assert wide.dtype == "bfloat16, fp32 residual"


def plain_correlation(x_sbh: Tensor) -> float:
    """Pair by pair."""
    x = x_sbh.detach().transpose(0, 1)
    products = [
        float(row[i] @ row[j]) for row in x for i in range(len(row)) for j in range(len(row)) if i != j
    ]
    squares = [float(vector @ vector) for row in x for vector in row]
    return sum(products) / len(products) / (sum(squares) / len(squares))


def kind_norms(chunk: Any, config: ModelConfig) -> list[dict[str, float]]:
    """Gradient norms by kind, the fused projection taken apart by the documented naming of `model.stack`."""
    stack = Stack(
        config.scheme,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        dtype=torch.float64,
    )
    gradients = {named.name: named.parameter.grad for named in named_parameters(chunk, 0, 1)}
    norms: list[dict[str, float]] = []
    for index in range(config.num_layers):
        for name, parameter in stack.layers[index].named_parameters():
            parameter.grad = gradients[f"decoder.layers.{index}.{name}"]
        plain = stack.gradients(index)
        norms.append({kind: float(plain[kind].norm()) for kind in LAYER_ROLES})
    return norms


def test_gradients_that_float32_cannot_square_are_reported() -> None:
    assert log_mean_square(torch.full((4,), 1e-30)) == pytest.approx(-60 * math.log(10))
    assert log_mean_square(torch.zeros(4)) == -math.inf
    assert math.isnan(log_mean_square(torch.tensor([1.0, math.nan])))


def test_correlation_of_equal_and_of_opposite_tokens() -> None:
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).expand(5, 1, 8)
    assert token_correlation(x) == pytest.approx(1.0)
    assert token_correlation(torch.cat([x[:1], -x[:1]])) == pytest.approx(-1.0)
    assert token_correlation(torch.zeros(5, 1, 8)) == 0.0


def test_coincidence_counts_pairs() -> None:
    tokens = torch.tensor([[1, 1, 2, 3], [4, 4, 4, 4]])
    assert coincidence(tokens) == pytest.approx((2 / 12 + 12 / 12) / 2)


def test_zipf_tokens_follow_the_law_and_the_seed() -> None:
    tokens = zipf_tokens(1000, 50, 400, 3)
    assert torch.equal(tokens, zipf_tokens(1000, 50, 400, 3))
    assert float((tokens == 0).float().mean() / (tokens == 9).float().mean()) == pytest.approx(10, rel=0.25)


def test_seeds_are_averaged() -> None:
    config = model()
    single = [measured(config, (seed,)) for seed in (5, 6)]
    both = measured(config, (5, 6))
    for layer, first, second in zip(both.layers, single[0].layers, single[1].layers, strict=True):
        assert layer.forward_variance == pytest.approx((first.forward_variance + second.forward_variance) / 2)
        assert layer.forward_variance_max == pytest.approx(
            max(first.forward_variance, second.forward_variance)
        )
        assert layer.grad_variance_late == pytest.approx(
            math.sqrt(first.grad_variance_late * second.grad_variance_late)
        )
    assert both.seeds == 2


def test_the_model_is_left_without_hooks_and_layer_gradients() -> None:
    from pretrain.probe.measure import Meter

    config = model()
    (chunk,) = build_chunks(config, single_process(), seq_length=LENGTH, dtype=torch.float32, seed=1)
    with Meter(chunk, config):
        tokens = zipf_tokens(50, 2, LENGTH, 1)
        chunk(tokens, torch.arange(LENGTH).expand(2, LENGTH), None, labels=tokens).mean().backward()
    assert all(parameter.grad is None for parameter in chunk.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in chunk.decoder.layers)


# ---- rules ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> Probe:
    return measured(model("deepscalelm_pre_ln", 4))


def changed(base: Probe, index: int, **fields: Any) -> Probe:
    layers = list(base.layers)
    layers[index] = replace(layers[index], **fields)
    return replace(base, layers=tuple(layers))


def names(found: Probe) -> list[str]:
    return [finding.rule for finding in findings(found)]


def test_a_sound_model_is_trainable(sound: Probe) -> None:
    assert (trainable(sound), names(sound)) == ("yes", [])
    assert verdict(sound).startswith("trainable at initialisation: forward variance")


@pytest.mark.parametrize(
    ("index", "fields", "rule", "word"),
    [
        (0, {"log10_grad_variance_late": -4.0}, "gradient_vanishes", "no"),
        (0, {"log10_grad_variance_late": -2.0}, "gradient_fades", "at risk"),
        (0, {"log10_grad_variance_late": 5.0}, "gradient_explodes", "no"),
        (0, {"log10_grad_variance_late": 1.0}, "gradient_grows", "yes"),
        (3, {"forward_variance": 1e9}, "stream_explodes", "no"),
        (3, {"forward_variance": 60.0}, "stream_grows", "yes"),
        (2, {"forward_variance": 1.8}, "stream_overshoots", "yes"),
        (3, {"forward_variance": 1e-4}, "stream_vanishes", "at risk"),
        (3, {"token_correlation": 0.999}, "tokens_merge", "at risk"),
        (2, {"weight_grad_norm": 1e-6}, "weight_gradients_differ", "yes"),
        (1, {"forward_variance": math.inf}, "finite", "no"),
        (1, {"weight_grad_norm": math.nan}, "finite", "no"),
    ],
)
def test_each_rule_speaks(sound: Probe, index: int, fields: dict[str, float], rule: str, word: str) -> None:
    broken = changed(sound, index, **fields)
    assert rule in names(broken)
    assert trainable(broken) == word
    message = next(finding.message for finding in findings(broken) if finding.rule == rule)
    assert f"layer {index + 1}" in message
    assert (message in verdict(broken)) or findings(broken)[0].rule != rule


def test_underflow_and_loss(sound: Probe) -> None:
    assert names(replace(sound, smallest_gradient_log10=-40.0))[0] == "gradient_underflows"
    assert names(replace(sound, smallest_gradient_log10=-math.inf))[0] == "gradient_underflows"
    assert names(replace(sound, loss=math.log(50) + 3)) == ["loss_starts_high"]


def test_only_the_worst_of_a_family_speaks(sound: Probe) -> None:
    worst = replace(changed(sound, 0, log10_grad_variance_late=-90.0), smallest_gradient_log10=-50.0)
    assert [name for name in names(worst) if name.startswith("gradient")] == ["gradient_underflows"]


def test_real_models_get_the_right_verdict() -> None:
    deep = {"num_layers": 40, "hidden_size": 32}
    assert trainable(measured(model("deepscalelm_pre_ln", **deep), dtype=torch.float32)) == "yes"
    assert trainable(measured(model("pre_ln", **deep), dtype=torch.float32)) == "yes"
    vanishing = measured(model("post_ln", **deep), dtype=torch.float32)
    assert trainable(vanishing) == "no"
    assert "late tokens vanishes" in verdict(vanishing)
    assert trainable(measured(model("b2t", **deep), dtype=torch.float32)) == "yes"


def test_every_rule_has_its_reason() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.why
        assert math.isfinite(rule.above) or math.isfinite(rule.below)


# ---- files ---------------------------------------------------------------------------------------


def test_json_has_the_promised_keys(sound: Probe, tmp_path: Path) -> None:
    write_json([sound], tmp_path / "p.json", compare=False)
    found = json.loads((tmp_path / "p.json").read_text())
    assert (found["scheme"], found["num_layers"], found["seeds"], found["trainable"]) == (
        "deepscalelm_pre_ln",
        4,
        1,
        "yes",
    )
    assert [layer["layer"] for layer in found["layers"]] == [1, 2, 3, 4]
    for layer in found["layers"]:
        for key in ("forward_variance", "token_correlation", "grad_variance_late"):
            assert isinstance(layer[key], float)
            assert isinstance(layer[f"{key}_theory"], float)
        assert layer["weight_grad_norm"] > 0
        assert set(layer["weight_grad_norms"]) == {"q", "k", "v", "o", "fc1", "fc2"}
    assert found["layers"][-1]["grad_variance_late"] == 1.0


def test_json_without_theory_and_with_values_that_are_not_finite(sound: Probe) -> None:
    odd = changed(sound, 0, forward_variance=math.nan, forward_variance_theory=None)
    layer = as_json(odd)["layers"][0]
    assert layer["forward_variance"] is None
    assert "forward_variance_theory" not in layer


@pytest.mark.parametrize("ending", ["png", "svg", "pdf", "html"])
@pytest.mark.parametrize("count", [1, 2])
def test_pictures_and_pages(sound: Probe, tmp_path: Path, ending: str, count: int) -> None:
    vanishing = replace(
        changed(sound, 0, grad_variance_late=0.0, log10_grad_variance_late=-math.inf), label="other"
    )
    path = tmp_path / f"probe.{ending}"
    write_plot([sound, vanishing][:count], path)
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "html": b"<!DOCTYPE"}[ending]
    assert path.read_bytes().startswith(head)
    assert list(tmp_path.iterdir()) == [path]


def test_page_holds_verdict_numbers_and_rules(sound: Probe) -> None:
    made = page([sound])
    assert verdict(sound) in made
    assert made.count("<svg") == 4
    assert "http" not in made.replace("http://www.w3.org", "")
    assert "gradient_vanishes" in made


def test_text_shows_theory_beside_measurement(sound: Probe) -> None:
    shown = text(sound)
    assert "forward variance" in shown
    assert shown.count("theory") == 3
    assert verdict(sound) in shown


# ---- from a configuration ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


def written(folder: Path, corpus: Path, **more: str) -> str:
    lines = {
        "name": "x",
        "model": "{scheme: pre_ln, num_layers: 2, hidden_size: 16, num_attention_heads: 2}",
        "data": f"{{corpora: [{{path: {corpus}}}], seq_length: 16}}",
        "optimizer": "{lr: 1e-2}",
        "train": "{steps: 1, global_batch_size: 1, micro_batch_size: 1}",
    }
    path = folder / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in {**lines, **more}.items()))
    return str(path)


def test_tokens_are_the_data_where_there_are_any_and_synthetic_else(data: Path, tmp_path: Path) -> None:
    (with_data,) = probes(written(tmp_path, data), [], Choices())
    assert with_data.tokens.endswith(str(data))
    assert with_data.model.vocab_size == 300
    (synthetic,) = probes(written(tmp_path, data), [], Choices(tokens="synthetic"))
    assert synthetic.tokens == "synthetic tokens after Zipf's law"
    (assumed,) = probes(written(tmp_path, tmp_path / "missing"), [], Choices(layers=1))
    assert "vocabulary of 32,000 assumed" in assumed.tokens
    assert assumed.num_layers == 1
    with pytest.raises(UserError, match="--tokens data"):
        next(probes(written(tmp_path, tmp_path / "missing"), [], Choices(tokens="data")))


def test_compare_measures_every_scheme_on_the_same_tokens(data: Path, tmp_path: Path) -> None:
    found = list(probes(written(tmp_path, data), [], Choices(compare="pre_ln,b2t:rescale=false", seeds=2)))
    assert [(one.label, one.scheme, one.seeds) for one in found] == [
        ("pre_ln", "pre_ln", 2),
        ("b2t:rescale=false", "b2t", 2),
    ]
    assert found[1].options == {"rescale": False}


def test_a_depth_without_constants_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^--layers 2: .*k.*$"):
        next(
            probes(
                written(tmp_path, tmp_path / "missing"),
                ["model.scheme=deepscalelm_pre_ln", "model.num_layers=3", "model.scheme_options.k=5"],
                Choices(layers=2),
            )
        )


def test_compared_schemes_have_their_own_weights_unless_the_command_line_says_otherwise(
    tmp_path: Path,
) -> None:
    config = written(tmp_path, tmp_path / "missing")
    path = tmp_path / "small_weights.yaml"
    path.write_text(
        f"include: [{config}]\nmodel: {{scheme: pre_ln, num_layers: 1, vocab_size: 50, init: {{base: normal, std: 0.01}}}}\n"
    )
    choices = Choices(compare="pre_ln,deepscalelm_pre_ln,b2t:init.base=xavier", batch=1)
    assert [one.model.init.base for one in probes(str(path), [], choices)] == ["normal", "scheme", "xavier"]
    assert [one.model.init.base for one in probes(str(path), ["model.init.base=normal"], choices)] == [
        "normal",
        "normal",
        "xavier",
    ]
    assert [one.model.init.std for one in probes(str(path), ["model.init.std=0.03"], choices)] == [
        0.03,
        0.03,
        0.02,
    ]


def test_a_checkpoint_is_measured_without_theory(data: Path, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, 6, num_layers=2)
    trainer = small_trainer(config)
    trainer.run()
    path = written(
        tmp_path,
        data,
        model="{scheme: pre_ln, num_layers: 2, hidden_size: 16, num_attention_heads: 2, max_position_embeddings: 16}",
    )
    (fresh,) = probes(path, [], Choices())
    (trained,) = probes(path, [], Choices(checkpoint=trainer.run_dir))
    assert trained.checkpoint is not None
    assert trained.layers[0].forward_variance_theory is None
    assert trained.loss < fresh.loss - 0.2
    assert "initialisation" not in verdict(trained)
    page([trained])
    with pytest.raises(UserError, match="num_layers"):
        next(probes(path, ["model.num_layers=3"], Choices(checkpoint=trainer.run_dir)))


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GiB are free"):
        next(
            probes(
                written(tmp_path, tmp_path, data=f"{{corpora: [{{path: {tmp_path}}}], seq_length: 4096}}"),
                ["model.hidden_size=8192"],
                Choices(layers=500),
            )
        )
    large = ModelConfig(
        num_layers=1000,
        hidden_size=128,
        num_attention_heads=4,
        vocab_size=4096,
        max_position_embeddings=128,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    assert memory_needed(large, 128, 2, torch.float32) < 10e9


def test_the_command(data: Path, tmp_path: Path) -> None:
    import typer

    from tools.probe import command

    app = typer.Typer()
    app.command()(command)
    config = written(tmp_path, data)
    out = CliRunner().invoke(
        app,
        [
            config,
            "--scheme",
            "b2t",
            "--layers",
            "3",
            "--json",
            str(tmp_path / "p.json"),
            "--plot",
            str(tmp_path / "p.png"),
        ],
    )
    assert out.exit_code == 0, out.output
    assert "b2t: trainable at initialisation" in out.output
    assert json.loads((tmp_path / "p.json").read_text())["num_layers"] == 3
    assert (tmp_path / "p.png").stat().st_size > 10_000
    out = CliRunner().invoke(
        app,
        [
            config,
            "--compare",
            "b2t,pre_ln",
            "--quiet",
            "--json",
            str(tmp_path / "c.json"),
            "--plot",
            str(tmp_path / "c.html"),
        ],
    )
    assert [line.split(":")[0] for line in out.output.splitlines()] == ["b2t", "pre_ln"]
    assert [one["scheme"] for one in json.loads((tmp_path / "c.json").read_text())["compare"]] == [
        "b2t",
        "pre_ln",
    ]
    for wrong in (
        ["--tokens", "x"],
        ["--dtype", "bf16"],
        ["--plot", "x.jpg"],
        ["--scheme", "x"],
        ["--compare", "b2t,b2t"],
        ["--compare", "b2t", "--scheme", "b2t"],
    ):
        failed = CliRunner().invoke(app, [config, *wrong])
        assert isinstance(failed.exception, UserError), wrong
