"""Every shipped configuration loads, and is what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from model.depth.schemes import SCHEMES
from model.parameters.size import parameter_count
from pretrain.config.compose import SHIPPED
from pretrain.config.load import complete_model, load_config
from pretrain.config.scheme_choice import parse_variant

RUNS = sorted(SHIPPED.glob("*.yaml"))
PIECES = sorted(SHIPPED.glob("*/*.yaml"))
FAMILY = sorted(SHIPPED.glob("deep_1p5b_*_layers.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_runs_load_under_their_own_names(path: Path) -> None:
    config = load_config(path)
    assert config.name.startswith(path.stem)
    assert (
        config.train.global_batch_size % (config.train.micro_batch_size * (config.parallel.processes or 1))
        == 0
    )


@pytest.mark.parametrize("path", PIECES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_pieces_fit_into_a_run(path: Path) -> None:
    family = yaml.safe_load(path.read_text()).get("model", {}).get("family")
    run = "quickstart_translation.yaml" if family == "seq2seq" else "quickstart.yaml"
    load_config(SHIPPED / run, [f"+include={path}"])


def test_every_scheme_has_a_piece_that_chooses_it() -> None:
    pieces = {path.stem: path for path in PIECES if path.parent.name == "scheme"}
    assert set(pieces) == set(SCHEMES)
    recipes = {path.stem: path for path in PIECES if path.parent.name == "recipe"}
    assert set(recipes) == set(SCHEMES)
    for name, path in recipes.items():
        assert load_config(SHIPPED / "quickstart.yaml", [f"+include={path}"]).model.scheme == name
        assert parse_variant(str(path)).scheme == name
    for name, path in pieces.items():
        assert not {"optimizer", "schedule"} & set(yaml.safe_load(path.read_text())), "rates live in recipes"
        for options in ([], ["model.scheme_options={rescale: true}", "model.scheme=b2t"]):
            config = load_config(SHIPPED / "quickstart.yaml", [*options, f"+include={path}"])
            chosen = yaml.safe_load(path.read_text())["model"].get("scheme_options", {})
            assert (config.model.scheme, config.model.scheme_options, config.name) == (
                name,
                chosen,
                "quickstart",
            )


def test_a_scheme_included_over_other_weights_brings_its_own() -> None:
    for name in SCHEMES:
        config = load_config(SHIPPED / "gpt2_xl.yaml", [f"+include={SHIPPED / 'scheme' / name}.yaml"])
        assert config.model.init.base == (
            "normal" if name in ("pre_ln", "mix_ln", "spannorm", "hybridnorm") else "scheme"
        )


@pytest.mark.parametrize("path", FAMILY, ids=lambda path: path.stem)
def test_the_family_has_one_size(path: Path) -> None:
    model = complete_model(load_config(path))
    total = parameter_count(model)["total"]
    assert abs(total / 1.5e9 - 1) < 0.03
    assert f"{model.num_layers}_layers" in path.stem
    assert (model.kv_channels, model.hidden_size % 64) == (64, 0)
    stated = re.match(r"# ([\d.]+) billion", path.read_text())
    assert stated is not None
    assert f"{total / 1e9:.3f}" == stated[1]


def test_the_family_spans_24_to_1000_layers() -> None:
    assert sorted(load_config(path).model.num_layers for path in FAMILY) == [24, 48, 96, 192, 384, 1000]


def test_quickstart_is_deep_and_small() -> None:
    config = load_config("quickstart")
    assert (
        config.model.num_layers,
        config.model.hidden_size,
        config.data.seq_length,
        config.parallel.processes,
    ) == (48, 64, 128, 2)
    assert config.model.vocab_size is None
