"""What a start makes of a checkpoint that was written with other settings or data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from parallel.checkpoint.format import FORMAT, MANIFEST, manifest_text
from parallel.checkpoint.reader import open_checkpoint
from pretrain.config.schema import Corpus, RunConfig
from pretrain.data.prepare import PrepareOptions, prepare
from pretrain.train.loop import Trainer
from tests.pretrain.small import small_config, small_data, small_trainer

STEPS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and `other` of the same tokenizer."""
    folder = small_data(tmp_path_factory.mktemp("data"))
    prepare(
        PrepareOptions(
            inputs=[str(folder.parent / "texts")],
            out=folder.with_name("other"),
            tokenizer=folder / "tokenizer.model",
            split=(1.0, 1.0, 0.0),
            workers=1,
        )
    )
    return folder


def config_of(runs: Path, *corpora: tuple[Path, float], steps: int = 2, **model: Any) -> RunConfig:
    config = small_config(corpora[0][0], runs, STEPS, signal_interval=0, **model)
    config.data.corpora = [Corpus(path=str(path), weight=weight) for path, weight in corpora]
    config.train.stop_at_step = steps
    return config


def start(config: RunConfig) -> Trainer:
    trainer = small_trainer(config)
    trainer.resume()
    return trainer


def run(config: RunConfig) -> Trainer:
    trainer = start(config)
    trainer.run()
    return trainer


def test_an_unchanged_run_says_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, (data, 1.0))
    run(config)
    config.train.stop_at_step = 3
    capsys.readouterr()
    assert start(config).step == 2
    assert "differs" not in capsys.readouterr().err


def test_what_differs_is_said_in_one_line(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path, (data, 1.0))
    config.schedule.kind = "cosine"
    run(config)
    data.with_name("moved").symlink_to(data)
    config.data.corpora[0].path = str(data.with_name("moved"))
    config.optimizer.lr, config.optimizer.weight_decay, config.train.steps = 2e-3, 0.0, 40
    config.train.precision, config.model.hidden_dropout = "fp32", 0.1
    config.train.compile, config.parallel.grad_reduce = True, "bf16"
    capsys.readouterr()
    start(config)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "differs" in line]
    assert line.startswith("small: differs from step_00000002: ")
    for said in (
        f"data.corpora.0.path {data} -> {data.with_name('moved')}",
        "optimizer.lr 0.01 -> 0.002",
        "optimizer.weight_decay 0.1 -> 0.0",
        "train.steps 4 -> 40",
        "train.precision auto -> fp32",
        "model.hidden_dropout 0.0 -> 0.1",
        "train.compile false -> true",
        "parallel.grad_reduce fp32 -> bf16",
        "learning rate of step 3 0.00232 -> 0.00198",
    ):
        assert said in line
    assert len(line.split(": ", 2)[2].split(", ")) == 9


def test_other_data_are_refused_unless_the_step_is_named(data: Path, tmp_path: Path) -> None:
    other = data.with_name("other")
    run(config_of(tmp_path, (data, 1.0)))
    changed = config_of(tmp_path, (other, 1.0), steps=3)
    with pytest.raises(
        UserError, match="other holds other tokens.*data.changed_at_step=2 to go on.*checkpoint.load"
    ):
        start(changed)
    changed.data.changed_at_step = 1
    with pytest.raises(UserError, match="data.changed_at_step=2"):
        start(changed)
    changed.data.changed_at_step = 2
    assert run(changed).step == 3
    # From here on the new data are the run's, with the setting or without.
    changed.data.changed_at_step = None
    assert start(changed).step == 3
    with pytest.raises(UserError, match="data.changed_at_step=3"):
        start(config_of(tmp_path, (data, 1.0)))


def test_other_weights_are_refused_and_other_units_are_not(data: Path, tmp_path: Path) -> None:
    other = data.with_name("other")
    run(config_of(tmp_path, (data, 3.0), (other, 1.0)))
    assert start(config_of(tmp_path, (data, 6.0), (other, 2.0))).step == 2
    with pytest.raises(UserError, match="shares 75 % : 25 %, now 50 % : 50 %"):
        start(config_of(tmp_path, (data, 1.0), (other, 1.0)))
    with pytest.raises(UserError, match="data.corpora.0.path=.*other holds other tokens"):
        start(config_of(tmp_path, (other, 3.0), (data, 1.0)))
    with pytest.raises(UserError, match="2 data sets, now 1"):
        start(config_of(tmp_path, (data, 1.0)))


def test_settings_that_choose_samples_are_refused(data: Path, tmp_path: Path) -> None:
    run(config_of(tmp_path, (data, 1.0)))
    for section, key, value in (
        ("train", "seed", 7),
        ("train", "global_batch_size", 8),
        ("data", "seq_length", 8),
    ):
        config = config_of(tmp_path, (data, 1.0))
        setattr(getattr(config, section), key, value)
        with pytest.raises(
            UserError, match=f"was trained with {section}.{key}=.*, the configuration has {value}"
        ):
            start(config)


def test_checkpoints_of_the_first_version_compare_weights(data: Path, tmp_path: Path) -> None:
    other = data.with_name("other")
    run(config_of(tmp_path, (data, 3.0), (other, 1.0)))
    forget_data(tmp_path / "small")
    assert start(config_of(tmp_path, (data, 3.0), (other, 1.0))).step == 2
    with pytest.raises(UserError, match="shares 75 % : 25 %, now 50 % : 50 %"):
        start(config_of(tmp_path, (data, 1.0), (other, 1.0)))


def test_settings_that_a_checkpoint_does_not_know_have_their_defaults(data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, (data, 1.0))
    run(config)
    path = tmp_path / "small/checkpoints/step_00000002" / MANIFEST
    manifest = json.loads(path.read_text())
    for key in ("logit_bias", "transfer"):
        del manifest["config"]["model"][key]
    path.write_text(manifest_text(manifest))
    assert start(config).step == 2
    transfer = {"method": "completep", "base_layers": 1}
    with pytest.raises(UserError, match=r"was trained with model\.transfer=.*none.*completep"):
        start(config_of(tmp_path, (data, 1.0), transfer=transfer))


@pytest.mark.parametrize("position", ["rotary", "none"])
def test_longer_sequences_begin_from_a_checkpoint_without_a_table(
    data: Path,
    tmp_path: Path,
    position: str,
) -> None:
    run(config_of(tmp_path / "short", (data, 1.0), position=position, num_attention_heads=2))
    long = longer(tmp_path, data, position)
    trainer = start(long)
    short = open_checkpoint(tmp_path / "short" / "small")
    for part in trainer.engine.parameters[:3]:
        assert torch.equal(part.parameter.float(), short.tensor(part.name).float())
    trainer.run()
    assert trainer.step == 2


def test_a_table_of_positions_is_not_stretched(data: Path, tmp_path: Path) -> None:
    run(config_of(tmp_path / "short", (data, 1.0), position="learned"))
    with pytest.raises(
        UserError, match="a table of 16 learned positions .* too few for data.seq_length=32: set 16 or less"
    ):
        start(longer(tmp_path, data, "learned"))
    shorter = longer(tmp_path, data, "learned")
    shorter.data.seq_length = 8
    shorter.model = shorter.model.model_copy(update={"max_position_embeddings": 8})
    with pytest.raises(UserError, match="set model.max_position_embeddings=16"):
        start(shorter)


def longer(tmp_path: Path, data: Path, position: str) -> RunConfig:
    """A run of twice the sequence length from the other's checkpoint."""
    config = config_of(tmp_path / "long", (data, 1.0), position=position, max_position_embeddings=32)
    config.data.seq_length = 32
    config.checkpoint.load = str(tmp_path / "short" / "small")
    return config


def forget_data(run_dir: Path) -> None:
    """Rewrites the newest manifest as version 0.1.0 wrote it."""
    from parallel.checkpoint.format import manifest_text

    folder = open_checkpoint(run_dir).folder
    content = json.loads((folder / MANIFEST).read_text())
    assert content["format"] == FORMAT
    del content["progress"]["data"], content["config"]["masking"], content["config"]["train"]["task"]
    for key in ("family", "token_types", "embedding_norm"):
        del content["config"]["model"][key]
    (folder / MANIFEST).write_text(manifest_text(content))
