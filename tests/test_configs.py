"""Every shipped configuration loads, and is what its name says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from model.depth.schemes import SCHEMES
from model.hf.folding.obstacles import obstacle
from model.parameters.size import parameter_count
from pretrain.config.compose import SHIPPED
from pretrain.config.load import complete_model, load_config
from pretrain.config.scheme_choice import parse_variant

RUNS = sorted(SHIPPED.glob("*.yaml"))
PIECES = sorted(SHIPPED.glob("*/*.yaml"))
FAMILIES = {
    # Of the name: parameters, what a head of the file counts in, and all depths.
    "deep_1p5b": (1.5e9, ("billion", 1e9, 3), [24, 48, 96, 192, 384, 1000]),
    "deep_bert_base": (184.1e6, ("million", 1e6, 1), [12, 48, 96, 192, 384]),
    "deep_bert_large": (335.2e6, ("million", 1e6, 1), [24, 48, 96, 192, 384]),
    "deep_vit_base": (86.0e6, ("million", 1e6, 1), [12, 48, 96, 192]),
}
MEMBERS = [(name, path) for name in FAMILIES for path in sorted(SHIPPED.glob(f"{name}_[0-9]*_layers.yaml"))]


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
    content = yaml.safe_load(path.read_text())
    family = "vit" if "augment" in content else content.get("model", {}).get("family")
    runs = {"seq2seq": "quickstart_translation.yaml", "vit": "quickstart_vit.yaml"}
    run = runs.get(family, "quickstart.yaml")
    # Patches of the quick start's images are 17 tokens.
    tokens = ["data.seq_length=17", "augment.shift=0"] if family == "vit" else []
    load_config(SHIPPED / run, [f"+include={path}", *tokens])


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


def test_modernbert_has_the_size_of_the_published_one() -> None:
    model = complete_model(load_config(SHIPPED / "modernbert_base.yaml"))
    assert abs(parameter_count(model)["total"] / 149e6 - 1) < 0.01
    assert obstacle("modernbert", model) is None


@pytest.mark.parametrize(("name", "path"), MEMBERS, ids=[path.stem for _, path in MEMBERS])
def test_a_family_has_one_size(name: str, path: Path) -> None:
    size, (word, unit, digits), _ = FAMILIES[name]
    model = complete_model(load_config(path))
    total = parameter_count(model)["total"]
    assert abs(total / size - 1) < 0.03
    assert f"{model.num_layers}_layers" in path.stem
    assert (model.kv_channels, model.hidden_size % 64) == (64, 0)
    stated = re.match(rf"# ([\d.]+) {word}", path.read_text())
    assert stated is not None
    assert f"{total / unit:.{digits}f}" == stated[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_all_its_depths(name: str) -> None:
    found = [load_config(path).model.num_layers for family, path in MEMBERS if family == name]
    assert sorted(found) == FAMILIES[name][2]


@pytest.mark.parametrize("name", [name for name in FAMILIES if "bert" in name])
def test_the_bert_families_train_alike(name: str) -> None:
    """All but the shape is one, and as `BertForMaskedLM` has it."""
    runs = [load_config(path) for family, path in MEMBERS if family == name]
    shape = {"num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"}
    for run in runs:
        assert run.model.model_dump(exclude=shape) == runs[0].model.model_dump(exclude=shape)
        assert (run.model.depth_plan().embedding_norm, run.model.token_types) == (True, 2)
        rest = {"model", "name"}
        assert run.model_dump(exclude=rest) == runs[0].model_dump(exclude=rest)


def test_quickstart_is_deep_and_small() -> None:
    config = load_config("quickstart")
    assert (
        config.model.num_layers,
        config.model.hidden_size,
        config.data.seq_length,
        config.parallel.processes,
    ) == (48, 64, 128, 2)
    assert config.model.vocab_size is None
