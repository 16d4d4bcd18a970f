"""A probe of an encoder and the decoder over it: each stack by itself, cross-attention apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from parallel.launch.one_process import single_process
from pretrain.probe.measure import probe, zipf_tokens
from pretrain.probe.records import Probe
from pretrain.probe.report import json_text, text, write_plot
from pretrain.probe.rules import findings, verdict
from pretrain.probe.setup import Choices, memory_needed, probes
from pretrain.probe.stacks import expectation, parts, share_of_reader
from pretrain.tasks.task import Batch
from pretrain.tasks.translation import TRANSLATION
from pretrain.train.build import build_chunks, seed_everything
from tests.pretrain.clips import write_speech
from tests.pretrain.probe.probes import plain_correlation

SOURCE, LENGTH, ENCODER, DECODER, VOCAB = 10, 12, 3, 4, 50

LEARNED: dict[str, Any] = {
    "position": "learned",
    "max_position_embeddings": LENGTH,
    "max_source_positions": SOURCE,
}


def model(scheme: str, width: int = 16, **changes: Any) -> ModelConfig:
    fields = {"family": "seq2seq", "scheme": scheme, "num_layers": DECODER, "encoder_layers": ENCODER}
    sizes = {"hidden_size": width, "num_attention_heads": 4, "vocab_size": VOCAB}
    return ModelConfig.model_validate(fields | sizes | {"position": "sinusoidal"} | changes)


def batch(seed: int) -> Batch:
    source, tokens = zipf_tokens(VOCAB, 2, SOURCE, seed), zipf_tokens(VOCAB, 2, LENGTH + 1, seed + 100)
    return {"source": source, "tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def packed(seed: int) -> Batch:
    """Two texts in a row and padding behind them, of other lengths in each row and on each side."""
    found = batch(seed)
    for key, bounds in {"source_documents": ((3, 7), (5, 10)), "documents": ((6, 11), (2, 9))}.items():
        places = torch.arange(SOURCE if key == "source_documents" else LENGTH)
        rows = [(places < first).long() + 2 * ((places >= first) & (places < end)) for first, end in bounds]
        found[key] = torch.stack(rows)
    return found | {"weights": (found["documents"] > 0).double()}


def measured(
    config: ModelConfig, seeds: tuple[int, ...] = (5,), batches: Callable[[int], Batch] = batch
) -> Probe:
    return probe(
        config,
        single_process(),
        seq_length=LENGTH,
        source_length=SOURCE,
        task=TRANSLATION,
        batches=batches,
        seeds=seeds,
        dtype=torch.float64,
    )


@pytest.fixture(scope="module")
def sound() -> Probe:
    return measured(model("deepscalelm_pre_ln"))


def second_halves(texts_sb: Tensor) -> Tensor:
    """True in the second half of each text of each row."""
    found = torch.zeros_like(texts_sb, dtype=torch.bool)
    for row in range(texts_sb.shape[1]):
        for number in set(texts_sb[:, row].tolist()) - {0}:
            (places,) = torch.where(texts_sb[:, row] == number)
            found[places[len(places) // 2 :], row] = True
    return found


def square(x: Tensor) -> float:
    return float(x.detach().square().mean())


def kind_norms(chunk: LanguageModel, found: Probe) -> list[dict[str, float]]:
    """Norms of the gradients of every layer's matrices, by kind."""
    kinds = [dict.fromkeys(layer.weight_grad_norms, 0.0) for layer in found.layers]
    for named in named_parameters(chunk, 0, 1):
        row, gradient = named.row, named.parameter.grad
        if row.layer is not None and row.blocks is not None and named.name.endswith("weight"):
            assert gradient is not None
            for role, part in row.blocks.by_role(gradient).items():
                kinds[row.layer]["c" * (row.sublayer == "cross") + role] += float(part.square().sum())
    return [{kind: math.sqrt(total) for kind, total in layer.items()} for layer in kinds]


