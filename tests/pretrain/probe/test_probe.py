"""The probe: statistics against plain autograd, tokens, configurations and the command."""

from __future__ import annotations

import json
import math
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
from pretrain.config.load import load_config
from pretrain.data.images.statistics import patch_correlations
from pretrain.data.manifest import load_manifest
from pretrain.data.samples import open_samples
from pretrain.probe.measure import log_mean_square, zipf_tokens
from pretrain.probe.report import page, text
from pretrain.probe.rules import findings, verdict
from pretrain.probe.setup import Choices, memory_needed, probes
from pretrain.probe.synthetic import SYNTHETIC
from pretrain.train.build import build_chunks, seed_everything
from tests.model.narrow import without_units
from tests.pretrain.pictures import picture_data
from tests.pretrain.probe.probes import LENGTH, measured, model, plain_correlation
from tests.pretrain.small import small_config, small_data, small_trainer
from tests.pretrain.trained.encoders import SIZE, save_encoder

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
    loss = chunk({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}).mean()
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
        assert layer.common_share == pytest.approx(plain_share(streams[index + 1]))
        assert layer.weight_grad_norms == pytest.approx(norms[index])
        assert layer.weight_grad_norm == pytest.approx(
            math.sqrt(sum(norm**2 for norm in norms[index].values()))
        )


START = "is the bias that starts the logits"


@pytest.mark.parametrize("scheme", ["post_ln:branch=1", "keel"])
def test_the_start_of_the_logits_is_in_theory_and_in_no_rule(scheme: str) -> None:
    """The last norm, whose bias it is, stands inside of the last layer."""
    found = measured(model(f"{scheme}:init.unigram=true", hidden_size=32), seeds=tuple(range(16)))
    last = found.layers[-1]
    assert found.start_variance == pytest.approx(100 / 32 - (10 / 32) ** 2)
    assert last.forward_variance_theory == pytest.approx(1 + found.start_variance)
    assert last.forward_variance == pytest.approx(last.forward_variance_theory, rel=0.04)
    assert last.token_correlation == pytest.approx(last.token_correlation_theory, rel=0.04)
    assert [finding.rule for finding in findings(found)] == []
    assert f"3.03 of the variance after the last layer {START}" in text(found)
    assert START in page([found])


def test_a_norm_behind_the_layers_takes_the_start_of_the_logits_out_of_them() -> None:
    found = measured(model("pre_ln:init.unigram=true"))
    assert found.start_variance == 0
    assert START not in text(found)


@pytest.mark.parametrize("scheme", ["deepscalelm_pre_ln", "deepscalelm_post_ln", "deepnorm"])
def test_units_in_which_layers_compute_do_not_show(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model(scheme, layers=4)
    found = measured(config)
    without_units(monkeypatch)
    plain = measured(config)
    assert found.embedding_variance == pytest.approx(plain.embedding_variance, rel=1e-10)
    for ours, theirs in zip(found.layers, plain.layers, strict=True):
        both = [{**vars(layer), **layer.weight_grad_norms} for layer in (ours, theirs)]
        numbers = {key for key, value in both[0].items() if isinstance(value, int | float)}
        assert len(numbers) == 25
        for key in numbers:
            assert both[0][key] == pytest.approx(both[1][key], rel=1e-9, abs=1e-12), key


def test_bfloat16_shows_what_float32_shows(data: Path, tmp_path: Path) -> None:
    """At a depth at which DeepScaleLM's residual constant is lost in a product in bfloat16."""
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


@pytest.mark.parametrize("source", ["data", "synthetic"])
def test_an_encoder_is_measured_on_its_own_task(source: str, tmp_path: Path) -> None:
    """The loss is that of hidden tokens, and its gradient reaches all layers."""
    save_encoder(tmp_path)
    model = (
        "{family: bert, position: rotary, token_types: 2, "
        "num_layers: 3, hidden_size: 16, num_attention_heads: 2}"
    )
    config = written(tmp_path, tmp_path / "data", model=model, masking="{rate: 0.5, random_share: 0}")
    choices = Choices(tokens=source, batch=3, dtype="float64", compare="deepscalelm_pre_ln,b2t")
    deepscale, b2t = probes(config, [], choices)
    assert deepscale.model.init.mask_token_share == pytest.approx(0.4)
    assert b2t.model.init.mask_token_share is None
    loaded = load_config(config, [])
    topology = single_process()
    seed_everything(loaded.train.seed, topology)
    (chunk,) = build_chunks(b2t.model, topology, seq_length=16, dtype=torch.float64, seed=loaded.train.seed)
    if source == "data":
        batch = open_samples(loaded, "masked", "train", alone=True).batch(range(3))
    else:
        whole = loaded.model_copy(update={"model": b2t.model})
        batch = SYNTHETIC["masked"].batch(whole, SIZE, 3, loaded.train.seed)
        assert torch.equal((batch["tokens"] == SIZE - 1).sum(1) > 3, torch.ones(3, dtype=torch.bool))
    weights = batch.pop("weights")
    losses = chunk(batch).detach()
    assert b2t.loss == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-6)
    assert all(0 < layer.weight_grad_norm < math.inf for layer in b2t.layers)
    held = [len(set(row.tolist()) - {0}) for row in batch["documents"]]
    assert deepscale.documents == pytest.approx(sum(held) / 3)
    said = "which do not see each other: theory takes all of them as long as their mean"
    assert (said in text(deepscale)) == (deepscale.documents > 1) == (source == "data")


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_model_of_images_is_measured_on_its_classes(mixup: float, tmp_path: Path) -> None:
    """With a head of unit logits: zeros would hand no gradient down."""
    model = (
        "{family: vit, tie_embeddings: false, vocab_multiple: 2, num_layers: 3, hidden_size: 32, "
        "num_attention_heads: 2, image: {height: 8, patch: 4}}"
    )
    config = written(tmp_path, picture_data(tmp_path), model=model, augment=f"{{mixup: {mixup}}}")
    overrides, choices = ["data.seq_length=5"], Choices(batch=16, dtype="float64", scheme="b2t")
    (found,) = probes(config, overrides, choices)
    facts = load_manifest(tmp_path / "data").patch_correlations
    assert found.model.image is not None
    assert found.model.image.patch_correlation == facts[4]
    assert found.model.vocab_size == 2
    assert found.loss != pytest.approx(math.log(2), rel=1e-3)
    assert found.loss < 1.4
    assert found.layers[-1].token_correlation == pytest.approx(
        found.layers[-1].token_correlation_theory or math.nan, abs=0.25
    )
    assert all(0.3 < layer.grad_variance_late < 3 for layer in found.layers)
    assert "training starts it at zero with model.image.zero_head=true" in text(found)
    assert "images of " in text(found)


