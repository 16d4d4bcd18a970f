"""Configuration: merging, overrides, round trips, and the one line a mistake gets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import UserError
from pretrain.config.compose import SHIPPED
from pretrain.config.keys import schema
from pretrain.config.load import complete_model, describe, dump_config, load_config, load_with_origins
from pretrain.config.schema import RunConfig

MINIMAL = """\
name: tiny
model:
  num_layers: 2
  hidden_size: 8
  num_attention_heads: 2
data:
  corpora:
    - path: somewhere
  seq_length: 16
optimizer:
  lr: 1e-3
train:
  steps: 4
  global_batch_size: 2
  micro_batch_size: 1
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MINIMAL)
    return Path("tiny.yaml")


def message(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


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


def test_a_piece_may_leave_a_key_open(tiny: Path) -> None:
    tiny.write_text(MINIMAL.replace("somewhere", "???"))
    assert message(tiny) == "data.corpora.0.path: must be set (tiny.yaml:8)"
    assert load_config(tiny, ["data.corpora.0.path=here"]).data.corpora[0].path == "here"


def test_an_empty_section_is_no_mistake(tiny: Path) -> None:
    tiny.write_text(MINIMAL + "checkpoint:\n  # interval: 3\nlog:\n")
    assert load_config(tiny).checkpoint.interval == 0


@pytest.mark.parametrize(
    ("override", "text"),
    [
        (
            "model.num_layer=3",
            "model.num_layer is not a known key (command line); did you mean model.num_layers?",
        ),
        (
            "train.num_layers=3",
            "train.num_layers is not a known key (command line); did you mean model.num_layers?",
        ),
        ("lr=1", "lr is not a known key (command line); did you mean optimizer.lr?"),
        ("optim={lr: 1}", "optim.lr is not a known key (command line); did you mean optimizer.lr?"),
        (
            "data.corpora.0.pth=x",
            "data.corpora.0.pth is not a known key (command line); did you mean data.corpora.0.path?",
        ),
        ("zzz=1", "zzz is not a known key (command line); `fathom config FILE` lists all keys"),
        ("train.steps=many", "train.steps='many' must be a whole number (command line)"),
        ("train.steps='3'", "train.steps='3' must be a whole number (command line)"),
        ("train.steps=1.5", "train.steps=1.5 must be a whole number (command line)"),
        ("train.steps=true", "train.steps=true must be a whole number (command line)"),
        ("train.steps=0", "train.steps=0 must be at least 1 (command line)"),
        ("train.steps=", "train.steps=null must be a whole number (command line)"),
        ("model.bias=1", "model.bias=1 must be true/false (command line)"),
        ("model.hidden_dropout=1.0", "model.hidden_dropout=1.0 must be below 1 (command line)"),
        (
            "model.activation=gelo",
            "model.activation='gelo' must be one of 'gelu', 'gelu_tanh', 'relu', 'relu2', 'silu', 'swiglu' or 'geglu' (command line)",
        ),
        (
            "model.init.token_correlation=x",
            "model.init.token_correlation='x' must be a number or 'zipf' (command line)",
        ),
        (
            "model.init={base: normal, token_correlation: 0.02}",
            "model.init.token_correlation=0.02 has no effect with model.scheme=deepscalelm_pre_ln and model.init.base=normal: remove it ",
        ),
        (
            "model={scheme: pre_ln, num_layers: 2, hidden_size: 8, num_attention_heads: 2, init: {causal_correction: false}}",
            "model.init.causal_correction=false has no effect with model.scheme=pre_ln and model.init.base=scheme: remove it (its default is true), ",
        ),
        (
            "model.scheme_options.k=x",
            "model.scheme_options.k='x' must be a number or true/false (command line)",
        ),
        ("model.hidden_size.x=3", 'model.hidden_size={"x": 3} must be a whole number (command line)'),
        ("data.corpora=[]", "data.corpora=[] must be a list of at least 1 (command line)"),
        ("data.corpora=here", "data.corpora='here' must be a list (command line)"),
        ("train=null", "train=null must be a section of keys (command line)"),
        (
            "model.hidden_size=9",
            "model.hidden_size=9 is not divisible by model.num_attention_heads=2: change one of them or set model.head_dim",
        ),
        (
            "model.scheme_options={rescale: true}",
            "model.scheme_options.rescale has no effect with model.scheme=deepscalelm_pre_ln; its options: k=2.0, alpha=1.0",
        ),
        (
            "train.steps",
            "override 'train.steps' is not of the form key=value, e.g. train.steps=100, or +include=FILE",
        ),
        ("--train.steps=3", "override '--train.steps=3': write train.steps=3 instead"),
        ("include=a.yaml", "override 'include=a.yaml': write +include=FILE instead"),
        ("train.steps =5", "override 'train.steps =5': write train.steps=5, without blanks around the key"),
        (
            "train..steps=5",
            "override 'train..steps=5': a key is words joined by dots, as in train.steps=100; `fathom config FILE` lists all keys",
        ),
        (
            "data.corpora.x.path=5",
            "override 'data.corpora.x.path=5': data.corpora is a list: name its items by number, as in data.corpora.0",
        ),
        ("optimizer=[]", "optimizer=[] must be a section of keys (command line)"),
        ("train.steps=1:30", "train.steps='1:30' must be a whole number (command line)"),
        ("train.steps=1_0_0", "train.steps='1_0_0' must be a whole number (command line)"),
        ("optimizer.lr=1:2.5", "optimizer.lr='1:2.5' must be a number (command line)"),
        ("model.bias=yes", "model.bias='yes' must be true/false (command line)"),
        ("train.steps=1e30", "train.steps=1e+30 must be a whole number (command line)"),
        (f"train.steps={10**30}", f"train.steps={10**30} must be at most 1000000000 (command line)"),
        (f"train.seed={10**26}", f"train.seed={10**26} must be below 9223372036854775808 (command line)"),
        (
            "train.steps=" + "1" * 5000,
            "override 'train.steps="
            + "1" * 86
            + "…: the value is not valid YAML (line 1, column 1: a number of 5000 characters; 100 are the most)",
        ),
        ("optimizer.lr=.inf", "optimizer.lr=.inf must be a finite number (command line)"),
        ("optimizer.lr=1e400", "optimizer.lr=.inf must be a finite number (command line)"),
        ("optimizer.eps=.nan", "optimizer.eps=.nan must be a finite number (command line)"),
        ("optimizer.betas=[2.0, 0.9]", "optimizer.betas.0=2.0 must be below 1 (command line)"),
        ("optimizer.betas=[0.9, .nan]", "optimizer.betas.1=.nan must be a finite number (command line)"),
        (
            "model.scheme_options={alpha: .inf}",
            "model.scheme_options.alpha=.inf must be a finite number (command line)",
        ),
        ("model.scheme_options={alpha: 11}", "model.scheme_options.alpha=11.0 must be from 0 to 10"),
        (
            "model.scheme_options={alpha: 0}",
            "model.scheme_options: k=2 and alpha=0 give beta^2=2 at 2 layers, and it must lie in (0, 1]: choose a smaller k or a larger alpha",
        ),
        (
            "model={scheme: mix_ln, num_layers: 2, hidden_size: 8, num_attention_heads: 2, scheme_options: {post_fraction: 7}}",
            "model.scheme_options.post_fraction=7.0 must be from 0 to 1",
        ),
        ("model.num_layers=1000000000", "model.num_layers=1000000000 must be at most 10000 (command line)"),
        (
            "data.corpora=[{path: x, weight: .inf}]",
            "data.corpora.0.weight=.inf must be a finite number (command line)",
        ),
        (
            "data.corpora=[{path: x, weight: 1e-300}]",
            "data.corpora.0.weight=1e-300 must be at least 1e-09 (command line)",
        ),
        (
            "parallel.timeout_minutes=1e308",
            "parallel.timeout_minutes=1e+308 must be at most 1000000 (command line)",
        ),
        (f"name={'n' * 300}", f"name='{'n' * 58}… must be text of at most 128 characters (command line)"),
        (
            f"runs_dir={'n' * 300}",
            f"runs_dir='{'n' * 58}… must be a path of at most 4000 bytes, and 255 for each name in it (command line)",
        ),
        ('runs_dir="a\\tb"', "runs_dir='a\\tb' must be a path without control characters (command line)"),
        ("runs_dir=", "runs_dir=null must be text (command line)"),
        ("runs_dir=''", "runs_dir='' must be text of at least 1 character (command line)"),
        (
            "parallel.recompute.num_layers=4",
            "parallel.recompute.num_layers=4 has no effect with parallel.recompute.granularity=none: remove it or set parallel.recompute.granularity=full",
        ),
        (
            "train.stop_at_step=5",
            "train.stop_at_step=5 has no effect with train.steps=4: remove it or set a smaller one",
        ),
        (
            "model.rotary_base=500000",
            "model.rotary_base=500000 has no effect with model.position=learned: remove it or set model.position=rotary",
        ),
        (
            "schedule={kind: constant, min_lr_ratio: 0.5}",
            "schedule.min_lr_ratio=0.5 has no effect with schedule.kind=constant: remove it or choose another schedule.kind",
        ),
        (
            "optimizer={1: 2, lr: 1}",
            "optimizer.1 is not a known key (command line); `fathom config FILE` lists all keys",
        ),
        (
            "optimizer={yes: 2, lr: 1}",
            "optimizer.yes is not a known key (command line); did you mean optimizer.eps?",
        ),
        (
            "optimizer={.nan: 2}",
            "override 'optimizer={.nan: 2}': the value is not valid YAML (line 1, column 2: the key .nan holds a dot: write a section for each part of it)",
        ),
        (
            "checkpoint.load=!!binary aaaa",
            "override 'checkpoint.load=!!binary aaaa': the value is not valid YAML (line 1, column 1: the tag tag:yaml.org,2002:binary is not read: quote a value to make it text)",
        ),
        (
            "schedule=!!omap [kind: wsd]",
            "override 'schedule=!!omap [kind: wsd]': the value is not valid YAML (line 1, column 1: the tag tag:yaml.org,2002:omap is not read: quote a value to make it text)",
        ),
        (
            "train.steps=" + "[" * 100_000,
            "override 'train.steps="
            + "[" * 86
            + "…: the value is not valid YAML (line 1, column 33: more than 32 levels of sections and lists)",
        ),
        (
            "a" * 300_000 + "=1",
            "override '"
            + "a" * 98
            + "…: a key is words joined by dots, as in train.steps=100; `fathom config FILE` lists all keys",
        ),
        (
            "a." * 3000 + "a=1",
            "override '"
            + "a." * 49
            + "…: a key is words joined by dots, as in train.steps=100; `fathom config FILE` lists all keys",
        ),
        ("x\x1b[2J=1", "x\\x1b[2J is not a known key (command line); `fathom config FILE` lists all keys"),
        ("name=${name}", "name: ${name} leads back to itself (command line)"),
        (
            "name=${oc.env:NO_SUCH_VARIABLE}",
            "name: the environment has no variable NO_SUCH_VARIABLE (command line)",
        ),
        (
            "name=${oc.eval:1+1}",
            "name: '${oc.eval:1+1}' is no interpolation: write ${other.key} or ${oc.env:NAME}, or \\${ for the text itself (command line)",
        ),
        (
            "train.steps=[1",
            "override 'train.steps=[1': the value is not valid YAML (line 2, column 1: did not find expected ',' or ']')",
        ),
        ("+include=scheme/b3t", "configuration scheme/b3t does not exist; there is "),
    ],
)
def test_every_mistake_on_the_command_line_has_its_line(tiny: Path, override: str, text: str) -> None:
    found = message(tiny, override)
    assert found == text or (text.endswith(" ") and found.startswith(text))


def test_numbers_are_read_as_yaml_1_2_and_names_as_they_are_written(tiny: Path) -> None:
    assert load_config(tiny, ["train.steps=010"]).train.steps == 10
    assert load_config(tiny, ["name=007", "runs_dir=2024", "checkpoint.load=1e5"]).name == "007"
    tiny.write_text(MINIMAL.replace("somewhere", "010").replace("name: tiny", "name: 1_0"))
    config = load_config(tiny)
    assert (config.name, config.data.corpora[0].path) == ("1_0", "010")


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "  steps: 4\n",
            "  step: 4\n",
            "train.step is not a known key (tiny.yaml:13); did you mean train.steps?",
        ),
        ("  steps: 4\n", "", "train.steps must be set: Optimizer steps of the whole run (tiny.yaml:12)"),
        ("lr: 1e-3", "lr: fast", "optimizer.lr='fast' must be a number (tiny.yaml:11)"),
        (
            "  steps: 4\n",
            "  steps: 4\n  steps: 5\n",
            "tiny.yaml is not valid YAML: line 14, column 3: found duplicate key steps",
        ),
        ("name: tiny\n", "name: tiny\n\tbad\n", "tiny.yaml is not valid YAML: line 2, column 1: "),
        (
            "train:\n",
            "train:\n  include: [x]\n",
            "train.include: `include` belongs at the top level of a file (tiny.yaml:13)",
        ),
        (
            "name: tiny\n",
            "name: tiny\ninclude: tiny.yaml\n",
            "tiny.yaml: include='tiny.yaml' must be a list of files",
        ),
        (
            "name: tiny\n",
            "name: tiny\ninclude: [gone.yaml]\n",
            "tiny.yaml: include: configuration gone.yaml does not exist; ",
        ),
        (
            "name: tiny\n",
            "name: tiny\ninclude: [tiny.yaml]\n",
            "tiny.yaml includes itself: tiny.yaml -> tiny.yaml",
        ),
        ("  steps: 4\n", "", "train.steps must be set: "),
        (
            "train:\n",
            "train.seed: 1\ntrain:\n",
            "tiny.yaml is not valid YAML: line 12, column 1: the key train.seed holds a dot: write a section for each part of it",
        ),
        (
            "name: tiny\n",
            "name: !!timestamp 2024-13-45\n",
            "tiny.yaml is not valid YAML: line 1, column 7: the tag tag:yaml.org,2002:timestamp is not read",
        ),
        (
            "name: tiny\n",
            "name: tiny\nx: &x {a: 1}\ny: {<<: *x}\n",
            "tiny.yaml is not valid YAML: line 3, column 5: merge keys (<<) are not read",
        ),
        (
            "name: tiny\n",
            "name: tiny\n---\nname: b\n",
            "tiny.yaml is not valid YAML: line 2, column 1: a second document begins; one is read",
        ),
        (
            "name: tiny\n",
            "? [a]\n: b\nname: tiny\n",
            "tiny.yaml is not valid YAML: line 1, column 3: a key must be a word, not a section, a list or an alias",
        ),
    ],
)
def test_every_mistake_in_a_file_names_file_and_line(tiny: Path, old: str, new: str, text: str) -> None:
    assert old in MINIMAL
    tiny.write_text(MINIMAL.replace(old, new))
    assert message(tiny).startswith(text)


