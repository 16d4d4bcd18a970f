"""The one line that each mistake in a configuration gets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.config.compose import SHIPPED
from pretrain.config.load import load_config
from tests.pretrain.config.minimal import MINIMAL, message


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
        (
            "model.transfer.base_width=0",
            "model.transfer.base_width is not a known key (command line); "
            "did you mean model.transfer.base_hidden?",
        ),
        (
            "model.rope.theta=5",
            "model.rope.theta is not a known key (command line); `fathom config FILE` lists all keys",
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
            (
                "model.activation='gelo' must be one of 'gelu', 'gelu_tanh', 'relu', 'relu2', "
                "'silu', 'swiglu', 'geglu' or 'geglu_tanh' (command line)"
            ),
        ),
        (
            "model.init.token_correlation=x",
            "model.init.token_correlation='x' must be a number or 'zipf' (command line)",
        ),
        (
            "model.init={base: normal, token_correlation: 0.02}",
            (
                "model.init.token_correlation=0.02 has no effect with "
                "model.scheme=deepscalelm_pre_ln and model.init.base=normal: remove it "
            ),
        ),
        (
            (
                "model={scheme: pre_ln, num_layers: 2, hidden_size: 8, num_attention_heads: 2, "
                "init: {causal_correction: false}}"
            ),
            (
                "model.init.causal_correction=false has no effect with model.scheme=pre_ln and "
                "model.init.base=scheme: remove it (its default is true), "
            ),
        ),
        (
            "model.scheme_options.k=x",
            "model.scheme_options.k='x' must be a number or true/false (command line)",
        ),
        ("model.hidden_size.x=3", 'model.hidden_size={"x": 3} must be a whole number (command line)'),
        ("data.corpora=[]", "data.corpora=[] must be a list of at least 1 (command line)"),
        ("data.corpora=here", "data.corpora='here' must be a list (command line)"),
        (
            "model={num_layers: 2, hidden_size: 8, num_attention_heads: 2, window: 100000}",
            "model.window=100000 has no effect with data.seq_length=16: remove it, or give a number below 15",
        ),
        (
            "train.loss_chunk=16",
            (
                "train.loss_chunk=16 has no effect with the 16 labels of a sample on a rank: remove it, "
                "or give a smaller number"
            ),
        ),
        ("train=null", "train=null must be a section of keys (command line)"),
        (
            "model.hidden_size=9",
            (
                "model.hidden_size=9 is not divisible by model.num_attention_heads=2: change one "
                "of them or set model.head_dim"
            ),
        ),
        (
            "model.scheme_options={rescale: true}",
            (
                "model.scheme_options.rescale has no effect with model.scheme=deepscalelm_pre_ln; "
                "its options: k=2.0, alpha=1.0, unscaled_cross=False"
            ),
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
            (
                "override 'train..steps=5': a key is words joined by dots, as in train.steps=100; "
                "`fathom config FILE` lists all keys"
            ),
        ),
        (
            "data.corpora.x.path=5",
            (
                "override 'data.corpora.x.path=5': data.corpora is a list: name its items by "
                "number, as in data.corpora.0"
            ),
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
            + "…: the value is not valid YAML (line 1, column 1: a number of 5000 characters; "
            "100 are the most)",
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
            (
                "model.scheme_options: k=2 and alpha=0 give beta^2=2 at 2 layers, and it must lie "
                "in (0, 1]: choose a smaller k or a larger alpha"
            ),
        ),
        (
            (
                "model={scheme: mix_ln, num_layers: 2, hidden_size: 8, num_attention_heads: 2, "
                "scheme_options: {post_fraction: 7}}"
            ),
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
            (
                f"runs_dir='{'n' * 58}… must be a path of at most 4000 bytes, and 255 for each name "
                "in it (command line)"
            ),
        ),
        ('runs_dir="a\\tb"', "runs_dir='a\\tb' must be a path without control characters (command line)"),
        ("runs_dir=", "runs_dir=null must be text (command line)"),
        ("runs_dir=''", "runs_dir='' must be text of at least 1 character (command line)"),
        (
            "parallel.recompute.num_layers=4",
            (
                "parallel.recompute.num_layers=4 has no effect with "
                "parallel.recompute.granularity=none: remove it or set "
                "parallel.recompute.granularity=full"
            ),
        ),
        (
            "model.family=t5",
            "model.family='t5' is not a family; choose one of gpt, bert, seq2seq, vit, speech",
        ),
        (
            "train.task=mlm",
            "train.task='mlm' is not a task; choose one of causal_lm, masked_lm, translation, "
            "span_corruption, classification, transcription, speech_translation",
        ),
        (
            "train.task=masked_lm",
            (
                "train.task=masked_lm does not combine with model.family=gpt, in which a token attends "
                "to its own and those before it: set train.task=causal_lm or model.family=bert"
            ),
        ),
        (
            "model.token_types=2",
            "model.token_types=2 has no effect with model.family=gpt: remove it",
        ),
        (
            "masking.rate=0.3",
            "masking has no effect with train.task=causal_lm: remove the section",
        ),
        (
            "spans.density=0.3",
            "spans has no effect with train.task=causal_lm: remove the section",
        ),
        (
            "train.stop_at_step=5",
            "train.stop_at_step=5 has no effect with train.steps=4: remove it or set a smaller one",
        ),
        (
            "model.rotary_base=500000",
            (
                "model.rotary_base=500000 has no effect with model.position=learned: remove it or "
                "set model.position=rotary"
            ),
        ),
        (
            "schedule={kind: constant, min_lr_ratio: 0.5}",
            (
                "schedule.min_lr_ratio=0.5 has no effect with schedule.kind=constant: remove it or "
                "choose another schedule.kind"
            ),
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
            (
                "override 'optimizer={.nan: 2}': the value is not valid YAML (line 1, column 2: "
                "the key .nan holds a dot: write a section for each part of it)"
            ),
        ),
        (
            "checkpoint.load=!!binary aaaa",
            (
                "override 'checkpoint.load=!!binary aaaa': the value is not valid YAML (line 1, "
                "column 1: the tag tag:yaml.org,2002:binary is not read: quote a value to make it "
                "text)"
            ),
        ),
        (
            "schedule=!!omap [kind: wsd]",
            (
                "override 'schedule=!!omap [kind: wsd]': the value is not valid YAML (line 1, "
                "column 1: the tag tag:yaml.org,2002:omap is not read: quote a value to make it "
                "text)"
            ),
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
            (
                "name: '${oc.eval:1+1}' is no interpolation: write ${other.key} or ${oc.env:NAME}, "
                "or \\${ for the text itself (command line)"
            ),
        ),
        (
            "train.steps=[1",
            (
                "override 'train.steps=[1': the value is not valid YAML (line 2, column 1: did not "
                "find expected ',' or ']')"
            ),
        ),
        (
            "+include=scheme/b3t",
            "configuration scheme/b3t does not exist; there are recipe/b2t, scheme/b2t",
        ),
        (
            "+include=nowhere.yaml",
            "configuration nowhere.yaml does not exist; there are data/corpus, data/quickstart, ",
        ),
    ],
)
def test_every_mistake_on_the_command_line_has_its_line(tiny: Path, override: str, text: str) -> None:
    found = message(tiny, override)
    assert found == text or (text.endswith(" ") and found.startswith(text))


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
        (
            "train:\n",
            "train.seed: 1\ntrain:\n",
            (
                "tiny.yaml is not valid YAML: line 12, column 1: the key train.seed holds a dot: "
                "write a section for each part of it"
            ),
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
            (
                "tiny.yaml is not valid YAML: line 1, column 3: a key must be a word, not a "
                "section, a list or an alias"
            ),
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
    found = message(tiny, "model.image.channels=1", "train.seed=x")  # two keys are missing
    assert found == "train.seed='x' must be a whole number (command line) (and 1 more problem)"


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
    with pytest.raises(OSError, match="Input/output error: '/proc/self/mem'"):
        load_config("/proc/self/mem")
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


def test_an_unknown_include_lists_names_only(tiny: Path) -> None:
    found = message(tiny, "+include=zzzzzz")
    assert len(found) < 300
    assert str(SHIPPED.parent) + "/configs/" not in found