@pytest.mark.parametrize(
    ("scheme", "batches"), [("pre_ln", batch), ("b2t", batch), ("deepscalelm_post_ln", packed)]
)
def test_every_statistic_is_what_autograd_gives_in_both_stacks(
    scheme: str, batches: Callable[[int], Batch]
) -> None:
    """Of rows with padding it is that of their texts."""
    config = model(scheme)
    found = measured(config, batches=batches)
    given = batches(5)
    texts = [given.get("source_documents", torch.ones(2, SOURCE)).t()] * ENCODER
    texts += [given.get("documents", torch.ones(2, LENGTH)).t()] * DECODER
    topology = single_process()
    seed_everything(5, topology)
    (chunk,) = build_chunks(
        config, topology, seq_length=LENGTH, source_length=SOURCE, dtype=torch.float64, seed=5
    )
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    crossed: list[float] = []

    def keep(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        encoder = len(leaving) < ENCODER
        into = kwargs["context" if encoder and leaving else "hidden_states"]
        into.retain_grad()
        entering.append(into)
        leaving.append(output[int(encoder)])

    def add(join: Any, args: Any, output: Tensor) -> None:
        branch, factor, kept = join.terms(*args)
        own = texts[-1] > 0
        crossed.append(math.sqrt(square(branch[own]) * float(factor) ** 2 / square(kept[own])))

    layers = chunk.decoder.layers
    for layer in layers:
        layer.register_forward_hook(keep, with_kwargs=True)
        if layer.has_cross:
            layer.cross_attention_join.register_forward_hook(add)
    losses = chunk({key: value for key, value in given.items() if key != "weights"})
    loss = losses[given["documents"] > 0].mean() if "weights" in given else losses.mean()
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()))
    names = [(layer.stack, layer.layer) for layer in found.layers]
    assert names == [("encoder", n + 1) for n in range(ENCODER)] + [
        ("decoder", n + 1) for n in range(DECODER)
    ]
    gradients = [stream.grad for stream in entering if stream.grad is not None]
    gradients[0] = gradients[0][:SOURCE]  # the first layer gets both streams in one
    squares = [square(gradient[text > 0]) for gradient, text in zip(gradients, texts, strict=True)]
    late = [square(gradient[second_halves(text)]) for gradient, text in zip(gradients, texts, strict=True)]
    kinds = kind_norms(chunk, found)
    for index, layer in enumerate(found.layers):
        top = ENCODER - 1 if index < ENCODER else ENCODER + DECODER - 1
        stream, plan = leaving[index].detach(), layers[index].plan
        variance = float(stream[texts[index] > 0].var()) * plan.leaving**2
        assert layer.forward_variance == pytest.approx(variance)
        assert layer.token_correlation == pytest.approx(plain_correlation(stream, texts[index]))
        assert layer.grad_variance == pytest.approx(squares[index] / squares[top])
        assert layer.grad_variance_late == pytest.approx(late[index] / late[top])
        assert layer.weight_grad_norms == pytest.approx(kinds[index])
    ratios = [layer.branch_ratio_cross for layer in found.layers]
    assert ratios[:ENCODER] == [None] * ENCODER
    assert ratios[ENCODER:] == pytest.approx(crossed)


def test_an_encoders_gradient_grows_as_far_as_theory_has_it() -> None:
    """Between independent token gradients and equal ones; the decoder's has a line of theory."""
    found = measured(model("deepscalelm_pre_ln", 64, num_layers=12, encoder_layers=12, **LEARNED), (1, 2, 3))
    (_, encoder), (_, decoder) = parts(found)
    assert found.gradient_limits is not None
    low, high = found.gradient_limits
    assert low < 1 < encoder.layers[0].grad_variance < high * 1.3
    assert {layer.grad_variance_late_theory for layer in encoder.layers} == {None}
    for layer in decoder.layers:
        assert layer.grad_variance_late == pytest.approx(layer.grad_variance_late_theory, rel=0.25)
        assert layer.branch_ratio_cross == pytest.approx(layer.branch_ratio_cross_theory, rel=0.3)
    said = expectation(found)
    assert said is not None
    assert f"{low:.2g} to {high:.2g} times the last layer's is expected" in said
    assert "gradient_grows" not in {finding.rule for finding in findings(found)}