def test_further_problems_are_counted(tiny: Path) -> None:
    assert message(tiny, "train.steps=x", "train.seed=x").endswith("(and 1 more problem)")
    found = message(tiny, "train.steps=x", "train.seed=x", "model.num_layer=3")
    assert found.startswith("model.num_layer is not a known key")
    assert found.endswith("(and 2 more problems)")


def test_a_file_of_another_kind(tiny: Path) -> None:
    tiny.write_text("- a\n- b\n")
    assert message(tiny) == "tiny.yaml must hold `key: value` lines, not a list"
    tiny.write_bytes(b"name: \xff\xfe\n")
    assert message(tiny).startswith("tiny.yaml cannot be read: ")
    assert message("configs").startswith("configuration configs does not exist; there are ")
    tiny.write_text("root:x:0:0:root:/root:/bin/bash\n")
    assert message(tiny) == "tiny.yaml must hold `key: value` lines, not a text"
    tiny.write_text("# " + "x" * 2**20)
    assert (
        message(tiny)
        == "tiny.yaml is larger than 1048576 bytes, the most that is read: is it a configuration?"
    )
    tiny.write_text(MINIMAL)
    os.mkfifo("pipe.yaml")
    assert (
        message("pipe.yaml") == "configuration pipe.yaml is no regular file: write it into one and name that"
    )
    assert (
        message(tiny, "+include=/dev/zero")
        == "configuration /dev/zero is no regular file: write it into one and name that"
    )


def test_includes_that_multiply_are_refused(tiny: Path) -> None:
    for number in range(18):
        Path(f"f{number}.yaml").write_text(f"include: [f{number + 1}.yaml, f{number + 1}.yaml]\n")
    Path("f18.yaml").write_text("train: {seed: 1}\n")
    assert message(tiny, "+include=f0.yaml").endswith(
        "f11.yaml: more than 10 files include each other in a row"
    )
    assert message(tiny, "+include=f9.yaml").endswith(
        ": with it more than 100 files or 1048576 characters are included; name each file once"
    )


def test_interpolations_that_multiply_are_refused(tiny: Path) -> None:
    doubling = [f"{{path: '${{data.corpora.{n + 1}.path}}${{data.corpora.{n + 1}.path}}'}}" for n in range(8)]
    found = message(tiny, f"data.corpora=[{','.join([*doubling, '{path: ' + 'x' * 100 + '}'])}]")
    assert found.endswith("its interpolations make a text of more than 10000 characters (command line)")
    five = [",".join([f"'${{data.corpora.{n + 1}}}'"] * 5) for n in range(8)]
    nested = [f"{{path: [{texts}]}}" for texts in five]
    found = message(tiny, f"data.corpora=[{','.join([*nested, '{path: x}'])}]")
    assert found.endswith("its interpolations stand for more than 50000 values (command line)")


