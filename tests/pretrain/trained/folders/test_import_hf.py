"""Damaged and hostile Hugging Face folders.

One line each, nothing left behind, nothing waited for.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.errors import UserError
from model.hf.export import export
from model.hf.importer import import_model
from parallel.checkpoint.reader import open_checkpoint
from pretrain.data.tokens.train import train_tokenizer
from pretrain.trained.folders.import_hf import import_checkpoint
from tests.model.hf.tiny import make_config, make_weights

TARGETS: dict[str, dict[str, Any]] = {
    "gpt2": {"scheme": "pre_ln", "init": {"base": "normal"}},
    "llama": {
        "scheme": "pre_ln",
        "init": {"base": "normal"},
        "normalization": "rmsnorm",
        "position": "rotary",
        "activation": "swiglu",
        "num_query_groups": 2,
        "tie_embeddings": False,
    },
    "opt": {"scheme": "post_ln", "init": {"base": "normal"}},
    "fathom": {"scheme": "b2t", "init": {"base": "normal"}},
}
VALUES: tuple[Any, ...] = (
    *(None, "1", "\x1b[2J\n" * 1000, True, -1, 0, 0.5, 10**5, 10**9, 10**30, 10**400),
    *(float("nan"), float("inf"), [], {"a": None}),
)
WEIGHT = {
    "gpt2": "transformer.h.1.mlp.c_fc.weight",
    "llama": "model.layers.1.mlp.up_proj.weight",
    "opt": "model.decoder.layers.1.fc1.weight",
    "fathom": "model.layers.1.mlp.branch.up_proj.weight",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each kind, with a tokenizer.model beside it."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("deep layers keep the signal\n" * 200)
    train_tokenizer([str(folder / "text.txt")], folder / "tokenizer.model", vocab_size=280)
    for target, fields in TARGETS.items():
        config = make_config(**fields, num_layers=2, hidden_size=8, ffn_hidden_size=12, vocab_size=280)
        export(
            make_weights(config),
            config,
            folder / target,
            logit_scale=1.0,
            tokenizer=folder / "tokenizer.model",
            seq_length=24,
            architecture=target,
        )
    return {target: folder / target for target in TARGETS}


@pytest.fixture
def damaged(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copy(target: str) -> Path:
        return Path(shutil.copytree(sources[target], tmp_path / target))

    return copy


def refusal(source: Path, out: Path) -> str:
    """The one line with which an import is refused; what is left of it afterwards is nothing."""
    with pytest.raises(UserError) as refused:
        import_checkpoint(str(source), out)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return check_line(str(refused.value))


def check_line(line: str) -> str:
    assert line.isprintable()
    assert len(line) < 1000
    return line


@pytest.mark.parametrize("target", TARGETS)
def test_any_value_under_any_key_is_read_or_refused(damaged: Callable[[str], Path], target: str) -> None:
    folder = damaged(target)
    content = json.loads((folder / "config.json").read_text())
    extra = {
        *("partial_rotary_factor", "rope_scaling", "sliding_window", "word_embed_proj_dim"),
        *("add_cross_attention", "scale_attn_weights", "num_labels", "quantization_config"),
    }
    places: list[tuple[Any, ...]] = [(key,) for key in sorted({*content, *extra})]
    for section in ("pretraining", "rope_parameters"):
        places += [(section, key) for key in content.get(section, {})]
    places += [("depth_plan", 0, key) for key in content.get("depth_plan", [{}])[0]]
    refused = 0
    for place, value in itertools.product(places, VALUES):
        changed = json.loads(json.dumps(content))
        inner = changed
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = value
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            import_model(folder)
        except UserError as error:
            check_line(str(error))
            refused += 1
    assert refused > len(places) * len(VALUES) / 3


def header(content: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if size is None else size) + content


TEXTS = {
    "cut": b"{",
    "a list": b"[]",
    "null": b"null",
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "deep": b'{"x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "too deep": b"[" * 100_000,
    "a half of a pair": b'{"model_type": "\\ud800", "eos_token_id": "\\ud800", "weight_map": "\\ud800"}',
}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_damaged_json(damaged: Callable[[str], Path], tmp_path: Path, name: str, content: bytes) -> None:
    folder = damaged("gpt2")
    (folder / name).write_bytes(content)
    assert name in refusal(folder, tmp_path / "out")


WEIGHTS = {
    "empty": b"",
    "cut header": b"abc",
    "a header of 2^60 bytes": header(b"{}", 1 << 60),
    "a list": header(b"[]"),
    "no tensors": header(b"{}"),
    "too large": header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,9],"data_offsets":[0,0]}}'),
    "negative": header(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,0]}}'),
}


@pytest.mark.parametrize("content", WEIGHTS.values(), ids=WEIGHTS)
def test_damaged_weight_files(damaged: Callable[[str], Path], tmp_path: Path, content: bytes) -> None:
    folder = damaged("llama")
    (folder / "model.safetensors").write_bytes(content)
    assert "model" in refusal(folder, tmp_path / "out")


def test_a_weight_file_that_was_cut_short(damaged: Callable[[str], Path], tmp_path: Path) -> None:
    folder = damaged("llama")
    whole = (folder / "model.safetensors").read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100, 9):
        (folder / "model.safetensors").write_bytes(whole[:length])
        assert "model.safetensors is damaged" in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.fill_(float("nan")), "not finite"),
        (lambda t: t.index_fill(0, torch.tensor(1), float("inf")), "not finite"),
        (lambda t: t.half().index_fill(0, torch.tensor(1), float("-inf")), "not finite"),
        (lambda t: t.double() * 1e300, "float64, with values that float32 does not hold"),
        (lambda t: t.double() + 1e-12, "float64, with values that float32 does not hold"),
        (lambda t: t.to(torch.complex64), "elements of type C64"),
        (lambda t: t.bool(), "elements of type BOOL"),
        (lambda t: t.int(), "elements of type I32"),
        (lambda t: t.to(torch.float8_e4m3fn), "elements of type F8_E4M3"),
        (lambda t: t[:-1], "has shape"),
        (lambda t: t[None], "has shape"),
        (lambda t: t.reshape(-1)[:0], "has shape"),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_tensors_that_are_no_fp32_weights(
    damaged: Callable[[str], Path],
    tmp_path: Path,
    target: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
) -> None:
    folder, name = damaged(target), WEIGHT[target]
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, folder / "model.safetensors")
    line = refusal(folder, tmp_path / "out")
    assert name in line
    assert reason in line


def test_wider_and_narrower_floats_are_read_to_the_bit(
    damaged: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = damaged("gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors[WEIGHT["gpt2"]] = tensors[WEIGHT["gpt2"]].double()
    tensors["transformer.ln_f.weight"] = tensors["transformer.ln_f.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    found = open_checkpoint(import_checkpoint(str(folder), tmp_path / "out")).weights()
    assert torch.equal(found["decoder.layers.1.mlp.linear_fc1.weight"], tensors[WEIGHT["gpt2"]].T.float())
    assert torch.equal(found["decoder.final_layernorm.weight"], tensors["transformer.ln_f.weight"].float())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {}}, "layers, but the model files have 0 tensors"),
        ({"weight_map": {WEIGHT["gpt2"]: 5}}, "weight_map"),
        ({"weight_map": {WEIGHT["gpt2"]: "../secret/model.safetensors"}}, "leads out of the folder"),
        ({"weight_map": {WEIGHT["gpt2"]: "/etc/passwd"}}, "leads out of the folder"),
        ({"weight_map": {WEIGHT["gpt2"]: "link.safetensors"}}, "leads out of the folder"),
        ({"weight_map": {WEIGHT["gpt2"]: "circle.safetensors"}}, "no regular file"),
        ({"weight_map": {WEIGHT["gpt2"]: ""}}, "leads out of the folder"),
        ({"weight_map": {WEIGHT["gpt2"]: "."}}, "no regular file"),
        ({"weight_map": {WEIGHT["gpt2"]: "gone.safetensors"}}, "is missing"),
        ({"weight_map": {WEIGHT["gpt2"]: "n" * 5000}}, "is missing"),
        ({"weight_map": {WEIGHT["gpt2"]: "config.json"}}, "is damaged"),
        ({"weight_map": {WEIGHT["gpt2"] + "x": "model.safetensors"}}, "has no tensor"),
    ],
)
def test_an_index_names_files_of_its_folder(
    damaged: Callable[[str], Path],
    sources: dict[str, Path],
    tmp_path: Path,
    content: dict[str, Any],
    reason: str,
) -> None:
    folder = damaged("gpt2")
    shutil.copytree(sources["gpt2"], tmp_path / "secret")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret/model.safetensors")
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    assert reason in refusal(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device", "circle"])
def test_only_files_of_the_folder_are_read(
    damaged: Callable[[str], Path], sources: dict[str, Path], tmp_path: Path, name: str, kind: str
) -> None:
    path = damaged("llama") / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        places = {"link": sources["llama"] / name, "device": Path("/dev/zero"), "circle": Path(name)}
        path.symlink_to(places[kind])
    line = refusal(path.parent, tmp_path / "out")
    assert name in line
    assert ("leads out" if kind in ("link", "device") else "no regular file") in line


def test_links_of_the_hubs_cache_are_read(sources: dict[str, Path], tmp_path: Path) -> None:
    """There a model's files are links to blobs beside the snapshots."""
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    shutil.copytree(sources["gpt2"], model / "blobs")
    for path in (model / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    step = import_checkpoint(str(snapshot), tmp_path / "out")
    assert (step / "tokenizer.model").read_bytes() == (sources["gpt2"] / "tokenizer.model").read_bytes()
    (model / "blobs" / "tokenizer.model").unlink()
    (model / "blobs" / "tokenizer.model").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("secret")
    assert "leads out" in refusal(snapshot, tmp_path / "again")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\x7f"])
def test_a_damaged_tokenizer(damaged: Callable[[str], Path], tmp_path: Path, content: bytes) -> None:
    folder = damaged("gpt2")
    (folder / "tokenizer.model").write_bytes(content)
    assert "tokenizer.model is not a SentencePiece model" in refusal(folder, tmp_path / "out")


def test_what_is_at_the_target_stays(sources: dict[str, Path], tmp_path: Path) -> None:
    """A folder with something else in it is not written into, an import is not replaced."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something else than an imported model"):
        import_checkpoint(str(sources["gpt2"]), tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    import_checkpoint(str(sources["gpt2"]), tmp_path / "out")
    with pytest.raises(UserError, match="an imported model is there already"):
        import_checkpoint(str(sources["llama"]), tmp_path / "out")


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_modes_are_those_that_the_umask_leaves(sources: dict[str, Path], tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        import_checkpoint(str(sources["gpt2"]), tmp_path / "out")
    finally:
        os.umask(before)
    paths = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(paths) == 7
    for path in paths:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask
