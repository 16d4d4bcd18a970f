"""Classifiers of images as ViTForImageClassification: proved by logits, used by a pipeline."""

from __future__ import annotations

import json
import shutil
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
from model.hf.reference import Evaluation
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.folders.import_hf import import_checkpoint
from pretrain.trained.open import open_trained
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
        seq_length=config.image.tokens if config.image else 0,
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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("scheme", "changes"),
    [("b2t", {}), ("deepscalelm_post_ln", {"logit_bias": True}), ("pre_ln", {"image": {"pool": "mean"}})],
)
def test_other_models_travel_with_their_code(
    scheme: str, changes: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    """Logits are those of the training's own model, and an import brings all of it back."""
    changes = {**changes, "image": {"channels": channels, **changes.get("image", {})}}
    config = config_of(scheme, **changes)
    folder, chunk = exported(tmp_path / "hf", config)
    inputs = proof_inputs(config, 13)
    model = load_exported(folder, "fathom", config)
    assert type(model).__name__ == "FathomForImageClassification"
    theirs = model(**inputs.arguments()).logits
    ours = chunk({"images": inputs.tokens.double()})[:, 0, :11]
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-4 * float(ours.std()))
    assert 'model=".", trust_remote_code=True)' in (folder / "README.md").read_text()
    back = open_trained(import_checkpoint(str(folder), tmp_path / "run"))
    assert back.config.image == config.image
    for name, weight in weights_of(chunk).items():
        rows = 11 if name.startswith("output_layer.") else len(weight)  # the rest is padding
        torch.testing.assert_close(back.weights[name][:rows], weight[:rows], rtol=1e-6, atol=1e-7)


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
        ("pre_ln", {"position": "sinusoidal"}, "images with model.position=sinusoidal have no evaluation"),
    ],
)
def test_other_models_are_refused_in_one_line(
    scheme: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        exported(tmp_path / "hf", config_of(scheme, **changes))
    assert not (tmp_path / "hf").exists()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that transformers made."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
        num_labels=11,
        hidden_act="gelu_new",
        initializer_range=0.3,
    )
    model = ViTForImageClassification(config)
    for parameter in model.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return folder


def test_a_classifier_of_transformers_is_imported(theirs: Path, tmp_path: Path) -> None:
    """Its logits are ours, and an export brings all of it back."""
    from transformers import AutoConfig, AutoModelForImageClassification

    step = import_checkpoint(str(theirs), tmp_path / "run")
    trained = open_trained(step)
    evaluate = Evaluation(trained.weights, trained.config, logit_scale=trained.logit_scale)
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = AutoModelForImageClassification.from_pretrained(theirs)(images).logits
    torch.testing.assert_close(evaluate(images).float(), expected, rtol=1e-5, atol=1e-5)
    export_checkpoint(step, tmp_path / "back")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "back")
    for name, tensor in AutoModelForImageClassification.from_pretrained(theirs).state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)
    assert again.config.id2label == AutoConfig.from_pretrained(theirs).id2label
    processor = json.loads((tmp_path / "back/preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config", {"qkv_bias": False}, "its queries, keys and values have no biases"),
        ("config", {"patch_size": [4, 2]}, "its patches are no squares"),
        ("config", {"architectures": ["ViTModel"]}, "it is a ViTModel, not a ViTForImageClassification"),
        ("config", {"id2label": {"0": "a", "2": "b"}}, "does not number its 2 classes|has shape"),
        ("preprocessor_config", {"do_normalize": False}, "pixels have to be divided by 255"),
        ("preprocessor_config", {"image_mean": [0.5]}, "are not of num_channels=3"),
    ],
)
def test_what_is_no_classifier_of_ours_is_refused(
    file: str, changes: dict[str, Any], reason: str, theirs: Path, tmp_path: Path
) -> None:
    shutil.copytree(theirs, tmp_path / "in")
    path = tmp_path / f"in/{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=reason):
        import_checkpoint(str(tmp_path / "in"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
