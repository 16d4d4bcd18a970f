"""Perplexity: the trainer's own number, exact counts of tokens, bytes and words.

Also windows with and without overlap, and what is refused.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model.errors import UserError
from model.hf.reference import Evaluation
from parallel.checkpoint.reader import CheckpointReader
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import train_tokenizer
from pretrain.trained.folders.verify_next_token import compare
from pretrain.trained.generate import generate_text
from pretrain.trained.measures.perplexity import evaluate
from pretrain.trained.measures.text_tokens import read_text
from pretrain.trained.open import open_trained
from tests.pretrain.small import VOCAB, small_config, small_data, small_trainer
from tests.pretrain.small import trained as trained_run
from tools.cli import main

WINDOW = 16
TEXTS = ("a b  abcde\n\nkl mnop", "Größe\u00a0日本語 \U0001f600\t x" * 5, "p")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two steps, its data, and what its trainer evaluated to."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = small_data(folder)
    config = small_config(data, folder / "runs", 2, scheme="deepscalelm_pre_ln")
    trainer, seen = small_trainer(config), []
    trainer.tell = lambda moment, *args: seen.append(args[0]) if moment == "on_eval" else None  # type: ignore[method-assign]
    trainer.run()
    return {"run": folder / "runs" / "small", "data": data, "eval": seen[-1], "texts": folder}


def test_equals_the_evaluation_of_the_trainer(run: dict[str, Any]) -> None:
    ours = evaluate(run["run"], samples=run["eval"]["samples"])
    assert ours.per(ours.tokens)["nats"] == pytest.approx(run["eval"]["loss"], rel=1e-6)  # type: ignore[index]
    assert (ours.windows, ours.tokens, ours.step) == (4, 4 * WINDOW, 2)
    named = evaluate(run["run"], data=run["data"], samples=4, batch_size=3)
    assert named.nats == pytest.approx(ours.nats, rel=1e-6)
    assert (named.bytes, named.words) == (ours.bytes, ours.words)


def test_a_whole_split_has_every_window_once(run: dict[str, Any]) -> None:
    manifest = json.loads((run["data"] / "dataset.json").read_text())
    facts, whole = manifest["splits"]["validation"], evaluate(run["run"], batch_size=64)
    available = (facts["tokens"] - 1) // WINDOW
    assert (whole.windows, whole.tokens) == (available, available * WINDOW)
    # The tokens after the last whole window are the only ones left out.
    assert 0 <= facts["bytes"] - whole.bytes < WINDOW * 6  # type: ignore[operator]


def losses_of(run: Path, ids: list[int]) -> list[float]:
    """Loss of ids[1:], by the plain evaluation."""
    trained = open_trained(run)
    logits = Evaluation(dict(trained.weights), trained.config, logit_scale=trained.logit_scale)(
        torch.tensor([ids[:-1]])
    )
    return F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none").tolist()


@pytest.mark.parametrize("stride", [None, 16, 7])
def test_text_in_windows(run: dict[str, Any], stride: int | None) -> None:
    """Every token counts once, with the context that its window has.

    Against a plain evaluation window by window.
    """
    files = []
    for number, text in enumerate(TEXTS):
        files.append(str(run["texts"] / f"{number}.txt"))
        Path(files[-1]).write_text(text)
    tokenizer = Tokenizer(run["data"] / "tokenizer.model")
    ids = [tokenizer.eod_id]
    for text in TEXTS:
        ids += [*tokenizer.encode(text), tokenizer.eod_id]
    got = evaluate(run["run"], text=files, stride=stride)
    expected, counted, start = 0.0, 0, 0
    while counted < len(ids) - 1:
        window = ids[start : start + WINDOW + 1]
        fresh = start + len(window) - 1 - counted
        expected += sum(losses_of(run["run"], window)[-fresh:])
        counted, start = counted + fresh, start + (stride or WINDOW)
    assert got.nats == pytest.approx(expected, rel=1e-5)
    assert got.tokens == len(ids) - 1
    assert got.bytes == sum(len(text.encode()) for text in TEXTS)
    assert got.words == sum(len(text.split()) for text in TEXTS)
    assert got.per(got.bytes)["bits"] == pytest.approx(expected / math.log(2) / got.bytes, rel=1e-5)  # type: ignore[index]


def test_documents_that_did_not_see_each_other_do_not_here(run: dict[str, Any], tmp_path: Path) -> None:
    """The trainer's evaluation, `fathom eval`, an export's check and a continued text agree."""
    config = small_config(run["data"], tmp_path, 2, scheme="deepscalelm_pre_ln")
    config.data.document_mask, config.data.seq_length = True, 12
    _, told = trained_run(config)
    folder = tmp_path / "small"
    ours = evaluate(folder, samples=4, batch_size=3)
    assert ours.nats / ours.tokens == pytest.approx(told.evaluations[-1]["loss"], rel=1e-6)
    opened = open_trained(folder)
    plain = Evaluation(dict(opened.weights), opened.config, logit_scale=opened.logit_scale)
    told_apart, _ = compare(opened, lambda ids: SimpleNamespace(logits=plain(ids)), 4)
    assert told_apart == pytest.approx(told.evaluations[-1]["loss"], rel=1e-6)

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in ("ab", "a b c", "k")))
    tokenizer = Tokenizer(run["data"] / "tokenizer.model")
    mark = tokenizer.eod_id
    documents = [[mark, *tokenizer.encode(one), mark] for one in ("ab", "a b c", "k")]
    assert sum(map(len, documents)) - len(documents) < 12
    expected = sum(sum(losses_of(folder, ids)) for ids in documents)
    assert evaluate(folder, text=[str(text)]).nats == pytest.approx(expected, rel=1e-5)
    best = plain(torch.tensor([[mark, *tokenizer.encode("a b")]]))[0, -1].argmax()
    assert "".join(generate_text(folder, "a b", 1, top_k=1)) == tokenizer.decode([int(best)])


def test_json_lines_are_documents(run: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(["{broken", *(json.dumps({"body": {"text": text}}) for text in TEXTS)]))
    tokenizer = Tokenizer(run["data"] / "tokenizer.model")
    found = read_text([str(path)], tokenizer, "body.text")
    assert (found.documents, found.broken) == (len(TEXTS), 1)
    assert found.ids.tolist().count(tokenizer.eod_id) == len(TEXTS) + 1
    scored = evaluate(run["run"], text=[str(path)], text_key="body.text", samples=1)
    assert f"1 broken record left out, the first: {path}:1: bad JSON" in scored.data


def test_the_command(run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--samples", "4", "--json"], ["--samples", "4"]):
        with pytest.raises(SystemExit) as left:
            main(["eval", str(run["run"]), *arguments])
        assert not left.value.code
    first, text = capsys.readouterr().out.split("\n", 1)
    facts = json.loads(first)
    assert facts["per_token"]["nats"] == pytest.approx(run["eval"]["loss"], rel=1e-6)
    assert facts["per_token"]["perplexity"] == pytest.approx(math.exp(facts["per_token"]["nats"]))
    for unit, value in (
        ("token", facts["per_token"]["nats"]),
        ("byte", facts["per_byte"]["bits"]),
        ("word", facts["per_word"]["bits"]),
    ):
        line = next(line for line in text.splitlines() if line.split()[0] == unit)
        assert f"{value:.5f}" in line
        assert f"{facts[unit + 's']:,}" in line


def test_what_does_not_fit_is_refused(
    run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(
        "another tokenizer of the same size " * 20 + "".join(map(chr, range(97, 123)))
    )
    (tmp_path / "u.txt").write_text("a second document, for the other split " * 20)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    other = {}
    for name, size in (("same", VOCAB), ("larger", VOCAB + 5)):
        train_tokenizer(
            [str(run["texts"] / "texts")] if name == "larger" else [str(tmp_path / "t.txt")],
            tmp_path / f"{name}.model",
            size,
            "bpe",
        )
        other[name] = tmp_path / name
        prepare(
            PrepareOptions(
                inputs=[str(tmp_path / "[tu].txt")],
                out=other[name],
                tokenizer=tmp_path / f"{name}.model",
                split=(1, 1, 0),
                workers=1,
            )
        )
    cases = [
        ({"data": other["same"]}, "was prepared with another tokenizer than the model's"),
        ({"data": other["larger"]}, f"vocabulary of {VOCAB + 5}, the model {VOCAB}"),
        ({"data": run["data"], "text": ["x"]}, "either --data or --text"),
        ({"data": run["data"], "split": "test"}, "the test split has 0 tokens"),
        ({"data": run["data"], "stride": 4}, "--stride 4 has an effect on --text only"),
        ({"data": run["data"], "samples": 10**6}, r"--samples 1000000: .* gives \d+ windows only"),
        (
            {"text": [str(tmp_path / "t.txt")], "stride": 17},
            "--stride 17 must lie between 1 and the window of 16",
        ),
        ({"text": [str(tmp_path / "nothing.txt")]}, "no such file"),
        ({"text": [str(tmp_path / "empty.txt")]}, "there is no text"),
        ({"text": [str(tmp_path / "bad.txt")]}, "there is no text in it: .*bad.txt: .*not UTF-8"),
        ({"data": run["data"], "text_key": "x"}, "--text-key x has an effect on --text only"),
    ]
    for arguments, reason in cases:
        with pytest.raises(UserError, match=reason):
            evaluate(run["run"], **arguments)
    with pytest.raises(SystemExit) as left:
        main(["eval", str(run["run"]), "--text", "x.txt", "--split", "train"])
    assert left.value.code == 2
    assert "--split train has no effect with --text" in capsys.readouterr().err


def test_without_a_tokenizer_there_are_tokens_only(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointReader, "tokenizer_path", None)
    without = evaluate(run["run"], samples=4)
    assert without.nats / without.tokens == pytest.approx(run["eval"]["loss"], rel=1e-6)
    assert (without.bytes, without.words, without.per(without.bytes)) == (None, None, None)
    with pytest.raises(UserError, match="needs a tokenizer"):
        evaluate(run["run"], text=["x.txt"])


def test_a_damaged_checkpoint_is_not_scored(run: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(run["run"] / "checkpoints", tmp_path / "c")
    path = next((tmp_path / "c").glob("*/rank_*.safetensors"))
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(UserError, match="is damaged"):
        evaluate(tmp_path / "c", data=run["data"], samples=1)
