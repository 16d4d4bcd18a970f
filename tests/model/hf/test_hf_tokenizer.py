"""SentencePiece models as fast tokenizers.

The exporter proves that both are equal, and must be able to find that they are not.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from model.errors import UserError
from model.hf.export import export
from model.hf.tokenizer.convert import USER_DEFINED, load_proto, write_tokenizer
from model.hf.tokenizer.copy import copy_tokenizer
from model.hf.tokenizer.proof import fuzz, prove
from pretrain.data.tokens.tokenizer import Tokenizer as TrainingTokenizer
from pretrain.data.tokens.train import train_tokenizer
from tests.model.hf.tiny import make_config, make_weights

SIZE = 340


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BPE and a unigram model, trained as `fathom tokenizer train` does.

    "<" is not in the text, so that "<0x0A>" is a trap.
    """
    folder, rng = tmp_path_factory.mktemp("tokenizers"), random.Random(0)
    words = [
        "time",
        "deep",
        "layer",
        "norm",
        "residual",
        "größe",
        "naïve",
        "日本語",
        "мир",
        "x1",
        "def f(x):",
        "\n    return",
        "0",
        "17",
        "  ",
        "\t",
        "the",
        "of",
        "signal",
        "scale",
    ]
    lines = [
        " ".join(rng.choice(words) + rng.choice(["", "s", "ing", ".", ",", "\n"]) for _ in range(12))
        for _ in range(600)
    ]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    out = {}
    for kind in ("bpe", "unigram"):
        out[kind] = folder / f"{kind}.model"
        train_tokenizer([str(folder / "text.jsonl")], out[kind], vocab_size=SIZE, model=kind)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_and_text_equal_those_of_training(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ids = write_tokenizer(models[kind], tmp_path, 128)
    assert (ids.size, dict(ids.special)) == (
        SIZE,
        {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0},
    )
    ties = prove(models[kind], tmp_path, ["deep layers norm the signal"])
    assert ties <= (0 if kind == "bpe" else 5)
    trained, fast = TrainingTokenizer(models[kind]), AutoTokenizer.from_pretrained(tmp_path)
    differing = 0
    for text in fuzz([trained.codec.piece(i) for i in range(SIZE)], count=300, seed=7):
        expected = trained.encode(text)
        differing += fast.encode(text, verbose=False) != expected
        assert fast.decode(expected) == text == trained.decode(expected)
    assert differing <= (0 if kind == "bpe" else 5)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_names_of_special_tokens_in_text_are_text(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(models[kind], tmp_path, 128)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("</s>", "<s>", "<unk>", "<0x0A>", "a</s>b"):
        assert not {0, 1, 2, 3 + 10} & set(fast.encode(text))
    assert (fast.bos_token_id, fast.eos_token_id, fast.unk_token_id, fast.pad_token_id) == (2, 2, 0, 0)
    assert fast.decode([2]) == "</s>"
    assert fast.decode([2], skip_special_tokens=True) == ""
    assert fast.encode("") == []


def test_models_are_handed_ids_and_mask_only(models: dict[str, Path], tmp_path: Path) -> None:
    """transformers 4 adds token_type_ids unless told otherwise.

    Its GPT-2 makes other logits of them without a word.
    """
    for folder in ("made", "given", "copied"):
        (tmp_path / folder).mkdir()
    write_tokenizer(models["bpe"], tmp_path / "made", 128)
    settings = json.loads((tmp_path / "made/tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    for name in ("tokenizer.json", "tokenizer.model"):
        shutil.copy(tmp_path / "made" / name, tmp_path / "given")
    del settings["model_input_names"]
    (tmp_path / "given/tokenizer_config.json").write_text(json.dumps(settings))
    copy_tokenizer(tmp_path / "given", tmp_path / "copied", SIZE)
    copied = json.loads((tmp_path / "copied/tokenizer_config.json").read_text())
    assert copied == settings | {"model_input_names": ["input_ids", "attention_mask"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}'),
    ],
)
def test_a_damaged_tokenizer_is_not_copied(
    models: dict[str, Path], tmp_path: Path, name: str, content: str | None
) -> None:
    """One line, and nothing of the folder is executed or asked about."""
    (tmp_path / "given").mkdir()
    (tmp_path / "copied").mkdir()
    write_tokenizer(models["bpe"], tmp_path / "given", 128)
    (tmp_path / "given/evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    if content is None:
        (tmp_path / "given" / name).unlink()
        (tmp_path / "given" / name).symlink_to(tmp_path / "given/../other.json")
        shutil.copy(models["bpe"], tmp_path / "other.json")
    else:
        (tmp_path / "given" / name).write_text(content)
    with pytest.raises(UserError, match="given") as refused:
        copy_tokenizer(tmp_path / "given", tmp_path / "copied", SIZE)
    assert str(refused.value).isprintable()
    assert not (tmp_path / "executed").exists()


def test_a_user_defined_symbol_is_one_token(models: dict[str, Path], tmp_path: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(models["bpe"].read_bytes())
    proto.pieces.add(piece="<|x|>", score=0.0, type=USER_DEFINED)
    path = tmp_path / "user.model"
    path.write_bytes(proto.SerializeToString())
    write_tokenizer(path, tmp_path, 128)
    assert prove(path, tmp_path, ["a<|x|>b", "<|x|><|x|> ", "<|x"]) == 0
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("de<|x|>ep").ids.count(SIZE) == 1


def test_the_proof_names_the_first_text_that_differs(models: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(models["bpe"], tmp_path, 128)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][1:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"other ids than SentencePiece for '.*from position"):
        prove(models["bpe"], tmp_path)


def test_the_proof_finds_text_that_comes_back_different(models: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(models["bpe"], tmp_path, 128)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="decodes the ids of ' '"):
        prove(models["bpe"], tmp_path)


def test_a_unigram_difference_that_is_no_tie_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(models["unigram"], tmp_path, 128)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    worst = max(range(259, SIZE), key=lambda i: len(data["model"]["vocab"][i][0]))
    data["model"]["vocab"][worst][1] -= 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="other ids than SentencePiece"):
        prove(models["unigram"], tmp_path, [data["model"]["vocab"][worst][0]])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"add_dummy_prefix": True}, "adds a space"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"byte_fallback": False}, "no byte_fallback"),
        ({"model_type": "char"}, "neither unigram nor bpe"),
    ],
)
def test_models_that_have_no_equal_are_refused(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    neutral: dict[str, Any] = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["deep layers norm signal " * 5] * 20),
        model_prefix=str(tmp_path / "m"),
        vocab_size=290,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**neutral, "model_type": "bpe", **settings},
    )
    with pytest.raises(UserError, match=reason):
        load_proto(tmp_path / "m.model")


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    for name, reason in (("nothing.model", "does not exist"), ("x.model", "is not a SentencePiece model")):
        with pytest.raises(UserError, match=reason):
            load_proto(tmp_path / name)


