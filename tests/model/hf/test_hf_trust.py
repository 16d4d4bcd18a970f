"""Code of a folder is run where it is ours to the last byte, and refused otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.errors import UserError
from model.hf.export import export
from model.hf.trust import own_code
from tests.model.hf.tiny import make_config, make_encoder, make_weights


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name, config in (
        ("b2t", make_config("b2t")),
        ("pre_ln", make_config("pre_ln")),
        ("encoder", make_encoder("b2t")),
    ):
        export(make_weights(config), config, folder / name, logit_scale=1.0, tokenizer=None, seq_length=24)
    return folder


def test_ours_is_trusted_and_a_stock_model_needs_no_trust(exports: Path) -> None:
    assert own_code(exports / "b2t") is True
    assert own_code(exports / "pre_ln") is False


def test_an_encoder_brings_a_file_more(exports: Path, tmp_path: Path) -> None:
    assert own_code(exports / "encoder") is True
    folder = Path(shutil.copytree(exports / "encoder", tmp_path / "encoder"))
    write("modeling_fathom_encoder.py")(folder)
    with pytest.raises(UserError, match="modeling_fathom_encoder.py is not the file of this version"):
        own_code(folder)
    shutil.copy(exports / "encoder/modeling_fathom_encoder.py", exports / "b2t")
    try:
        with pytest.raises(UserError, match="modeling_fathom_encoder.py is no file of ours"):
            own_code(exports / "b2t")
    finally:
        (exports / "b2t/modeling_fathom_encoder.py").unlink()


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | fields))

    return change


def write(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        with (folder / name).open("a") as file:
            file.write("\nopen('executed', 'w')\n")

    return change


@pytest.mark.parametrize("scheme", ["b2t", "pre_ln"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit("config.json", auto_map={"AutoConfig": "evil.Evil"}), "config.json names evil.Evil"),
        (
            edit("config.json", auto_map={"AutoModelForCausalLM": "a/b--modeling.Evil"}),
            "names a/b--modeling.Evil",
        ),
        (edit("config.json", auto_map=[1]), "config.json is damaged"),
        (
            edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
            "names code for the tokenizer",
        ),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    ],
)
def test_code_that_is_named_by_a_folder(
    exports: Path, tmp_path: Path, scheme: str, change: Callable[[Path], None], reason: str
) -> None:
    change(folder := Path(shutil.copytree(exports / scheme, tmp_path / scheme)))
    with pytest.raises(UserError, match=reason):
        own_code(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (write("configuration_fathom.py"), "configuration_fathom.py is not the file of this version"),
        (write("modeling_fathom.py"), "modeling_fathom.py is not the file of this version"),
        (lambda folder: (folder / "modeling_fathom.py").unlink(), "modeling_fathom.py is not the file"),
        (write("custom_generate/generate.py"), "custom_generate/generate.py is no file of ours"),
        (write("other.py"), "other.py is no file of ours"),
    ],
)
def test_code_that_lies_in_a_folder(
    exports: Path, tmp_path: Path, change: Callable[[Path], None], reason: str
) -> None:
    change(folder := Path(shutil.copytree(exports / "b2t", tmp_path / "b2t")))
    with pytest.raises(UserError, match=reason):
        own_code(folder)
