"""Image files to a data set folder: splits, broken files, statistics, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.errors import UserError
from pretrain.data.dataset_admin import inspect_dataset, verify_data
from pretrain.data.images.encode import LABEL, ImageEncoder, ImageJob
from pretrain.data.images.prepare import ImageOptions, prepare_images
from pretrain.data.images.reading import Picture
from pretrain.data.images.statistics import patch_correlations
from pretrain.data.manifest import Manifest
from pretrain.data.reading.raw_record import Record
from tests.pretrain.pictures import write_pictures


def options(inputs: Path, out: Path, /, **changes: object) -> ImageOptions:
    given: dict[str, object] = {
        "inputs": [str(inputs)],
        "out": out,
        "tokenizer": Path(),
        "workers": 1,
        "size": (6, 8),
        "split": (0.8, 0.2, 0.0),
    }
    return ImageOptions(**{**given, **changes})  # type: ignore[arg-type]


def stored(folder: Path, manifest: Manifest, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and pixels [n, c, h, w]."""
    facts = manifest.images
    assert facts is not None
    rows = np.fromfile(folder / f"{split}.bin", dtype=np.uint8)
    rows = rows.reshape(-1, LABEL.size + facts.channels * facts.height * facts.width)
    labels = np.ascontiguousarray(rows[:, : LABEL.size]).view("<u4")[:, 0]
    return labels, rows[:, LABEL.size :].reshape(-1, facts.channels, facts.height, facts.width)


