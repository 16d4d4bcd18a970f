"""Classifiers of images as ViTForImageClassification: proved by logits, used by a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.export import export
from model.hf.proof import load_exported, proof_inputs
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from tests.model.network.test_vit import build, config_of

PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 6, "width": 8},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4] * 3,
    "image_std": [0.2] * 3,
}
LABELS = {"id2label": {str(number): f"class {number}" for number in range(11)}}


def weights_of(chunk: LanguageModel) -> dict[str, Tensor]:
    return {one.name: one.parameter.detach().float() for one in named_parameters(chunk, 0, 1)}


def exported(folder: Path, config: ModelConfig, **more: Any) -> tuple[Path, LanguageModel]:
    chunk = build(config)
    export(
        weights_of(chunk),
        config,
        folder,
        logit_scale=logit_scale(config),
        tokenizer=None,
        seq_length=13,
        special=LABELS,
        processor=PROCESSOR,
        **more,
    )
    return folder, chunk


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("scheme", ["pre_ln", "deepscalelm_pre_ln", "layernorm_scaling"])
def test_an_export_gives_the_models_logits(scheme: str, channels: int, tmp_path: Path) -> None:
    """Of the training's own model, not only of what the export proves itself with."""
    config = config_of(scheme, {"channels": channels}, norm_epsilon=1e-12, logit_bias=channels != 2)
    folder, chunk = exported(tmp_path / "hf", config)
    inputs = proof_inputs(config, 13)
    model = load_exported(folder, "vit", config)
    assert type(model).__name__ == "ViTForImageClassification"
    theirs = model(**inputs.arguments()).logits
    ours = chunk({"images": inputs.tokens.double()})[:, 0, :11]
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-4 * float(ours.std()))


def test_a_pipeline_reads_files_of_grey_images(tmp_path: Path) -> None:
    from transformers import pipeline

    config = config_of("pre_ln", {"channels": 1}, norm_epsilon=1e-6)
    folder, chunk = exported(tmp_path / "hf", config)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    told = pipeline("image-classification", model=str(folder))(str(tmp_path / "grey.png"), top_k=11)
    images = (torch.from_numpy(pixels).double()[None, None] / 255 - 0.4) / 0.2
    shares = chunk({"images": images})[0, 0, :11].softmax(-1)
    assert {one["label"] for one in told} == set(LABELS["id2label"].values())
    for one in told:
        assert one["score"] == pytest.approx(float(shares[int(one["label"].split()[1])]), abs=1e-5)


@pytest.mark.parametrize(
    ("scheme", "changes", "reason"),
    [
        ("b2t", {}, "no class of transformers computes this model .scheme b2t., not even vit"),
        ("pre_ln", {"image": {"pool": "mean"}}, "it reads a class token"),
        ("pre_ln", {"position": "sinusoidal"}, "it has learned positions, the model sinusoidal"),
    ],
)
def test_other_models_are_refused_in_one_line(
    scheme: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        exported(tmp_path / "hf", config_of(scheme, **changes))
    assert not (tmp_path / "hf").exists()
