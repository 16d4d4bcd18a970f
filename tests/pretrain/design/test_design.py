from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.parameters.size import parameter_count
from parallel.hardware.gpus import planned_gpu
from pretrain.config.load import complete_model, load_config
from pretrain.design.design import design
from pretrain.design.text import configuration
from pretrain.design.wish import Wish
from pretrain.plan.layouts import configured, work_of
from tools.cli import main

SMALL = Wish(params=3e6, layers=12, gpu="h100", gpus=1, tokens=1e9, scheme="pre_ln", vocab_size=1000)


@pytest.mark.parametrize(
    "wish",
    [
        replace(SMALL, params=350e6, layers=24, gpu="h200", gpus=16, tokens=30e9, vocab_size=32000),
        replace(SMALL, params=12e6, layers=200, gpus=6, seq_length=512, scheme="post_ln"),
        SMALL,
    ],
    ids=["two hosts", "deep and narrow", "one GPU"],
)
def test_the_written_file_is_the_model_and_the_layout_that_were_chosen(wish: Wish, tmp_path: Path) -> None:
    found, config, prediction = design(wish)
    (tmp_path / "it.yaml").write_text(configuration(found, "fathom design"))
    loaded = load_config(tmp_path / "it.yaml")
    assert loaded == config
    model = complete_model(loaded)
    assert parameter_count(model)["total"] == pytest.approx(wish.params, rel=0.02)
    assert model.num_layers == wish.layers
    tokens = loaded.train.steps * loaded.train.global_batch_size * loaded.data.seq_length
    assert wish.tokens <= tokens < 1.01 * wish.tokens
    planned = configured(loaded, work_of(loaded, model), planned_gpu(wish.gpu), wish.gpus)
    assert planned.fits
    assert planned.time.total == prediction.time.total
    text = (tmp_path / "it.yaml").read_text()
    reasons = " ".join(line.strip().removeprefix("# ") for line in text.splitlines())
    assert all(reason in reasons for reason in found.reasons)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_the_rate_of_its_recipe_carried_over(scheme: str) -> None:
    _, config, _ = design(replace(SMALL, scheme=scheme))
    recipe = yaml.safe_load(Path(f"configs/recipe/{scheme}.yaml").read_text())
    assert config.model.scheme == scheme
    assert config.optimizer.lr == float(recipe["optimizer"]["lr"])
    transfer = config.model.transfer
    own = recipe["model"].get("transfer", {})
    assert (transfer.method, transfer.base_hidden) == ("completep", own.get("base_hidden", 64))
    # Of the tables, whose rate is the base's: sqrt(64), or what the recipe says for its own base.
    wanted = recipe["optimizer"]["factors"]["embedding"]["rate"]
    assert config.optimizer.factors.embedding.rate == {"sqrt(hidden)": 8.0}.get(wanted, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 2000}, r"--params 3M --layers 2000: 2000 layers .* have \S+ parameters at the least"),
        ({"gpu": "abacus"}, "--gpu abacus is not known"),
        ({"scheme": "none"}, "--scheme none is unknown: choose one of pre_ln"),
        ({"name": "../x"}, "^--name ../x must be text like"),
        ({"data": Path("x" * 300)}, "^--data x+… must be a path of at most"),
        ({"family": "vit"}, "--family vit cannot be designed yet, only gpt"),
        ({"tokens": 1e5}, r"--tokens 100k: \d+ steps of \d+ samples, which is no training"),
        ({"params": 1e12, "layers": 100, "vocab_size": 32000}, "--gpus 1 --gpu h100: no layout fits"),
    ],
)
def test_what_cannot_be_had_is_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        design(replace(SMALL, **change))  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)


def test_the_command_writes_once_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["design", "--params", "3M", "--layers", "12", "--tokens", "1B", "--gpus", "1"]
    arguments += ["--vocab-size", "1000", "--out", str(tmp_path / "it.yaml")]
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert not left.value.code
    assert "feed-forward " in capsys.readouterr().out
    for params, refusal in (
        ("3 apples", ": give a number such as 1.5B, 350M or 30e9"),
        ("1e30", " must be at least 1 and at most 1e18"),
        ("0.5", " must be at least 1 and at most 1e18"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*arguments[:2], params, *arguments[3:]])
        assert left.value.code == 2
        assert capsys.readouterr().err == f"fathom: error: --params {params}{refusal}\n"
    monkeypatch.setattr("pretrain.design.design.design", lambda wish: pytest.fail("it was computed"))
    for out, reason in (("it.yaml", "there is a file already"), ("it.yaml/x", "Not a directory")):
        with pytest.raises(SystemExit) as left:
            main([*arguments[:-1], str(tmp_path / out)])
        assert left.value.code == 2
        assert reason in capsys.readouterr().err
