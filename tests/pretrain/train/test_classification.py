"""Classification from image files to checkpoint: what is learnt, and exact resumption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.errors import UserError
from pretrain.config.load import complete_model
from pretrain.config.schema import RunConfig
from pretrain.data.images.prepare import ImageOptions, prepare_images
from pretrain.data.manifest import load_manifest
from pretrain.data.samples import open_samples
from tests.pretrain.pictures import picture_data, write_pictures
from tests.pretrain.small import small_trainer, trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_data(tmp_path_factory.mktemp("pictures"))


def config_of(data: Path, runs: Path, /, **changes: Any) -> RunConfig:
    model = {
        "family": "vit",
        "scheme": "deepscalelm_pre_ln",
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "tie_embeddings": False,
        "vocab_multiple": 2,
        "image": {"height": 8, "patch": 4},
        **changes.pop("model", {}),
    }
    config = RunConfig.model_validate(
        {
            "name": "small",
            "runs_dir": str(runs),
            "model": model,
            "data": {"corpora": [{"path": str(data)}], "seq_length": 5, **changes.pop("data", {})},
            "augment": {"flip": True, "shift": 1, "mixup": 0.5},
            "optimizer": {"lr": 1e-2},
            "schedule": {"kind": "constant"},
            "train": {
                "steps": 6,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "eval_samples": 100,
                "label_smoothing": 0.1,
                **changes.pop("train", {}),
            },
            "log": {"signal_interval": 0, "progress": "none", "tensorboard": False},
            **changes,
        }
    )
    manifest = load_manifest(data)
    config.model = complete_model(config, manifest.vocab_size, manifest.patch_correlations)
    return config


def test_a_run_that_stops_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    whole, told = trained(config_of(data, tmp_path / "whole"))
    _, first = trained(config_of(data, tmp_path / "parts", train={"stop_at_step": 3}))
    parts, second = trained(config_of(data, tmp_path / "parts"))
    assert first.losses + second.losses == told.losses
    assert second.evaluations == told.evaluations
    for ours, theirs in zip(parts.engine.parameters, whole.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)


def test_another_run_begins_from_weights_whatever_drew_them(data: Path, tmp_path: Path) -> None:
    """Of a data set with other correlations, or of an import, which knows none."""
    first, _ = trained(config_of(data, tmp_path, train={"steps": 2}))
    image = {"height": 8, "patch": 4, "zero_head": False, "patch_correlation": 0.25}
    load = {"load": str(tmp_path / "small")}
    second = small_trainer(config_of(data, tmp_path / "on", model={"image": image}, checkpoint=load))
    second.resume()
    for ours, theirs in zip(second.engine.parameters, first.engine.parameters, strict=True):
        assert torch.equal(ours.parameter, theirs.parameter)
    other = {"image": {"height": 8, "patch": 4, "pool": "mean"}}
    apart = config_of(data, tmp_path / "apart", model=other, data={"seq_length": 4}, checkpoint=load)
    with pytest.raises(UserError, match=r"was trained with model\.image="):
        small_trainer(apart).resume()


def test_a_run_does_not_go_on_with_other_classes(data: Path, tmp_path: Path) -> None:
    """As many of them, under the same numbers."""
    trained(config_of(data, tmp_path, train={"steps": 2}))
    write_pictures(tmp_path / "pictures", {"bright": 40, "dim": 40})
    other = ImageOptions([str(tmp_path / "pictures")], tmp_path / "other", Path(), (0.8, 0.2, 0), workers=1)
    prepare_images(replace(other, size=(8, 8)))
    changed = {"corpora": [{"path": str(tmp_path / "other")}], "changed_at_step": 2}
    with pytest.raises(UserError, match=r"other classes than .*step_00000002 \(bright\)"):
        small_trainer(config_of(data, tmp_path, data=changed)).resume()


def test_brightness_is_learnt(data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path, augment={}, train={"steps": 30})
    assert config.model.image is not None
    assert config.model.image.patch_correlation == load_manifest(data).patch_correlations[4] > 0.5
    _, told = trained(config)
    assert told.losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)  # a head of zeros
    assert told.evaluations[-1]["accuracy"] > 0.9
    assert told.evaluations[-1]["top5"] == 1.0
    assert told.evaluations[-1]["samples"] == load_manifest(data).splits["validation"].documents


def test_samples_do_not_depend_on_what_is_read_before(data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path)
    samples = open_samples(config, "images", "train")
    first = samples.batch([70, 3, 200])
    samples.batch(range(10))
    again = open_samples(config, "images", "train").batch([200, 70])
    for name in ("images", "labels", "weights"):
        assert torch.equal(first[name][[2, 0]], again[name])
    torch.testing.assert_close(first["weights"].sum(1), torch.ones(3))
    assert samples.targets(range(5)) == 5
    everything = open_samples(config_of(data, tmp_path, augment={}), "images", "train")
    size = everything.blend.samples_per_epoch[0]
    epoch = everything.batch(range(size, 2 * size))["images"]
    assert len({image.numpy().tobytes() for image in epoch}) == size  # each once in every pass
    torch.testing.assert_close(epoch.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(epoch.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"image": {"height": 8, "patch": 4, "channels": 1}}},
            "have 3 channels, model.image.channels=1",
        ),
        (
            {"model": {"image": {"height": 16, "patch": 8}}, "data": {"seq_length": 5}},
            "images of 3x8x8 are smaller than model.image, 3x16x16",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_samples(config_of(data, tmp_path, **changes), "images", "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"seq_length": 4}}, "set data.seq_length=5"),
        ({"train": {"task": "masked_lm"}}, "train.task=masked_lm does not combine with model.family=vit"),
        ({"augment": {"shift": 1, "min_area": 0.5}}, "augment.shift=1 has no effect"),
        ({"masking": {"rate": 0.3}}, "masking has no effect with train.task=classification"),
    ],
)
def test_settings_without_effect_are_refused(
    changes: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(data, tmp_path, **changes)