def test_loading_needs_no_sentencepiece(models: dict[str, Path], tmp_path: Path) -> None:
    ids = write_tokenizer(models["bpe"], tmp_path, 128)
    assert ids.size == SIZE
    code = (
        "import sys; sys.modules['sentencepiece'] = sys.modules['google.protobuf'] = None; "
        "from transformers import AutoTokenizer as A;"
        f"print(A.from_pretrained({str(tmp_path)!r}).encode('deep  layers'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.stdout.strip() == str(TrainingTokenizer(models["bpe"]).encode("deep  layers")), done.stderr


@pytest.mark.parametrize("scheme", ["b2t", "pre_ln"])
def test_exports_carry_the_tokenizer(models: dict[str, Path], scheme: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = make_config(scheme, vocab_size=SIZE)
    result = export(
        make_weights(config),
        config,
        tmp_path / "out",
        logit_scale=1.0,
        tokenizer=models["bpe"],
        seq_length=24,
        sample_texts=["the norm of a layer"],
    )
    assert result.tokenizer is not None
    trained = TrainingTokenizer(models["bpe"])
    fast = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert fast.encode("  deep\n\tlayers ▁") == trained.encode("  deep\n\tlayers ▁")
    assert fast.model_max_length == 24
    assert (tmp_path / "out/tokenizer.model").read_bytes() == models["bpe"].read_bytes()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 2, 0)
    other = make_config(scheme, vocab_size=SIZE + 1)
    with pytest.raises(UserError, match="has 340 pieces, but model.vocab_size=341"):
        export(
            make_weights(other),
            other,
            tmp_path / "other",
            logit_scale=1.0,
            tokenizer=models["bpe"],
            seq_length=24,
        )
    assert not (tmp_path / "other").exists()


def test_a_class_that_is_read_with_a_tokenizer_of_its_own_is_passed_over(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Whatever a folder says, transformers 5 splits the text of a Qwen2 as Qwen2Tokenizer."""
    config = make_config(
        normalization="rmsnorm",
        position="rotary",
        activation="swiglu",
        bias=False,
        attention={"qkv_bias": True},
        vocab_size=SIZE,
    )
    given: dict[str, Any] = {"logit_scale": 1.0, "tokenizer": models["bpe"], "seq_length": 24}
    weights = make_weights(config)
    with pytest.raises(UserError, match=r"transformers reads as Qwen2Tokenizer here, .*; export with"):
        export(weights, config, tmp_path / "out", architecture="qwen2", **given)
    assert not (tmp_path / "out").exists()
    result = export(weights, config, tmp_path / "out", **given)
    assert result.architecture == "fathom"
    assert "Qwen2Tokenizer" in result.skipped[0]
    assert export(weights, config, tmp_path / "bare", **{**given, "tokenizer": None}).architecture == "qwen2"