def test_the_environment_gives_values(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load_config(tiny, ["runs_dir=${oc.env:SCRATCH}/runs", "train.seed=${oc.env:NO_SUCH_VARIABLE,7}"])
    assert (config.runs_dir, config.train.seed) == ("/scratch/me/runs", 7)


def test_an_unknown_include_lists_names_only(tiny: Path) -> None:
    found = message(tiny, "+include=zzzzzz")
    assert len(found) < 300
    assert str(SHIPPED.parent) + "/configs/" not in found


def test_a_missing_file_names_the_shipped_ones_like_it(tiny: Path) -> None:
    found = message("configs/quikstart.yaml")
    assert found.startswith("configuration configs/quikstart.yaml does not exist; there is ")
    assert found.endswith("there is quickstart")


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
    rows = {row.key: row for row in describe(config, composition)}
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
    shown = {row.key.replace(".0.", ".*.") for row in describe(load_config(tiny))}
    assert shown == {field.key for field in schema().values() if field.kind in ("value", "free")}


def test_complete_model_takes_sizes_from_the_data(tiny: Path) -> None:
    config = load_config(tiny)
    model = complete_model(config, vocab_size=100)
    assert (model.vocab_size, model.padded_vocab, model.max_position_embeddings) == (100, 128, 16)
    with pytest.raises(UserError, match="model.vocab_size=99 differs from the tokenizer's 100"):
        complete_model(load_config(tiny, ["model.vocab_size=99"]), 100)
    with pytest.raises(UserError, match="data.seq_length=16 exceeds model.max_position_embeddings=8"):
        complete_model(load_config(tiny, ["model.max_position_embeddings=8"]))