def test_folders_become_a_verified_data_set(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", {"cat": 20, "dog": 10})
    (tmp_path / "in/cat/text.png").write_text("no image")
    whole = (tmp_path / "in/dog/0.png").read_bytes()
    (tmp_path / "in/dog/half.png").write_bytes(whole[: len(whole) // 2])
    manifest = prepare_images(options(tmp_path / "in", tmp_path / "data"))
    assert verify_data(tmp_path / "data").files == 8
    assert manifest.images is not None
    assert manifest.images.classes == ("cat", "dog")
    assert manifest.broken.count == 2
    reasons = {Path(one.file).name: one.reason for one in manifest.broken.examples}
    assert reasons["text.png"] == "no image of a known kind"
    assert "half.png" in reasons
    labels, pixels = stored(tmp_path / "data", manifest, "train")
    others, _ = stored(tmp_path / "data", manifest, "validation")
    assert np.bincount(np.concatenate([labels, others])).tolist() == [20, 10]
    scaled = pixels / 255
    assert manifest.images.mean == pytest.approx(scaled.mean((0, 2, 3)), abs=1e-9)
    assert manifest.images.std == pytest.approx(scaled.std((0, 2, 3)), abs=1e-9)
    assert inspect_dataset(tmp_path / "data", documents=1)[1] == [
        f"an image of class {labels[0]}, {manifest.images.classes[labels[0]]}"
    ]


def test_the_same_images_give_the_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", {"cat": 6, "dog": 6})
    made = [
        prepare_images(options(tmp_path / "in", tmp_path / name, workers=workers)).text()
        for name, workers in (("one", 1), ("two", 2))
    ]
    assert made[0] == made[1]


def test_splits_that_the_input_names_are_kept(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in/train", {"cat": 30, "dog": 30})
    write_pictures(tmp_path / "in/test", {"cat": 3, "dog": 4})
    manifest = prepare_images(options(tmp_path / "in", tmp_path / "data"))
    sizes = {name: facts.documents for name, facts in manifest.splits.items()}
    assert sizes["test"] == 7
    assert sizes["train"] + sizes["validation"] == 60
    assert sizes["validation"] > 2


def test_a_folder_of_the_datasets_library_gives_the_same_images(tmp_path: Path) -> None:
    import datasets

    write_pictures(tmp_path / "in/train", {"cat": 4, "dog": 4})
    write_pictures(tmp_path / "in/val", {"cat": 2, "dog": 2})
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    parts = {}
    for split, name in (("train", "train"), ("val", "validation")):
        files = sorted((tmp_path / "in" / split).rglob("*.png"))
        rows = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
        parts[name] = datasets.Dataset.from_dict(rows, features=kinds)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    found = []
    for source in ("in", "saved"):
        manifest = prepare_images(options(tmp_path / source, tmp_path / f"data_{source}"))
        labels, pixels = stored(tmp_path / f"data_{source}", manifest, "validation")
        found.append(
            sorted((int(label), image.tobytes()) for label, image in zip(labels, pixels, strict=True))
        )
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_a_class_that_the_table_does_not_name_is_a_broken_record(tmp_path: Path) -> None:
    """Parquet files hold whatever number was written, whatever classes their features name."""
    import datasets
    import pyarrow as pa
    from pyarrow.parquet import read_table, write_table

    write_pictures(tmp_path / "in", {"cat": 4, "dog": 4})
    files = sorted(map(str, (tmp_path / "in").rglob("*.png")))
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    made = datasets.Dataset.from_dict({"image": files, "label": [0, 1] * 4}, features=kinds)
    made.to_parquet(tmp_path / "table.parquet")
    table = read_table(tmp_path / "table.parquet")
    labels = pa.array([0, 1, 7, None, 0, 1, -1, 2])
    write_table(
        table.set_column(1, "label", labels).replace_schema_metadata(table.schema.metadata),
        tmp_path / "table.parquet",
    )
    manifest = prepare_images(options(tmp_path / "table.parquet", tmp_path / "data", split=(1, 0, 0)))
    assert manifest.splits["train"].documents == 4
    assert [(one.line, one.reason) for one in manifest.broken.examples] == [
        (3, "class 7, but the classes are 0 to 1"),
        (4, "no class"),
        (7, "no class"),
        (8, "class 2, but the classes are 0 to 1"),
    ]


def test_an_image_covers_the_size_and_keeps_its_middle() -> None:
    wide = np.zeros((6, 16, 3), dtype=np.uint8)
    wide[:, 4:12] = (255, 0, 10)
    file = io.BytesIO()
    Image.fromarray(wide).save(file, format="PNG")
    job = ImageJob((3, 6, 8), (1.0, 0.0, 0.0), frozenset(), seed=0)
    batch = [Record("a", "a", 0, Picture(file.getvalue(), 258, None))]
    (train, *_), expected = ImageEncoder(job).encode(batch, 1).splits, np.empty((3, 6, 8), dtype=np.uint8)
    expected[:] = np.array([255, 0, 10], dtype=np.uint8)[:, None, None]
    assert train.tokens == LABEL.pack(258) + expected.tobytes()


def test_deep_pixels_are_named_not_clipped() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8), 40000, dtype=np.uint16)).save(file, format="PNG")
    job = ImageJob((1, 6, 8), (1.0, 0.0, 0.0), frozenset(), seed=0)
    result = ImageEncoder(job).encode([Record("a", "a", 0, Picture(file.getvalue(), 0, None))], 1)
    assert "more than 8 bits" in result.broken[0].reason


def test_correlations_of_patches_are_those_of_their_pairs() -> None:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(40, 2, 4, 6)) + 0.8 * generator.normal(size=(40, 1, 1, 1))
    patches = images.reshape(40, 2, 2, 2, 3, 2).transpose(0, 2, 4, 1, 3, 5).reshape(40, 6, 8)
    products = np.einsum("nik,njk->ij", patches, patches)
    expected = products[~np.eye(6, dtype=bool)].mean() / np.diag(products).mean()
    found = patch_correlations(images)
    assert found[2] == pytest.approx(expected)
    assert set(found) == {1, 2, 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 2}, "--channels 2: give one of 1, 3, 4"),
        ({"inputs": ["nowhere/"]}, "INPUT nowhere/: "),
        ({"strict": True}, "bad.png: no image of a known kind; without --strict"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", {"cat": 2, "dog": 2})
    (tmp_path / "in/dog/bad.png").write_text("no image")
    with pytest.raises(UserError, match=message):
        prepare_images(options(tmp_path / "in", tmp_path / "data", **changes))
    assert not (tmp_path / "data").exists()


def test_images_without_classes_are_refused(tmp_path: Path) -> None:
    write_pictures(tmp_path, {"cat": 1})
    with pytest.raises(UserError, match="one sub-folder for each class"):
        prepare_images(options(tmp_path / "cat", tmp_path / "data"))
    with pytest.raises(UserError, match="has the one class"):
        prepare_images(options(tmp_path, tmp_path / "data"))
