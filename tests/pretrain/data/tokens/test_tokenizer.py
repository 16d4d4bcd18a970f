from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import model.hf.tokenizer.chunks as chunks_module
import model.hf.tokenizer.sentencepiece_model as tokenizer_module
from model.errors import UserError
from model.hf.tokenizer.convert import write_tokenizer
from model.hf.tokenizer.proof import prove
from pretrain.data.prepare import tokenizer_notes
from pretrain.data.reading.inputs import standard_library_files
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import ModelType, Reserved, special_names, train_tokenizer

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LIBRARY = [
    str(path)
    for path in standard_library_files()
    if path.parent.name in ("json", "asyncio", "email", "logging")
]
CODE = [
    *"abcXYZ_ (){}[]:;.,=+-*/'\"\\#\n\t\r012789",
    "self",
    "def ",
    "    ",
    "\n    ",
    "é",
    "中",
    "\u2581",
    "😀",
    "\ufeff",
    "\0",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.model"
    train_tokenizer(LIBRARY, path, vocab_size=600, model=request.param, max_bytes=40_000)
    return Tokenizer(path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.model"
    train_tokenizer(LIBRARY, path, vocab_size=1500, max_bytes=400_000)
    return Tokenizer(path)


@given(
    text=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.sampled_from(CODE)).map("".join)
    )
)
@example("  leading and trailing  ")
@example("\u2581\u2581 \u2581")
@example("</s><s><unk><0x0A>")
@example("\u2047 \u2585 a\u0301 \ufb01 \u00a0 \u3000 \r\n\v\f\x85\u2028")
@FUZZ
def test_decoding_gives_the_text_back(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


@given(
    text=st.lists(st.sampled_from(CODE), max_size=80).map("".join).filter(lambda text: "\u2581" not in text)
)
@FUZZ
def test_encoding_by_chunks_gives_the_ids_of_the_library(bpe: Tokenizer, text: str) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(bpe.path))
    assert isinstance(bpe.codec, tokenizer_module.SentencePieceModel)
    assert bpe.codec.properties.pattern is not None, (
        "the quick way is not taken, so this test compares nothing"
    )
    assert bpe.encode(text) == library.encode(text)


def test_real_documents_in_one_call(bpe: Tokenizer) -> None:
    texts = [Path(name).read_text() for name in LIBRARY]
    library = sentencepiece.SentencePieceProcessor(model_file=str(bpe.path))
    for text, ids in zip(texts, bpe.encode_documents(texts), strict=True):
        assert np.frombuffer(ids, dtype=bpe.dtype).tolist() == library.encode(text)
        assert bpe.decode(library.encode(text)) == text


def test_long_documents_and_a_full_table_change_nothing(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["def f(x):\n    return  x + 1\n" * 20, "", "x" * 100, " " * 100, "a \u2581 b " * 20]
    expected = Tokenizer(bpe.path).encode_documents(texts)
    monkeypatch.setattr(tokenizer_module, "SEGMENT_CHARS", 16)
    monkeypatch.setattr(chunks_module, "CACHE_BYTES", 0)
    assert Tokenizer(bpe.path).encode_documents(texts) == expected


def test_ids_and_vocabulary(trained: Tokenizer) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    assert (library.unk_id(), library.bos_id(), library.eos_id(), library.pad_id()) == (0, 1, 2, -1)
    assert (trained.eod_id, trained.vocab_size, trained.dtype) == (2, 600, np.uint16)
    assert len(trained.encode("1984")) == 4, "numbers are spelt digit by digit"
    assert len(trained.encode("\n")) == len(trained.encode("\t")) == 1
    assert len(trained.encode("        return")) <= 3, "indentation has pieces of its own"


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_special_tokens_come_from_no_text(tmp_path: Path, model: Any) -> None:
    """Not even where the text to train on is full of their names."""
    (tmp_path / "in.txt").write_text("a [MASK] b [CLS] c [SEP] [PAD] <mask> def f(x):\n" * 200)
    trained = train_tokenizer(
        [str(tmp_path / "in.txt")],
        tmp_path / "t.model",
        vocab_size=280,
        model=model,
        special=special_names("all"),
    )
    assert trained.special == {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.special == {"cls": 1, "sep": 2, "pad": 3, "mask": 4}
    assert tokenizer.eod_id == 2
    assert np.flatnonzero(tokenizer.is_control()).tolist() == [1, 2, 3, 4]
    for text in ("[MASK]", "a [MASK] b[CLS][SEP]", "[PAD]\n", "<mask>"):
        assert min(tokenizer.encode(text)) > 4
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, *tokenizer.encode("a"), 4, 3, 2]) == "a"


