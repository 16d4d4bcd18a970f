"""`fathom translate` and `fathom eval` of an encoder-decoder, from end to end."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from model.errors import UserError
from parallel.checkpoint.folders import MANIFEST
from parallel.checkpoint.format import manifest_text
from pretrain.data.dataset_admin import inspect_dataset
from pretrain.report.run import read_run
from pretrain.report.run_report import render
from pretrain.trained.beam import Search
from pretrain.trained.measures.pairs import held_out, with_wrong_sources
from pretrain.trained.open import open_trained
from pretrain.trained.translate import CheckpointTranslator, translate
from tests.pretrain.trained.encoders import save_encoder
from tests.pretrain.trained.pairs import save_translator
from tools.cli import main
from tools.dev.show_translations import main as show_translations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its data, and test.en beside test.de with the test split's texts."""
    folder = tmp_path_factory.mktemp("translator")
    save_translator(folder)
    _, texts = inspect_dataset(folder / "data", "test", 1000)
    both = [text.removeprefix("en: ").split("\nde: ") for text in texts]
    assert len(both) > 10
    for side, name in enumerate(("en", "de")):
        (folder / f"test.{name}").write_text("".join(pair[side] + "\n" for pair in both), encoding="utf-8")
    return folder


def fathom(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert (left.value.code or 0) == code


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    fathom(*arguments, "--json")
    return dict(json.loads(capsys.readouterr().out))


def test_the_loss_is_the_trainers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = (event for event in events if event["event"] == "eval")
    found = told(capsys, "eval", str(folder / "run"), "--samples", "2")
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found["tokens"] == last["tokens"]
    assert "translated" not in found


def test_held_out_pairs_are_texts_of_the_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [(folder / f"test.{name}").read_text(encoding="utf-8").splitlines() for name in ("en", "de")]
    both = held_out(open_trained(folder / "run"), "test", 5)
    assert len(set(both)) == 5
    assert set(both) <= set(zip(*sides, strict=True))
    show_translations(folder / "run", count=2, split="test")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "source" in shown
    assert both[0][0].split()[1] in shown


def test_signal_health_knows_both_stacks(folder: Path) -> None:
    """Layers are numbered over both, the encoder's first; cross-attention is a branch."""
    events = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    signals = [event for event in events if event["event"] == "signal"]
    assert [event["step"] for event in signals] == [1, 20, 40]
    for event in signals:
        layers = event["layers"]
        assert [row["layer"] for row in layers] == [1, 2, 3]
        assert ["branch_ratio_cross" in row for row in layers] == [False, True, True]
        # DeepScaleLM's encoder of one layer keeps nothing of what enters it, and forgets all.
        assert all(math.isfinite(row["forgetting"]) for row in layers[1:])
        keys = ("residual_rms", "common_share", "update_ratio")
        assert all(math.isfinite(row[key]) for row in layers for key in keys)
        assert all(row["grad_norm"] > 0 and row["grad_variance_late"] > 0 for row in layers)


def test_a_report_shows_both_stacks(folder: Path) -> None:
    page = render(read_run(folder / "run"))
    assert "1 + 2 layers, width 32" in page
    assert "<!-- layer (cross-attention, encoder to 1) -->" in page


def test_a_wrong_source_costs_what_the_decoder_takes_from_the_encoder(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss with other pairs' sources is that of files in which they are exchanged."""
    run, sources = str(folder / "run"), (folder / "test.en").read_text(encoding="utf-8").splitlines()
    asked = ["eval", run, "--text", str(folder / "test.en"), "--pairs", "en,de", "--wrong-source"]
    found = told(capsys, *asked)
    assert len(set(sources)) == len(sources)
    for side, lines in (("en", [*sources[1:], sources[0]]), ("de", None)):
        text = (folder / "test.de").read_text(encoding="utf-8") if lines is None else "\n".join(lines) + "\n"
        (folder / f"wrong.{side}").write_text(text, encoding="utf-8")
    wrong = told(capsys, "eval", run, "--text", str(folder / "wrong.en"), "--pairs", "en,de")
    assert found["wrong_source_loss"] == pytest.approx(wrong["loss"], rel=1e-6)
    assert found["source_gain"] == pytest.approx(wrong["loss"] - found["loss"], rel=1e-4)
    fathom(*asked)
    shown = capsys.readouterr().out
    assert f"with the sources of other pairs {wrong['loss']:.5f} nats: the right ones are worth" in shown
    assert ("hardly uses the encoder" in shown) == (found["source_gain"] < 0.01)


def test_wrong_sources_are_other_ones() -> None:
    """Also where neighbours, or the last and the first pair, have the same."""
    pairs = [(np.array([source]), np.array([target])) for target, source in enumerate([7, 7, 8, 9, 9, 7])]
    mixed = with_wrong_sources(pairs)
    assert [int(source[0]) for source, _ in mixed] == [8, 8, 9, 7, 7, 8]
    assert [int(target[0]) for _, target in mixed] == list(range(6))
    for few in (pairs[:2], pairs[:1]):
        with pytest.raises(UserError, match="at least two different sources"):
            with_wrong_sources(few)


def test_scores_are_those_of_the_translations(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a split, of the same pairs as files, and of what `fathom translate` prints."""
    run, sources = str(folder / "run"), folder / "test.en"
    split = told(capsys, "eval", run, "--split", "test", "--translate", "--beam", "2")
    files = told(
        capsys, "eval", run, "--text", str(sources), "--pairs", "en,de", "--translate", "--beam", "2"
    )
    assert files["translated"] == split["translated"]
    assert files["loss"] == pytest.approx(split["loss"], rel=1e-6)
    assert (files["pairs"], files["tokens"]) == (split["pairs"], split["tokens"])

    fathom("translate", run, str(sources), "--beam", "2", "--batch-size", "3")
    found = capsys.readouterr().out.splitlines()
    wanted = (folder / "test.de").read_text(encoding="utf-8").splitlines()
    scores = split["translated"]["scores"]
    assert scores["bleu"]["value"] == sacrebleu.corpus_bleu(found, [wanted]).score > 1
    assert scores["chrf"]["value"] == sacrebleu.corpus_chrf(found, [wanted]).score
    copied = sacrebleu.corpus_chrf(sources.read_text(encoding="utf-8").splitlines(), [wanted])
    assert scores["chrf"]["copied"] == copied.score < scores["chrf"]["value"]
    assert "tok:13a" in scores["bleu"]["signature"]
    assert f"version:{sacrebleu.__version__}" in scores["chrf"]["signature"]

    fathom("eval", run, "--split", "test", "--translate", "--beam", "2")
    text = capsys.readouterr().out
    assert f"{scores['bleu']['value']:.2f}" in text
    assert scores["bleu"]["signature"] in text


def test_a_line_for_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, lines = str(folder / "run"), ["a red house and a new bed", "", "a big boat", "an \u2028 old\tbook"]
    content = "\ufeff" + "\r\n".join(lines) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    fathom("translate", run)
    found = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert len(found) == 4
    assert [bool(line) for line in found] == [True, False, True, True]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.removeprefix("\ufeff").encode())))
    fathom("chat", run)
    assert capsys.readouterr().out.removesuffix("\n").split("\n") == found
    texts = [part for line in lines for part in ("--text", line)]
    fathom("translate", run, *texts, "--best", "3")
    rows = [line.split("\t") for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert [row[0] for row in rows] == [number for number in "134" for _ in range(3)]
    assert [row[2] for row in rows[::3]] == [found[0], *found[2:]]
    scores = [float(row[1]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True)
    fathom("translate", run, *texts, "--json", "--max-new-tokens", "2")
    objects = [json.loads(line) for line in capsys.readouterr().out.removesuffix("\n").split("\n")]
    assert [one["source"] for one in objects] == lines
    assert objects[1]["translations"] == []
    (best,) = objects[0]["translations"]
    assert best["tokens"] == 2
    assert not best["ended"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "RUN"], "holds an encoder-decoder, which translates a text: use `fathom translate`"),
        (["fill", "RUN", "a [MASK]"], "use `fathom translate`"),
        (
            ["chat", "RUN", "--top-k", "3", "--seed", "1"],
            "--top-k, --seed: no effect",
        ),
        (["translate", "RUN", "--text", "a", "--best", "5"], "--best 5 must lie between 1 and --beam 4"),
        (
            ["translate", "RUN", "--text", "a", "--max-new-tokens", "49"],
            "--max-new-tokens 49: .* 48 positions",
        ),
        (["translate", "RUN", "none.txt"], "none.txt: No such file or directory"),
        (["translate", "RUN", "none.txt", "--text", "a"], "give either the file none.txt or --text"),
        (["eval", "RUN", "--stride", "3"], "--stride: has no effect on an encoder-decoder"),
        (["eval", "RUN", "--beam", "3"], "--beam: has no effect without --translate"),
        (["eval", "RUN", "--pairs", "en,de"], "--pairs en,de has an effect with --text only"),
        (["eval", "RUN", "--text", "test.en"], "needs --pairs SOURCE,TARGET"),
        (["eval", "RUN", "--samples", "999"], "--samples 999: the validation split of .* rows of pairs only"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    fathom(*(str(folder / "run") if one == "RUN" else one for one in arguments), code=2)
    shown = capsys.readouterr()
    assert not shown.out
    (line,) = shown.err.splitlines()
    assert re.search(reason, line), line


def test_lines_that_cannot_be_translated_are_named_before_any_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = tmp_path / "sources", str(folder / "run")
    for content, reason in (
        (b"a big house\n" + b"a red book and " * 20 + b"\n", f"{path}, line 2 has"),
        (b"a big house\na r\xe4d book\n", f"{path}, line 2: no valid UTF-8"),
    ):
        path.write_bytes(content)
        fathom("translate", run, str(path), code=2)
        shown = capsys.readouterr()
        assert not shown.out
        assert reason in shown.err


def test_an_export_translates_alike(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By transformers' `generate`, with equal settings: the same texts, and so the same BLEU."""
    run, hf, sources = str(folder / "run"), str(tmp_path / "hf"), str(folder / "test.en")
    fathom("export", run, hf)
    capsys.readouterr()
    given = ("--split", "test", "--translate", "--max-new-tokens", "30")
    scored = told(capsys, "eval", run, *given)["translated"]["scores"]
    wanted = [(folder / "test.de").read_text(encoding="utf-8").splitlines()]
    for settings in (["--beam", "4", "--best", "2"], ["--beam", "1", "--best", "1"]):
        found = []
        for model in (run, hf):
            capsys.readouterr()
            fathom("translate", model, sources, *settings, "--max-new-tokens", "30")
            out = capsys.readouterr().out.removesuffix("\n").split("\n")
            found.append([line.split("\t") for line in out])
        ours, theirs = found
        assert [row[::2] for row in ours] == [row[::2] for row in theirs]
        scores = [[float(row[1]) for row in rows] for rows in found]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        if settings[1] == "4":
            best = [row[2] for row in theirs[::2]]
            assert scored["bleu"]["value"] == sacrebleu.corpus_bleu(best, wanted).score
            assert scored["chrf"]["value"] == sacrebleu.corpus_chrf(best, wanted).score
    fathom("translate", hf, sources, "--max-new-tokens", "49", code=2)
    assert "--max-new-tokens 49" in capsys.readouterr().err


def test_another_kind_of_model_is_told_its_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(tmp_path, position="rotary")
    fathom("translate", str(tmp_path / "run"), "--text", "a", code=2)
    assert "holds an encoder, which fills places in a text: use `fathom fill`" in capsys.readouterr().err
    fathom("translate", str(tmp_path / "hf"), "--text", "a", code=2)
    assert "hf holds no encoder-decoder" in capsys.readouterr().err
    fathom("eval", str(tmp_path / "run"), "--translate", code=2)
    assert "--translate: has no effect on an encoder" in capsys.readouterr().err


def test_a_run_of_another_task_is_measured_on_named_pairs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "run" / "checkpoints", tmp_path / "checkpoints")
    (step,) = (tmp_path / "checkpoints").glob("step_*")
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["config"]["train"]["task"] = "span_corruption"
    (step / MANIFEST).write_text(manifest_text(manifest))
    fathom("eval", str(step), code=2)
    assert (
        "was trained for span_corruption, and translations are measured on pairs" in capsys.readouterr().err
    )
    assert told(capsys, "eval", str(step), "--data", str(folder / "data"))["pairs"] > 10


@pytest.mark.gpu
def test_a_gpu_translates_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = (folder / "test.en").read_text(encoding="utf-8").splitlines()
    found = []
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        found.append(translate(CheckpointTranslator(open_trained(folder / "run")), texts, Search(best=2)))
    ours, theirs = ([one for best in each for one in best] for each in found)
    assert [one.text for one in ours] == [one.text for one in theirs]
    scores = [[one.score for one in each] for each in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
