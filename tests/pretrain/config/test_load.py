"""Configuration: merging, overrides, round trips, and the one line a mistake gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from pretrain.config.compose import SHIPPED
from pretrain.config.keys import schema
from pretrain.config.load import complete_model, dump_config, explained, load_config, load_with_origins
from pretrain.config.schema import RunConfig
from tests.pretrain.config.minimal import MINIMAL, message


def test_numbers_without_a_dot_are_numbers(tiny: Path) -> None:
    assert load_config(tiny).optimizer.lr == 1e-3
    assert load_config(tiny, ["optimizer.lr=2e-4", "optimizer.eps=1E-6"]).optimizer.lr == 2e-4
    assert load_config(tiny, ["optimizer.lr=1"]).optimizer.lr == 1.0


def test_includes_merge_in_order_before_own_keys(tiny: Path) -> None:
    (tiny.parent / "pieces").mkdir()
    Path("pieces/a.yaml").write_text("model: {num_layers: 3, hidden_size: 16}\ntrain: {seed: 1}\n")
    Path("pieces/b.yaml").write_text("include: [c.yaml]\nmodel: {hidden_size: 32}\n")
    Path("pieces/c.yaml").write_text("train: {seed: 3, eval_interval: 7}\n")
    own = yaml.safe_load(MINIMAL)
    del own["model"]["hidden_size"], own["model"]["num_layers"]
    Path("run.yaml").write_text(yaml.safe_dump({"include": ["pieces/a.yaml", "pieces/b"], **own}))
    config = load_config("run.yaml")
    assert (
        config.model.num_layers,
        config.model.hidden_size,
        config.train.seed,
        config.train.eval_interval,
    ) == (3, 32, 3, 7)
    assert config.train.steps == 4


def test_overrides_apply_from_left_to_right(tiny: Path) -> None:
    Path("more.yaml").write_text("train: {steps: 6, seed: 5}\n")
    assert load_config(tiny, ["train.steps=5", "+include=more.yaml"]).train.steps == 6
    config = load_config(tiny, ["+include=more.yaml", "train.steps=5"])
    assert (config.train.steps, config.train.seed) == (5, 5)


def test_shipped_pieces_are_found_from_anywhere(tiny: Path) -> None:
    assert load_config(tiny, ["+include=configs/scheme/b2t.yaml"]).model.scheme == "b2t"
    assert load_config(tiny, ["+include=scheme/b2t"]).model.scheme == "b2t"


def test_lists_by_value_and_by_index(tiny: Path) -> None:
    config = load_config(
        tiny,
        [
            "data.corpora=[{path: x}, {path: y, weight: 2}]",
            "data.corpora.1.path=z",
            "data.corpora[0].weight=3",
        ],
    )
    assert [(corpus.path, corpus.weight) for corpus in config.data.corpora] == [("x", 3.0), ("z", 2.0)]
    assert "give the whole list" in message(tiny, "data.corpora.1.path=z")


def test_free_mappings_are_replaced_not_mixed(tiny: Path) -> None:
    Path("scheme.yaml").write_text("model: {scheme: mix_ln, scheme_options: {post_fraction: 0.5}}\n")
    config = load_config(tiny, ["model.scheme_options.k=4", "+include=scheme.yaml"])
    assert config.model.scheme_options == {"post_fraction": 0.5}
    assert (
        load_config(tiny, ["model.scheme_options.k=4", "model.scheme_options={}"]).model.scheme_options == {}
    )


def test_interpolation(tiny: Path) -> None:
    config = load_config(tiny, ["name=run_${model.scheme}", "model.ffn_hidden_size=${model.hidden_size}"])
    assert (config.name, config.model.ffn_hidden_size) == ("run_deepscalelm_pre_ln", 8)
    assert (
        message(tiny, "name=${model.nothing}")
        == "name: there is no key model.nothing for ${model.nothing} (command line)"
    )


def test_the_environment_gives_values(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load_config(tiny, ["runs_dir=${oc.env:SCRATCH}/runs", "train.seed=${oc.env:NO_SUCH_VARIABLE,7}"])
    assert (config.runs_dir, config.train.seed) == ("/scratch/me/runs", 7)


def test_a_piece_may_leave_a_key_open(tiny: Path) -> None:
    tiny.write_text(MINIMAL.replace("somewhere", "???"))
    assert message(tiny) == "data.corpora.0.path: must be set (tiny.yaml:8)"
    assert load_config(tiny, ["data.corpora.0.path=here"]).data.corpora[0].path == "here"


def test_an_empty_section_is_no_mistake(tiny: Path) -> None:
    tiny.write_text(MINIMAL + "checkpoint:\n  # interval: 3\nlog:\n")
    assert load_config(tiny).checkpoint.interval == 0


def test_numbers_are_read_as_yaml_1_2_and_names_as_they_are_written(tiny: Path) -> None:
    assert load_config(tiny, ["train.steps=010"]).train.steps == 10
    assert load_config(tiny, ["name=007", "runs_dir=2024", "checkpoint.load=1e5"]).name == "007"
    tiny.write_text(MINIMAL.replace("somewhere", "010").replace("name: tiny", "name: 1_0"))
    config = load_config(tiny)
    assert (config.name, config.data.corpora[0].path) == ("1_0", "010")


def test_a_missing_file_names_the_shipped_ones_like_it(tiny: Path) -> None:
    found = message("configs/quikstart.yaml")
    assert found == (
        "configuration configs/quikstart.yaml does not exist; there are quickstart, quickstart_bert, "
        "quickstart_vit"
    )


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_dump_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yaml") == config


PRINTABLE = st.text(
    st.characters(
        codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"), exclude_characters="\ufeff\ufffe\uffff"
    ),
    min_size=1,
)
TRICKY = st.text(st.sampled_from("\\\\${}a.:# '\""), min_size=1)


@settings(max_examples=20, deadline=None)
@given(text=PRINTABLE | TRICKY, number=st.floats(1e-30, 1e30))
def test_a_dump_keeps_any_text_and_number(
    text: str, number: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("dump") / "dump.yaml"
    values: dict[str, Any] = yaml.safe_load(MINIMAL)
    values["optimizer"]["lr"] = number
    values["data"]["corpora"] = [{"path": text}]
    config = RunConfig.model_validate(values)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "text", ["1e5", "${model.scheme}", "\\${a}", "null", "true", "2020-01-01", "a: b", "0x10", " ", "~"]
)
def test_a_dump_keeps_text_that_looks_like_something_else(text: str, tmp_path: Path) -> None:
    values = yaml.safe_load(MINIMAL)
    values["data"]["corpora"] = [{"path": text}]
    config = RunConfig.model_validate(values)
    (tmp_path / "dump.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dump.yaml").data.corpora[0].path == text


def test_describe_tells_value_default_meaning_and_source(tiny: Path) -> None:
    config, composition = load_with_origins(tiny, ["train.seed=7", "train.nan_guard=stop"])
    rows = {row.key: row for row in explained(config, composition)}
    assert (
        rows["train.seed"].value,
        rows["train.seed"].default,
        rows["train.seed"].changed,
        rows["train.seed"].source,
    ) == (7, 1234, True, "command line")
    assert (rows["train.nan_guard"].changed, rows["train.nan_guard"].source) == (False, "command line")
    assert (rows["train.steps"].required, rows["train.steps"].source) == (True, "tiny.yaml:13")
    assert (rows["data.corpora.0.path"].value, rows["data.corpora.0.path"].source) == (
        "somewhere",
        "tiny.yaml:8",
    )
    assert (rows["log.interval"].changed, rows["log.interval"].source) == (False, "")
    assert all(row.description for row in rows.values())


def test_describe_has_every_key_of_the_schema(tiny: Path) -> None:
    shown = {row.key.replace(".0.", ".*.") for row in explained(load_config(tiny))}
    absent = {field.key for field in schema().values() if field.kind == "section" and field.default is None}
    wanted = {
        field.key
        for field in schema().values()
        if field.kind in ("value", "free") and not field.key.startswith(tuple(f"{key}." for key in absent))
    }
    inside = {key for key in absent if key.startswith(tuple(f"{other}." for other in absent))}
    assert shown == wanted | absent - inside


def test_a_section_that_is_not_there_by_default_asks_for_nothing(tiny: Path) -> None:
    assert load_config(tiny).model.image is None
    with pytest.raises(UserError, match=r"^model\.image\.height and model\.image\.patch must be set$"):
        load_config(tiny, ["model.image.channels=1"])


def test_complete_model_takes_sizes_from_the_data(tiny: Path) -> None:
    config = load_config(tiny)
    model = complete_model(config, vocab_size=100)
    assert (model.vocab_size, model.padded_vocab, model.max_position_embeddings) == (100, 128, 16)
    with pytest.raises(UserError, match="model.vocab_size=99 differs from the tokenizer's 100"):
        complete_model(load_config(tiny, ["model.vocab_size=99"]), 100)
    with pytest.raises(UserError, match="data.seq_length=16 exceeds model.max_position_embeddings=8"):
        complete_model(load_config(tiny, ["model.max_position_embeddings=8"]))