def test_special_tokens_are_what_was_asked_for(tmp_path: Path) -> None:
    names = special_names("mask=<mask>,pad=<pad>")
    assert names == Reserved({"mask": "<mask>", "pad": "<pad>"})
    train_tokenizer(LIBRARY[:4], tmp_path / "t.model", vocab_size=400, max_bytes=30_000, special=names)
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    assert [library.id_to_piece(index) for index in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    assert Tokenizer(tmp_path / "t.model").special == {"cls": 1, "sep": 2, "pad": 3, "mask": 4}
    train_tokenizer(LIBRARY[:4], tmp_path / "without.model", vocab_size=400, max_bytes=30_000)
    assert Tokenizer(tmp_path / "without.model").special == {"cls": 1, "sep": 2}


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_sentinels_come_from_no_text_and_move_nothing_else(tmp_path: Path, model: Any) -> None:
    (tmp_path / "in.txt").write_text("a <extra_id_0> b <extra_id_12> def f(x):\n" * 200)
    text = [str(tmp_path / "in.txt")]
    for name, special in (("t", "mask,pad,sentinels=12"), ("without", "mask,pad")):
        reserved = special_names(special)
        size = 282 + reserved.sentinels
        train_tokenizer(text, tmp_path / f"{name}.model", vocab_size=size, model=model, special=reserved)
    tokenizer, without = (Tokenizer(tmp_path / f"{name}.model") for name in ("t", "without"))
    assert tokenizer.sentinels == tuple(range(5, 17))
    assert [tokenizer.piece(number) for number in (5, 16)] == ["<extra_id_0>", "<extra_id_11>"]
    assert np.flatnonzero(tokenizer.is_control()).tolist() == list(range(1, 17))
    assert tokenizer.special == without.special
    assert without.sentinels == ()
    assert special_names("sentinels").sentinels == 100
    for words in ("<extra_id_0>", "a<extra_id_11> b"):
        ids = tokenizer.encode(words)
        assert min(ids) > 16
        assert tokenizer.decode(ids) == words


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", r"no special token ''; there are cls \(begins a document\), sep .* to be predicted\), all of"),
        ("mask,bos", "no special token 'bos'"),
        ("mask=[GAP]", r"'\[GAP\]' does not tell what it is for: call the mask token \[MASK\], <mask>"),
        ("pad=<mask>", "'<mask>' is what only the mask token can be called"),
        ("pad=PAD", "'PAD' is no name of a special token: give at most 64"),
        ("cls=[C LS]", "is no name of a special token"),
        ("cls=[C:LS]", "is no name of a special token"),
        ("cls=", "'' is no name of a special token"),
        ("cls=<x>,sep=<x>", "'<x>' is the name of another token"),
        ("pad=<unk>", "'<unk>' is the name of another token"),
        ("pad=<0x0A>", "'<0x0A>' is the name of another token"),
        ("pad=<extra_id_7>", "'<extra_id_7>' is the name of another token"),
        ("pad,sentinels=0", "--special sentinels=0: give a number from 1 to 10000"),
        ("sentinels=", "--special sentinels=: give a number"),
    ],
)
def test_special_tokens_that_cannot_be_are_named(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        special_names(given)


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["ACGTTGCA" * 400, "日本語のテスト" * 100 + "\n", "ACGT" * 20_000 + " "])
def test_spaces_survive_a_sample_that_has_none(tmp_path: Path, model: Any, text: str) -> None:
    """Or as good as none; and so does the export."""
    (tmp_path / "in.txt").write_text(text)
    train_tokenizer(
        [str(tmp_path / "in.txt")], tmp_path / "t.model", vocab_size=266 + ("日" in text) * 3, model=model
    )
    tokenizer = Tokenizer(tmp_path / "t.model")
    for sample in ("A C\n G", "  ", "a \u2581 b"):
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.lossless
    write_tokenizer(tmp_path / "t.model", tmp_path, 64)
    prove(tmp_path / "t.model", tmp_path)
    assert tokenizer_notes(tokenizer) == []


NEUTRAL: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, ""),
        ({"normalization_rule_name": "nfkc"}, "normalises characters .nfkc."),
        ({"add_dummy_prefix": True}, "adds a space before each document"),
        ({"remove_extra_whitespaces": True}, "merges and strips spaces"),
        ({"byte_fallback": False}, "has no piece for every byte"),
        ({}, "has no piece for a space"),
    ],
)
def test_what_a_model_does_to_text_is_known(tmp_path: Path, settings: dict[str, Any], changes: str) -> None:
    written = io.BytesIO()
    text = "abcdefg" * 30 if changes.endswith("a space") else "def f(x): return x + 1"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 50),
        model_writer=written,
        vocab_size=280,
        hard_vocab_limit=False,
        minloglevel=2,
        **NEUTRAL | settings,
    )
    (tmp_path / "t.model").write_bytes(written.getvalue())
    tokenizer = Tokenizer(tmp_path / "t.model")
    notes = " ".join(tokenizer_notes(tokenizer))
    assert tokenizer.lossless == (not changes) == (not notes)
    assert re.search(changes, notes)
    assert ("cannot be exported" in notes) == bool(settings)