def test_a_model_of_speech_is_what_theory_says_of_its_clips(tmp_path: Path) -> None:
    """Rows hold eight clips: of whole rows theory has a correlation of 0.18 in the first layer."""
    write_speech(tmp_path)
    (found,) = probes(
        "configs/quickstart_speech.yaml",
        [
            f"data.corpora=[{{path: {tmp_path / 'data'}}}]",
            "data.source_length=64",
            "data.seq_length=56",
            "model.hidden_size=128",
            "model.speech.filters=20",
            "model.encoder_layers=4",
            "model.num_layers=3",
            "spec_augment={}",
        ],
        Choices(seeds=2),
    )
    assert found.documents > 5
    for layer in found.layers:
        assert layer.forward_variance == pytest.approx(layer.forward_variance_theory, rel=0.07)
        assert layer.token_correlation == pytest.approx(layer.token_correlation_theory, abs=0.05)
    assert verdict(found).startswith("trainable at initialisation")
    assert [finding for finding in findings(found) if finding.level != "note"] == []


def test_an_encoder_that_starts_apart_is_named() -> None:
    """Rescaled B2T has two cross matrices of N^-1/2 between the encoder and the loss."""
    found = measured(model("b2t", num_layers=18, encoder_layers=18))
    (_, encoder), _ = parts(found)
    assert share_of_reader(encoder) < 0.1
    named = {finding.rule: finding for finding in findings(found)}
    assert named["encoder_starts_apart"].stack == "encoder"
    assert verdict(found).startswith("trainable at initialisation, although encoder: the weight gradients")


def test_rules_look_at_each_stack(sound: Probe) -> None:
    """A decoder that starts at another variance than its encoder ends with has not grown."""
    assert not [finding for finding in findings(sound) if finding.level != "note"]
    layers = [
        replace(layer, forward_variance=1e9 if layer.stack == "decoder" else 1.0) for layer in sound.layers
    ]
    assert "stream_explodes" not in {f.rule for f in findings(replace(sound, layers=tuple(layers)))}
    layers[1] = replace(layers[1], forward_variance=1e9)
    broken = findings(replace(sound, layers=tuple(layers)))[0]
    assert (broken.rule, broken.stack, broken.layer) == ("stream_explodes", "encoder", 2)
    assert broken.message.startswith("encoder: the forward variance grows")


def test_unscaled_cross_attention_shows() -> None:
    """As in the published code, whose decoder grows by a whole branch a layer."""
    config = model("deepscalelm_pre_ln", num_layers=18, encoder_layers=2)
    unscaled = measured(config.model_copy(update={"scheme_options": {"unscaled_cross": True}}))
    assert measured(config).layers[-1].forward_variance < 2
    assert unscaled.layers[-1].forward_variance > 4
    assert unscaled.layers[-1].forward_variance_theory > 4  # type: ignore[operator]


def test_reports_name_both_stacks(sound: Probe, tmp_path: Path) -> None:
    shown = text(sound)
    assert "3 + 4 layers of width 16, 10 + 12 tokens" in shown
    assert "encoder 3" in shown
    assert "cross / stream" in shown
    assert "encoder: a gradient variance of" in shown
    written = json.loads(json_text([sound], compare=False))
    assert [layer["stack"] for layer in written["layers"]] == ["encoder"] * ENCODER + ["decoder"] * DECODER
    assert written["encoder_gradient"] == list(sound.gradient_limits or ())
    assert "branch_ratio_cross" not in written["layers"][0]
    write_plot([sound], tmp_path / "one.html")
    assert "Cross-attention" in (tmp_path / "one.html").read_text()
    write_plot([sound, sound], tmp_path / "two.svg")


def test_the_command_draws_both_sides() -> None:
    (found,) = probes(
        "configs/quickstart_translation.yaml",
        [
            "data.source_length=12",
            "data.seq_length=16",
            "model.hidden_size=16",
            "model.num_attention_heads=2",
        ],
        Choices(layers=2, tokens="synthetic"),
    )
    assert [layer.stack for layer in found.layers] == ["encoder"] * 2 + ["decoder"] * 2
    assert (found.source_length, found.seq_length) == (12, 16)
    more = memory_needed(found.model, 16, 2, torch.float32, 24)
    assert more > memory_needed(found.model, 16, 2, torch.float32, 12)
