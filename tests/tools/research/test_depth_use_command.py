"""`fathom depth-use` on trained runs, from end to end."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from pretrain.trained.measures.perplexity import evaluate
from tests.pretrain.small import small_config, small_data, small_trainer
from tools.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one name and two depths, and one with windows of another length."""
    folder = tmp_path_factory.mktemp("depth_use")
    data, found = small_data(folder), {}
    for name, layers in (("shallow", 3), ("deep", 6), ("short", 3)):
        config = small_config(data, folder / name, 4, num_layers=layers, scheme="b2t")
        if name == "short":
            config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 8})})
        small_trainer(config).run()
        found[name] = folder / name / "small"
    return found


def depth_use(*arguments: object) -> object:
    with pytest.raises(SystemExit) as left:
        main(["depth-use", *map(str, arguments)])
    return left.value.code


def test_two_runs_in_one_picture(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not depth_use(runs["shallow"], runs["deep"], "--samples", 5)
    printed = capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth_use.json", "depth_use.png"]
    found = json.loads((tmp_path / "depth_use.json").read_text())["runs"]
    for run, name, layers in zip(found, ("shallow", "deep"), (3, 6), strict=True):
        assert (run["label"], run["num_layers"], run["windows"]) == (str(runs[name]), layers, 5)
        assert [skip["first"] for skip in run["singles"]] == list(range(1, layers + 1))
        assert [place["layer"] for place in run["predictions"]] == list(range(layers + 1))
        assert [layer["layer"] for layer in run["layers"]] == list(range(1, layers + 1))
        scored = evaluate(runs[name], samples=5)
        assert run["loss"] == pytest.approx(scored.nats / scored.tokens, rel=1e-6)
        assert run["tokens"] == scored.tokens
        assert run["verdict"] in printed.out.splitlines()
        assert f"{runs[name]}: {layers} of {layers} layers and {layers} blocks are skipped" in printed.err
    size = struct.unpack(">II", (tmp_path / "depth_use.png").read_bytes()[16:24])
    assert size[0] > 2 * size[1]


def test_text_and_names_of_files(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text("a few words of a text that nobody has seen " * 3)
    out = tmp_path / "a.json", tmp_path / "b.svg"
    options = ["--every", 2, "--json", out[0], "--plot", out[1], "--batch-size", 3]
    assert not depth_use(runs["shallow"], "--text", tmp_path / "t.txt", *options)
    (found,) = json.loads(out[0].read_text())["runs"]
    assert (found["label"], [skip["first"] for skip in found["singles"]]) == ("small", [1, 3])
    assert found["data"] == f"1 document of {tmp_path / 't.txt'}"
    assert out[1].read_text().startswith("<?xml")
    assert capsys.readouterr().out.endswith(f"json: {out[0]}\nplot: {out[1]}\n")
    options[3] = "-"
    assert not depth_use(runs["shallow"], "--text", tmp_path / "t.txt", *options)
    assert json.loads(capsys.readouterr().out) == {"runs": [found]}


def test_mistakes_are_one_line(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = runs["shallow"]
    for arguments, reason in (
        (("nowhere",), "nowhere"),
        ((run, tmp_path), "holds no checkpoint"),
        ((run, runs["short"]), "would be measured on different tokens"),
        ((run, "--every", 4), "--every 4: the model has 3 layers only"),
        ((run, "--plot", "a.html"), "--plot a.html: the name must end in one of .png, .svg, .pdf"),
        ((run, "--precision", "fp16"), "--precision fp16 is not known"),
        ((run, "--split", "train", "--text", "a.txt"), "--split train has no effect with --text"),
        ((run, "--plot", f"{__file__}/x.png"), "x.png: cannot write to "),
        ((run, "--json", "x.png", "--plot", "./x.png"), "--json and --plot name the same file, x.png"),
        ((run, "--json", "/dev/full"), "--json /dev/full is no regular file"),
        ((run, "--samples", 10**6), "gives"),
    ):
        assert depth_use(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert reason in error
    assert list(tmp_path.iterdir()) == []