def test_pieces_with_spaces_are_said_at_once_to_have_no_export(tmp_path: Path) -> None:
    """SentencePiece takes them, and never finds them in a text; a fast tokenizer would."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["def f(x): return x + 1"] * 50),
        model_writer=written,
        vocab_size=290,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=["f x"],
        **NEUTRAL,
    )
    (tmp_path / "t.model").write_bytes(written.getvalue())
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.lossless
    assert re.search(
        "user-defined pieces with spaces.*--tokenizer FOLDER.*none", tokenizer_notes(tokenizer)[0]
    )


def test_training_is_deterministic(tmp_path: Path) -> None:
    for model in ("bpe", "unigram"):
        first = train_tokenizer(
            LIBRARY[:6], tmp_path / "a.model", vocab_size=400, model=model, max_bytes=30_000
        )
        second = train_tokenizer(
            LIBRARY[:6], tmp_path / "b.model", vocab_size=400, model=model, max_bytes=30_000
        )
        assert first.sha256 == second.sha256 == Tokenizer(tmp_path / "b.model").sha256
        assert first.bytes == 30_000


def test_a_sample_visits_all_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.tokens.train.LEAST_SHARE", 100)
    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name * 5} {number}"}) + "\n" for number in range(1000))
        )
    trained = train_tokenizer(
        [str(tmp_path / "*.jsonl")], tmp_path / "t.model", vocab_size=290, max_bytes=4000
    )
    assert (trained.bytes, trained.broken) == (4000, 0)
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert all(len(tokenizer.encode(name * 5)) < 5 for name in "abcd")


@pytest.mark.parametrize(
    ("vocab_size", "max_bytes", "message"),
    [
        (200, 1000, "--vocab-size 200"),
        (260, 1000, r"--vocab-size 260 is too small: .* take 3\d\d pieces; use at least that many"),
        (90_000, 1000, r"--vocab-size 90000 is too large: 1000 bytes of text give \d+ pieces at most"),
        (300, 0, "--max-bytes 0"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, vocab_size: int, max_bytes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer(LIBRARY[:2], tmp_path / "t.model", vocab_size=vocab_size, max_bytes=max_bytes)
    assert not list(tmp_path.iterdir())


def test_nothing_to_train_on_names_the_first_broken_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"a.jsonl:1: no key 'text'; the keys are 'body'"):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t.model")


@pytest.mark.parametrize(("kind", "file"), [("bpe", ""), ("bpe-bytes", "/tokenizer.json")])
def test_a_file_that_cannot_be_written_is_named_before_texts_are_read(
    tmp_path: Path, kind: ModelType, file: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=f"--out {tmp_path}/file/t{file}: cannot write to {tmp_path}/file: Not"
    ):
        train_tokenizer(["absent.txt"], tmp_path / "file" / "t", model=kind)


def test_unusable_model_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.model: No such file"):
        Tokenizer(tmp_path / "absent.model")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="no regular file"):
        Tokenizer(tmp_path / "pipe")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "empty.model")
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(UserError, match=r"text.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")


def test_a_model_made_elsewhere_is_left_to_the_library(tmp_path: Path) -> None:
    """With normalisation and a dummy prefix, a chunk on its own would encode differently."""
    written = io.BytesIO()
    lines = [line for name in LIBRARY[:10] for line in Path(name).read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, vocab_size=500, model_type="bpe", minloglevel=2
    )
    (tmp_path / "t.model").write_bytes(written.getvalue())
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert tokenizer.encode("def  f(x): \u2581 return") == sentencepiece.SentencePieceProcessor(
        model_proto=written.getvalue()
    ).encode("def  f(x): \u2581 return")


@pytest.mark.parametrize(
    ("extra", "ways"),
    [
        ({"split_by_unicode_script": False}, 1),
        ({"split_by_number": False, "split_digits": False}, 1),
        ({"user_defined_symbols": ["f( x"]}, 0),
    ],
)
def test_pieces_that_cross_boundaries_make_chunks_larger(
    tmp_path: Path, extra: dict[str, Any], ways: int
) -> None:
    """`ways`: how many of the chunk patterns remain usable; the ids stay those of the library."""
    written = io.BytesIO()
    lines = ["def f( x1 ): return x1 + 12.5", "self.x1 = x1; self.y2 = y2"] * 200 + [
        line for name in LIBRARY[:10] for line in Path(name).read_text().splitlines()
    ]
    neutral: Any = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        vocab_size=1000,
        model_type="bpe",
        minloglevel=2,
        **neutral,
        **extra,
    )
    (tmp_path / "t.model").write_bytes(written.getvalue())
    tokenizer, library = (
        Tokenizer(tmp_path / "t.model"),
        sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()),
    )
    assert isinstance(tokenizer.codec, tokenizer_module.SentencePieceModel)
    pattern = tokenizer.codec.properties.pattern
    assert (pattern is None) == (ways == 0)
    assert pattern != tokenizer_module._CHUNKS[0]
    text = "\n".join(lines)
    assert tokenizer.encode(text) == library.encode(text)


def test_lone_surrogates_are_refused(bpe: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        bpe.encode("a\ud800b")