def test_images_that_are_not_there_are_gaussian_and_correlate_as_planned() -> None:
    image = {"height": 12, "channels": 2, "patch": 3, "patch_correlation": 0.4}
    config = load_config(
        "configs/quickstart_vit.yaml",
        ["data.seq_length=17", *(f"model.image.{k}={v}" for k, v in image.items())],
    )
    batch = SYNTHETIC["images"].batch(config, 10, 400, 0)
    assert float(batch["images"].var()) == pytest.approx(1, abs=0.02)
    assert patch_correlations(batch["images"].numpy())[3] == pytest.approx(0.4, abs=0.02)
    assert set(batch["labels"].flatten().tolist()) == set(range(10))


def plain_share(x_sbh: Tensor) -> float:
    """Mean product of all pairs of tokens, of a token with itself too, over the mean square."""
    x = x_sbh.detach().flatten(0, 1)
    return float((x @ x.T).mean() / x.square().sum(1).mean())


def kind_norms(chunk: Any, config: ModelConfig) -> list[dict[str, float]]:
    """Gradient norms by kind.

    The fused projection is taken apart by the documented naming of `model.stack`.
    """
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
    from pretrain.probe.places import Places

    config = model()
    (chunk,) = build_chunks(config, single_process(), seq_length=LENGTH, dtype=torch.float32, seed=1)
    with Meter(chunk, config, [Places()]):
        tokens = zipf_tokens(50, 2, LENGTH, 1)
        chunk({"tokens": tokens, "labels": tokens}).mean().backward()
    assert all(parameter.grad is None for parameter in chunk.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in chunk.decoder.layers)


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
    assert found[1].options["rescale"] is False


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
        f"include: [{config}]\n"
        "model: {scheme: pre_ln, num_layers: 1, vocab_size: 50, init: {base: normal, std: 0.01}}\n"
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
        model="{scheme: pre_ln, num_layers: 2, hidden_size: 16, num_attention_heads: 2, "
        "max_position_embeddings: 16}",
    )
    (fresh,) = probes(path, [], Choices())
    (trained,) = probes(path, [], Choices(checkpoint=trainer.run_dir))
    assert trained.checkpoint is not None
    assert trained.layers[0].forward_variance_theory is None
    assert trained.loss < fresh.loss - 0.2
    assert "initialisation" not in verdict(trained)
    page([trained])
    step = next((trainer.run_dir / "checkpoints").glob("step_*"))
    (trainer.run_dir / "config.yaml").write_text(Path(path).read_text())
    for folder in (trainer.run_dir, trainer.run_dir / "checkpoints", step):
        (own,) = probes(str(folder), ["model.vocab_size=300"], Choices())
        assert own.layers == trained.layers
    with pytest.raises(UserError, match="leave out --scheme"):
        next(probes(str(step), [], Choices(scheme="b2t")))
    (trainer.run_dir / "config.yaml").unlink()
    with pytest.raises(UserError, match="no config.yaml"):
        next(probes(str(step), [], Choices()))
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

    from tools.research.probe import command

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
    # Nothing else on standard output.
    out = CliRunner().invoke(app, [config, "--scheme", "b2t", "--layers", "3", "--json", "-"])
    assert json.loads(out.stdout) == json.loads((tmp_path / "p.json").read_text())
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
    for wrong in (["--json", "/dev/full"], ["--plot", f"{config}/x.png"], ["--plot", f"{config}/x.html"]):
        failed = CliRunner().invoke(app, [config, *wrong])
        assert str(failed.exception).startswith(" ".join(wrong))
        assert failed.output == ""  # nothing was measured
