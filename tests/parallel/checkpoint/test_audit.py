"""Manifests and indexes that somebody forged: the checksums are right, what they say is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import UserError
from parallel.checkpoint.folders import MANIFEST
from pretrain.rundir.checkpoint_admin import checkpoint_facts, list_checkpoints, verify_checkpoint
from pretrain.trained.folders.export import provenance
from pretrain.trained.generate import generate_text
from pretrain.trained.measures.perplexity import evaluate
from pretrain.trained.open import open_trained
from tests.parallel.checkpoint.handmade import FC1, NAMES, reseal, write

ODD: tuple[Any, ...] = (None, True, -1, 3.5, 10**30, "x", "../../etc/passwd", [], {}, [1, "x"], {"x": []})
"""Put in the place of anything that is in a file."""
INDEX, DATA = "rank_00000.json", "rank_00000.safetensors"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in parsed JSON. Of a long list, the first two."""
    if path:
        yield path
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    for key, one in inner:
        yield from places(one, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def refused(step: Path) -> str:
    """Uses a checkpoint in every way that needs no training.

    Returns the one line that refused it, or nothing.
    Anything else than a UserError goes through.
    """
    list_checkpoints(step.parent)
    said = []
    for action in (
        lambda: verify_checkpoint(step),
        lambda: checkpoint_facts(step, names=True),
        lambda: dict(open_trained(step).weights),
        lambda: generate_text(step, "", 1),
        lambda: provenance(open_trained(step)),
        lambda: evaluate(step),
    ):
        try:
            action()
        except UserError as error:
            said.append(str(error))
    assert all("\n" not in line and len(line) < 1000 for line in said)
    return said[0] if said else ""


def test_nothing_in_a_manifest_can_be_anything(tmp_path: Path) -> None:
    step = write(tmp_path)
    content = json.loads((step / MANIFEST).read_text())
    whole = [path for path in places(content) if path != ("xxh3_64",)]
    assert len(whole) > 50
    for path in whole:
        for odd in ODD:
            forged = replaced(content, path, odd)
            reseal(step, lambda manifest, forged=forged: manifest.update(forged))  # type: ignore[misc]
            refused(step)
            (step / MANIFEST).write_text(json.dumps(content))
    assert verify_checkpoint(step)["tensors"] == 3 * len(NAMES)


def test_nothing_in_an_index_can_be_anything(tmp_path: Path) -> None:
    step = write(tmp_path)
    content, manifest = json.loads((step / INDEX).read_text()), (step / MANIFEST).read_text()
    for path in places(content):
        for odd in (*ODD, 0, 1, 7, 2**59):
            (step / INDEX).write_text(json.dumps(replaced(content, path, odd)))
            reseal(step, lambda manifest: None, INDEX)
            refused(step)
            (step / MANIFEST).write_text(manifest)


def _without(key: str) -> Callable[[Path], object]:
    return lambda step: reseal(step, lambda manifest: manifest.pop(key))


def _model(**fields: Any) -> Callable[[Path], object]:
    return lambda step: reseal(step, lambda manifest: manifest["config"]["model"].update(fields))


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def forge(step: Path) -> None:
        tensors = load_file(step / DATA)
        change(tensors)
        save_file(tensors, step / DATA)
        reseal(step, lambda manifest: None, DATA)

    return forge


def _foreign(name: str) -> Callable[[Path], object]:
    return lambda step: reseal(
        step, lambda manifest: manifest["files"].update({name: {"bytes": 1, "xxh3_64": "0"}})
    )


def _linked(step: Path) -> None:
    elsewhere = step.parent.parent / "elsewhere"
    (step / DATA).rename(elsewhere)
    (step / DATA).symlink_to(elsewhere)


FORGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no files": (lambda step: reseal(step, lambda manifest: manifest["files"].clear()), r"damaged \(files: "),
    "no tensors": (
        lambda step: reseal(
            step, lambda manifest: [manifest["files"].pop(f"rank_0000{i}.json") for i in (0, 1)]
        ),
        "holds no parameters",
    ),
    "an index without its file": (
        lambda step: reseal(step, lambda manifest: manifest["files"].pop(DATA)),
        f"names {INDEX} but not {DATA}",
    ),
    "no progress": (_without("progress"), r"damaged \(progress: Field required\)"),
    "no optimizer_step": (
        lambda step: reseal(step, lambda manifest: manifest["progress"].clear()),
        r"progress is damaged \(optimizer_step: Field required\)",
    ),
    "a path upwards": (_foreign("../../../etc/passwd"), "leads out of the folder; it is not followed"),
    "an absolute path": (_foreign("/etc/passwd"), "leads out of the folder; it is not followed"),
    "a linked file": (_linked, "leads out of the folder; it is not followed"),
    "too few layers": (_model(num_layers=0), "says model.num_layers=0, its files hold 1 layers"),
    "too many layers": (
        _model(num_layers=10**9),
        "says model.num_layers=1000000000, its files hold 1 layers",
    ),
    "another width": (
        _model(hidden_size=8),
        r"embedding.word_embeddings.weight has shape \[2, 4\], its configuration gives \[2, 8\]",
    ),
    "an unknown scheme": (_model(scheme="b3t"), "b3t"),
    "a norm too few": (
        _model(scheme="post_ln"),
        "its configuration describes decoder.layers.0.mlp_output_norm.weight, its files lack it",
    ),
    "biases too few": (
        _model(normalization="layernorm"),
        "its configuration describes decoder.layers.0.input_layernorm.bias, its files lack it",
    ),
    "no weights": (_tensors(lambda tensors: tensors.pop("group1.master")), "has no tensor group1.master"),
    "half of the moments": (
        _tensors(lambda tensors: tensors.pop("group1.exp_avg_sq")),
        "has no tensor group1.exp_avg_sq",
    ),
    "short weights": (
        _tensors(lambda tensors: tensors.update({"group1.master": torch.zeros(3)})),
        "group1.master has 3 elements, fewer than its index says",
    ),
    "weights of another type": (
        _tensors(lambda tensors: tensors.update({"group1.master": torch.zeros(200, dtype=torch.int8)})),
        "is no flat fp32 tensor",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_what_a_forged_checkpoint_is_told(tmp_path: Path, case: str) -> None:
    forge, message = FORGED[case]
    step = write(tmp_path)
    assert refused(step).endswith("put the tokenizer of its data there")  # the only thing that this one lacks
    forge(step)
    with pytest.raises(UserError, match=message):
        verify_checkpoint(step)
    assert refused(step)


def _saved_by(kind: str, step: Path) -> None:
    """Makes it one of an optimizer of another name, with the moments that Muon keeps of fc1."""
    reseal(step, lambda manifest: manifest["config"]["optimizer"].update(kind=kind))
    for name in (DATA, "rank_00001.safetensors"):
        tensors = load_file(step / name)
        del tensors["group0.exp_avg_sq"]
        save_file(tensors, step / name)
    reseal(step, lambda manifest: None, DATA, "rank_00001.safetensors")


def test_each_parameter_has_the_moments_that_its_optimizer_keeps(tmp_path: Path) -> None:
    step = write(tmp_path)
    _saved_by("muon", step)
    assert verify_checkpoint(step)["tensors"] == 3 * len(NAMES) - 1
    # Group 1 has norms and tables, of which Muon too keeps the second moment.
    FORGED["half of the moments"][0](step)
    with pytest.raises(UserError, match="has no tensor group1.exp_avg_sq"):
        verify_checkpoint(step)


def test_moments_of_an_unknown_optimizer_are_refused(tmp_path: Path) -> None:
    step = write(tmp_path)
    _saved_by("sophia", step)
    with pytest.raises(UserError, match="optimizer.kind=sophia, which this version does not know"):
        verify_checkpoint(step)


def test_a_checkpoint_before_the_first_step_is_whole(tmp_path: Path) -> None:
    step = write(tmp_path)
    for name in (DATA, "rank_00001.safetensors"):
        save_file(
            {key: value for key, value in load_file(step / name).items() if "exp" not in key}, step / name
        )
    reseal(step, lambda manifest: None, DATA, "rank_00001.safetensors")
    assert verify_checkpoint(step)["tensors"] == len(NAMES)
    assert FC1 in NAMES
