"""Rules of the probe: each speaks where it should, and real models get the right verdict."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pretrain.probe.records import Probe
from pretrain.probe.rules import RULES, findings, trainable, verdict
from tests.pretrain.probe.probes import changed, measured, model


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


def test_a_stack_that_forgets_is_named_with_its_layers(sound: Probe) -> None:
    shares = [0.5, 0.96, 0.99, 0.99]
    merged = replace(
        sound,
        layers=tuple(
            replace(layer, common_share=share, forgetting=-9.0)
            for layer, share in zip(sound.layers, shares, strict=True)
        ),
    )
    assert names(merged) == ["stack_forgets"]
    assert trainable(merged) == "no"
    assert "in layers 2-4 the stream is nearly one vector" in verdict(merged)
    assert "1e-3.9 of what differs" in verdict(merged)
    assert names(changed(merged, 0, forgetting=-4.0)) == []
    assert names(changed(changed(merged, 1, common_share=0.9), 2, common_share=0.9)) == []


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
