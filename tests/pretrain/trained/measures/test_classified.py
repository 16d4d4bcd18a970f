"""`fathom eval` of a model of images gives what its trainer's evaluation gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.data.images.prepare import ImageOptions, prepare_images
from pretrain.trained.measures.classified import images_of
from pretrain.trained.open import open_trained
from tests.pretrain.pictures import picture_data, write_pictures
from tests.pretrain.small import Told, trained
from tests.pretrain.train.test_classification import config_of
from tools.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    folder = tmp_path_factory.mktemp("images")
    trainer, told = trained(config_of(picture_data(folder), folder / "runs", train={"steps": 3}))
    return trainer.run_dir, told


def fathom(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(one) for one in arguments])
    assert (left.value.code or 0) == code


def test_the_trainers_evaluation_is_found_again(
    run: tuple[Path, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, told = run
    fathom("eval", folder, "--json", "--batch-size", 5)
    facts = json.loads(capsys.readouterr().out)
    last = told.evaluations[-1]
    assert facts["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert (facts["accuracy"], facts["top5"]) == (last["accuracy"], last["top5"])
    assert sum(one["images"] for one in facts["classes"].values()) == facts["images"] > 5
    assert sum(one["right"] for one in facts["classes"].values()) == facts["accuracy"] * facts["images"]
    fathom("eval", folder, "--samples", 4)
    out = capsys.readouterr().out
    assert "4 images of" in out
    assert "nats per image, accuracy" in out


def test_what_does_not_fit_is_refused(
    run: tuple[Path, Told], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = run
    fathom("eval", folder, "--text", "a", code=2)
    assert "--text: has no effect on a model of images" in capsys.readouterr().err
    fathom("eval", folder, "--samples", 1000, code=2)
    assert "images only" in capsys.readouterr().err
    write_pictures(tmp_path / "in", {"dark": 4, "pale": 4})
    options = {"tokenizer": Path(), "workers": 1, "size": (8, 8), "split": (0.5, 0.5, 0.0)}
    prepare_images(ImageOptions([str(tmp_path / "in")], tmp_path / "other", **options))  # type: ignore[arg-type]
    fathom("eval", folder, "--data", tmp_path / "other", code=2)
    assert "has other classes than" in capsys.readouterr().err


def test_other_images_are_standardised_as_those_of_training(run: tuple[Path, Told], tmp_path: Path) -> None:
    folder, _ = run
    write_pictures(tmp_path / "in", {"dark": 9, "light": 1})
    options = {"tokenizer": Path(), "workers": 1, "size": (8, 8), "split": (1.0, 0.0, 0.0)}
    prepare_images(ImageOptions([str(tmp_path / "in")], tmp_path / "other", **options))  # type: ignore[arg-type]
    opened = open_trained(folder)
    own, _ = images_of(opened, None, "train")
    other, _ = images_of(opened, tmp_path / "other", "train")
    pixels, _ = other.reader.read(0)
    assert other.reader.facts.mean != own.reader.facts.mean
    assert torch.equal(other.view.plain(pixels), own.view.plain(pixels))
