"""Transcription from sound files to words: rows, what is hidden, resumption, writing and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from model.errors import UserError
from model.speech import tokens_of
from pretrain.config.load import complete_model
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.data.samples import open_samples
from pretrain.data.speech.prepare import SpeechOptions, prepare_speech
from pretrain.data.speech.samples import ClipBlend
from pretrain.report.recordings import recording_charts
from pretrain.report.run import RunRecord
from pretrain.rundir.description import Facts
from pretrain.rundir.metrics import Metrics
from pretrain.trained.beam import Search
from pretrain.trained.measures.clips import evaluate_clips, open_split
from pretrain.trained.open import BOTH, open_trained
from pretrain.trained.transcribe import Transcriber, open_transcriber
from pretrain.trained.translate import translate
from tests.pretrain.clips import SIDES, spoken, write_clip, write_speech
from tests.pretrain.small import small_trainer, trained
from tools.cli import app

FILTERS = 20
AUGMENT = {"frequency_masks": 1, "frequency_width": 4, "time_masks": 1, "time_width": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and FOLDER/data."""
    folder = tmp_path_factory.mktemp("clips")
    write_speech(folder, filters=FILTERS)
    return folder


def config_of(folder: Path, runs: Path, /, **changes: Any) -> RunConfig:
    model = {
        "family": "speech",
        "scheme": "deepscalelm_pre_ln",
        "num_layers": 2,
        "encoder_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "position": "sinusoidal",
        "speech": {"filters": FILTERS, "channels": 32},
        **changes.pop("model", {}),
    }
    config = RunConfig.model_validate(
        {
            "name": "small",
            "runs_dir": str(runs),
            "model": model,
            "data": {"corpora": [{"path": str(folder / "data")}], "source_length": 32, "seq_length": 24},
            "spec_augment": AUGMENT,
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "train": {
                "steps": 4,
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "eval_samples": 2,
                "label_smoothing": 0.1,
                **changes.pop("train", {}),
            },
            "log": {"signal_interval": 0, "progress": "none", "tensorboard": False},
            **changes,
        }
    )
    manifest = load_manifest(folder / "data")
    config.model = complete_model(config, manifest.vocab_size, None, manifest.moments)
    return config


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two clips, and a data set of them whose frames are normalised together."""
    clips = tmp_path_factory.mktemp("other")
    for seed in range(2):
        write_clip(clips / f"{seed}.wav", 0.1 * (1 + seed) * spoken(["red", "blue"][: 1 + seed], seed))
    (clips / "list.tsv").write_text("path\ttranscript\n0.wav\tred\n1.wav\tred blue\n")
    prepare_speech(
        SpeechOptions(
            [str(clips / "list.tsv")],
            clips / "data",
            folder / "words.model",
            (1, 0, 0),
            workers=1,
            sides=SIDES,
            filters=FILTERS,
            normalise="global",
        )
    )
    return clips, clips / "data"


def test_other_data_are_heard_as_the_model_was_trained(
    folder: Path, other: tuple[Path, Path], tmp_path: Path
) -> None:
    """An evaluation hears what `fathom transcribe` does, however the data set was prepared."""
    trained(config_of(folder, tmp_path, train={"steps": 1}))
    model = open_trained(tmp_path / "small")
    rows = open_split(model, "train", other[1])
    heard = sorted(
        (frames for row in range(rows.samples_per_epoch[0]) for frames, _ in rows.clips_of(row)), key=len
    )
    transcriber = Transcriber(model)
    for number, frames in enumerate(heard):
        np.testing.assert_allclose(frames, transcriber.encode(str(other[0] / f"{number}.wav")), atol=1e-5)
    assert len(heard) == 2


def test_data_of_other_filters_are_not_heard(folder: Path, other: tuple[Path, Path], tmp_path: Path) -> None:
    trained(config_of(folder, tmp_path, train={"steps": 1}))
    source = [str(other[0] / "list.tsv")]
    tokenizer = folder / "words.model"
    options = SpeechOptions(
        source, tmp_path / "data", tokenizer, (1, 0, 0), workers=1, sides=SIDES, filters=8
    )
    prepare_speech(options)
    with pytest.raises(UserError, match=f"its frames have 8 filters, model.speech.filters={FILTERS}: "):
        evaluate_clips(open_trained(tmp_path / "small"), data=tmp_path / "data", split="train")


def test_clips_that_are_not_normalised_alike_are_not_mixed(
    folder: Path, other: tuple[Path, Path], tmp_path: Path
) -> None:
    corpora = [{"path": str(folder / "data")}, {"path": str(other[1])}]
    config = config_of(folder, tmp_path)
    config.data = config.data.model_validate(config.data.model_dump() | {"corpora": corpora})
    with pytest.raises(UserError, match=r"data\.corpora: frames of .* are not normalised alike.*--normalise"):
        open_samples(config, "clips", "train")


def test_another_run_begins_from_weights_whatever_drew_them(folder: Path, tmp_path: Path) -> None:
    """Frames of another data set have other moments."""
    first, _ = trained(config_of(folder, tmp_path, train={"steps": 1}))
    moments = {"entering": 0.9, "middle": 0.5, "leaving": 0.5, "correlation": 0.3}
    speech = {"filters": FILTERS, "channels": 32, "moments": moments}
    load = {"load": str(tmp_path / "small")}
    second = small_trainer(config_of(folder, tmp_path / "on", model={"speech": speech}, checkpoint=load))
    second.resume()
    for ours, theirs in zip(second.engine.parameters, first.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


def test_rows_hold_clips_apart_and_do_not_depend_on_what_is_read_before(folder: Path, tmp_path: Path) -> None:
    samples = open_samples(config_of(folder, tmp_path), "clips", "train")
    first = samples.batch([7, 3])
    samples.batch(range(5))
    again = open_samples(config_of(folder, tmp_path), "clips", "train").batch([3, 7])
    assert all(torch.equal(first[name], again[name].flip(0)) for name in first)
    assert {name: (one.shape, one.dtype) for name, one in samples.blank(2).items()} == {
        name: (one.shape, one.dtype) for name, one in first.items()
    }
    assert samples.targets([7, 3]) == int(first["weights"].sum())
    whole = open_samples(config_of(folder, tmp_path, spec_augment={}), "clips", "train")
    assert isinstance(whole.blend, ClipBlend)
    row, clips = {name: one[0] for name, one in whole.batch([7]).items()}, whole.blend.clips_of(7)
    place = 0
    for number, (frames, ids) in enumerate(clips, start=1):
        begin = 4 * place
        assert torch.equal(row["frames"][begin : begin + len(frames)], torch.from_numpy(frames))
        assert (row["frame_documents"] == number).nonzero().flatten().tolist() == list(
            range(begin, begin + len(frames))
        )
        assert row["labels"][row["documents"] == number].tolist() == ids.tolist()
        place += tokens_of(len(frames)) + 1
        np.testing.assert_allclose(frames.std(0), 1, atol=1e-3)
    assert not row["frames"][row["frame_documents"] == 0].any()


def test_what_is_hidden_is_within_its_bounds_and_new_in_every_pass(folder: Path, tmp_path: Path) -> None:
    whole = open_samples(config_of(folder, tmp_path, spec_augment={}), "clips", "train")
    masked = open_samples(config_of(folder, tmp_path), "clips", "train")
    count, shares = whole.blend.samples_per_epoch[0], []
    for index in range(count):
        seen, hidden = whole.batch([index])["frames"][0], masked.batch([index])["frames"][0]
        gone = (seen != hidden).numpy()
        assert not hidden[torch.from_numpy(gone)].any()
        shares.append(gone.sum() / int((seen != 0).sum()))
        documents = whole.batch([index])["frame_documents"][0]
        for number in range(1, int(documents.max()) + 1):
            own = gone[(documents == number).numpy()]
            assert own.all(1).sum() <= 4, "frames"
            assert own[~own.all(1)].all(0).sum() <= 4, "filters"
    assert 0.05 < np.mean(shares) < 0.35
    passes = [masked.batch(range(at * count, (at + 1) * count))["frames"] for at in (0, 1)]
    assert (passes[0] == 0).sum() != (passes[1] == 0).sum()
    validation = [
        open_samples(config_of(folder, tmp_path, spec_augment=given), "clips", "validation").batch([0])
        for given in ({}, AUGMENT)
    ]
    assert torch.equal(validation[0]["frames"], validation[1]["frames"])


def test_a_run_goes_on_bit_for_bit_and_writes_what_it_hears(folder: Path, tmp_path: Path) -> None:
    whole, told = trained(config_of(folder, tmp_path / "whole"))
    _, first = trained(config_of(folder, tmp_path / "parts", train={"stop_at_step": 2}))
    parts, second = trained(config_of(folder, tmp_path / "parts"))
    assert first.losses + second.losses == told.losses
    for ours, theirs in zip(parts.engine.parameters, whole.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)

    run = open_trained(tmp_path / "whole" / "small")
    search = Search(beam=2, max_new_tokens=6)
    measured = evaluate_clips(run, samples=2, settings=search)
    assert measured.loss == pytest.approx(told.evaluations[-1]["loss"], rel=1e-5)
    assert measured.written is not None
    assert measured.written.errors.words > 0.5
    assert measured.written.errors.said >= measured.clips

    described = Facts({"model": config_of(folder, tmp_path).model.model_dump(mode="json")})
    (chart,) = recording_charts(RunRecord(whole.run_dir, Metrics(), described, Facts(), {}))
    assert chart.svg.count("<image ") == 4

    path = tmp_path / "clip.wav"
    write_clip(path, spoken(["red", "blue"]))
    transcriber = open_transcriber(tmp_path / "whole" / "small")
    both = translate(transcriber, [str(folder / "0.wav"), str(path)], search, batch_size=2)
    alone = translate(transcriber, [str(path)], search)
    assert both[1][0].text == alone[0][0].text
    assert both[1][0].score == pytest.approx(alone[0][0].score, rel=1e-4)
    given = ["transcribe", str(tmp_path / "whole" / "small"), str(path), "--beam", "2"]
    command = CliRunner().invoke(app, [*given, "--max-new-tokens", "6"])
    assert command.output.splitlines() == [alone[0][0].line]
    with pytest.raises(UserError, match="fathom translate.* is for an encoder-decoder"):
        run.check_kind(BOTH)
    with pytest.raises(UserError, match=r"none\.wav: .*: name a WAV or FLAC file"):
        Transcriber(run).encode(str(tmp_path / "none.wav"))


@pytest.mark.slow
def test_tones_are_learnt(tmp_path: Path) -> None:
    """Of six words a model that does not hear gets one in six right; 278 clips teach it more."""
    write_speech(tmp_path, 400)
    config = config_of(tmp_path, tmp_path, spec_augment={}, train={"steps": 300, "global_batch_size": 8})
    trained(config)
    told = evaluate_clips(open_trained(tmp_path / "small"), settings=Search(beam=1))
    assert told.written is not None
    assert told.written.errors.words < 0.6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"task": "translation"}}, "does not combine with model.family=speech"),
        ({"spec_augment": {"time_width": 3}}, "spec_augment.time_width=3 has no effect"),
        ({"augment": {"flip": True}}, "augment has no effect with train.task=transcription"),
    ],
)
def test_settings_without_effect_are_refused(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(folder, tmp_path, **changes)


def test_data_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, tmp_path, model={"speech": {"filters": 8, "channels": 8}})
    with pytest.raises(UserError, match=r"have 20 filters, model\.speech\.filters=8"):
        open_samples(config, "clips", "train")
    with pytest.raises(UserError, match="holds speech, which only a model of model.family=speech reads"):
        open_samples(config, "next_token", "train")
