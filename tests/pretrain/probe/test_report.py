"""What the probe writes: JSON, pictures, pages and text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.probe.records import Probe
from pretrain.probe.report import as_json, json_text, page, text, write_plot
from pretrain.probe.rules import verdict
from tests.pretrain.probe.probes import changed


def test_json_has_the_promised_keys(sound: Probe) -> None:
    found = json.loads(json_text([sound], compare=False))
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
    assert made.count("<svg") == 6
    assert "http" not in made.replace("http://www.w3.org", "")
    assert "gradient_vanishes" in made


def test_text_shows_theory_beside_measurement(sound: Probe) -> None:
    shown = text(sound)
    assert "forward variance" in shown
    assert shown.count("theory") == 3
    assert verdict(sound) in shown
