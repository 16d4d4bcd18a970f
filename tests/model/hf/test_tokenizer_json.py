from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from model.errors import UserError
from model.hf.tokenizer.carry import prove
from model.hf.tokenizer.proof import fuzz
from model.hf.tokenizer.settings import Use
from model.hf.tokenizer.special import SENTINEL
from model.hf.tokenizer.table import find_tokenizer, tokenizer_files
from model.hf.tokenizer.tokenizer_json import PROBES
from pretrain.data.tokens.tokenizer import Tokenizer
from pretrain.data.tokens.train import special_names, train_tokenizer

NAMES = ("<s>", "<|endoftext|>", "[MASK]", "</s>", "<extra_id_0>")
TEXT = "def f(x):\n    return x + 1984  # the signal, é 中 <s> [MASK] <|endoftext|>\n" * 60
OTHERS = [f"word{number} deep layers norm {number}\n" for number in range(80)]
LIBRARY = Path(textwrap.__file__).read_text()


def unigram() -> Fast:
    """As T5's: special tokens are pieces with a score."""
    fast = Fast(models.Unigram())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "[MASK]"]
    fast.train_from_iterator(
        [TEXT, *OTHERS],
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    return fast


def word_pieces() -> Fast:
    """As BERT's, with a truncation that data must not have."""
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer, fast.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    fast.train_from_iterator([TEXT, *OTHERS], trainer)
    fast.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast.enable_truncation(16)
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    (root / "in.txt").write_text(TEXT + LIBRARY)
    inputs, special = [str(root / "in.txt")], special_names("mask,pad,cls=<s>,sentinels=2")
    train_tokenizer(inputs, root / "bytes", 400, "bpe-bytes", special=special)
    train_tokenizer(inputs, root / "piece/tokenizer.model", 400, "bpe", special=special)
    for name, make in {"unigram": unigram, "words": word_pieces}.items():
        (root / name).mkdir()
        make().save(str(root / name / "tokenizer.json"))
    (root / "words/tokenizer_config.json").write_text(
        '{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}'
    )
    return {path.name: path for path in root.iterdir() if path.is_dir()}


def test_what_a_trained_one_knows(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["bytes"])
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.dtype) == (400, 0, np.uint16)
    assert tokenizer.special == {"cls": 1, "pad": 2, "mask": 3}
    assert tokenizer.sentinels == (4, 5)
    assert np.flatnonzero(tokenizer.is_control()).tolist() == [0, 1, 2, 3, 4, 5]
    assert [tokenizer.piece(index) for index in (0, 1, 3, 4)] == [*NAMES[1::-1], "[MASK]", SENTINEL.format(0)]
    assert len(tokenizer.encode("1984")) == 4, "numbers are spelt digit by digit"
    ids = tokenizer.encode(TEXT)
    assert b"".join(map(tokenizer.token_bytes().__getitem__, ids)).decode() == TEXT
    for text in (*PROBES, "\0\x85\u2028 \ue000\U0010ffff", ""):
        assert tokenizer.decode([0, *tokenizer.encode(text), 3]) == text
    assert tokenizer.lossless
    with pytest.raises(IndexError, match="400"):
        tokenizer.decode([400])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")


@pytest.mark.parametrize("kind", ["bytes", "piece", "unigram", "words"])
def test_names_of_special_tokens_are_text_unless_asked_for(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer(folders[kind])
    control = set(np.flatnonzero(tokenizer.is_control()).tolist())
    for name in NAMES:
        for text in (name, f"a {name}b {name}"):
            assert not control & set(tokenizer.encode(text)), text
    known = {tokenizer.piece(index): index for index in control}
    assert known.keys() & NAMES
    for name, index in known.items():
        a, b = tokenizer.encode("a"), tokenizer.encode("b")
        asked = tokenizer.encode(f"a{name}b", marked=True)
        assert asked[: len(a) + 1] == [*a, index], name
        assert kind == "unigram" or asked == [*a, index, *b]


def test_other_texts_of_a_unigram_are_those_of_the_library(folders: dict[str, Path]) -> None:
    fast, tokenizer = (
        Fast.from_file(str(folders["unigram"] / "tokenizer.json")),
        Tokenizer(folders["unigram"]),
    )
    for text in (*OTHERS, "unknown: \u1234 x"):
        assert tokenizer.encode(text) == fast.encode(text, add_special_tokens=False).ids


def test_cutting_texts_moves_no_id(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["bytes"])
    assert tokenizer.codec._cuts, "the quick way is not taken, so this test compares nothing"  # type: ignore[attr-defined]
    fast = Fast.from_file(str(folders["bytes"] / "tokenizer.json"))
    fast.encode_special_tokens = True
    texts = [*fuzz([tokenizer.piece(index) for index in range(tokenizer.vocab_size)]), LIBRARY, TEXT]
    texts += [f"a{one}{two}1{two} b{one} " for one in " \n\t\r\x85\xa0é\u3000.1" for two in " \n\x1c\u2028's"]
    for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
        wanted = fast.encode(text, add_special_tokens=False).ids
        assert np.frombuffer(ids, dtype=tokenizer.dtype).tolist() == wanted, text


def test_roles_and_changes_of_foreign_ones(folders: dict[str, Path]) -> None:
    words, pieces = Tokenizer(folders["words"]), Tokenizer(folders["unigram"])
    assert (words.special, words.eod_id) == ({"cls": 2, "sep": 3, "pad": 0, "mask": 4}, 3)
    assert words.changes == ("normalises text (BertNormalizer)",)
    assert len(words.encode("deep layers " * 20)) > 16, "no text is cut"
    assert (pieces.special, pieces.eod_id) == ({"cls": 0, "sep": 2, "pad": 1, "mask": 4}, 2)
    assert pieces.changes[-1] == "does not give every text back"
    assert not words.is_control()[1], "an unknown word is text"
    ids = words.encode("deep layers")
    assert b"".join(map(words.token_bytes().__getitem__, ids)) == b" deep layers"


@pytest.mark.parametrize(
    ("kind", "use", "wanted"),
    [
        ("bytes", Use(), "{}"),
        ("bytes", Use(encoder=True), "1 {} 0"),
        ("bytes", Use(pairs=True), "{} 0"),
        ("unigram", Use(), "{}"),
        ("words", Use(encoder=True, token_types=True), "2 {} 3"),
    ],
)
def test_an_export_has_the_ids_of_the_data(
    folders: dict[str, Path], tmp_path: Path, kind: str, use: Use, wanted: str
) -> None:
    tokenizer = Tokenizer(folders[kind])
    found = tokenizer.kind.write(tokenizer.path, tmp_path, 64, use)
    assert found.size == tokenizer.vocab_size
    assert tokenizer.kind.prove(tokenizer.path, tmp_path, OTHERS, False) == 0
    fast = AutoTokenizer.from_pretrained(tmp_path)
    inner = " ".join(map(str, tokenizer.encode("deep layers")))
    assert fast("deep layers").input_ids == [int(index) for index in wanted.format(inner).split()]
    assert fast.eos_token_id == tokenizer.eod_id or use.encoder
    assert fast.model_max_length == 64
    assert fast.model_input_names == use.input_names


def test_the_proof_names_the_first_text_that_differs(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer(folders["bytes"])
    tokenizer.kind.write(tokenizer.path, tmp_path, 64, Use())
    other = json.loads((tmp_path / "tokenizer.json").read_text())
    other["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="gives other ids for "):
        prove(tokenizer.path, tmp_path, (), False)


def put(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return edit


def without_marks(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    edited(lambda content: content.update(added_tokens=[]))(folder)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (put("tokenizer.json", '{"version": "1.0", '), "tokenizer.json is damaged"),
    "list": (put("tokenizer.json", "[]"), "damaged .no JSON object"),
    "no model": (put("tokenizer.json", "{}"), "is no tokenizer.json .Model missing"),
    "empty": (put("tokenizer.json", ""), "is damaged"),
    "deep": (put("tokenizer.json", "[" * 100_000), "is damaged"),
    "vocabulary": (
        edited(lambda content: content.update(model={"type": "BPE", "vocab": {"a": -1}, "merges": []})),
        "is no tokenizer.json",
    ),
    "chance": (edited(lambda content: content["model"].update(dropout=0.1)), "by chance .dropout"),
    "settings": (put("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
    "unknown end": (put("tokenizer_config.json", '{"eos_token": "<end>"}'), "eos=<end>, which is no token"),
    "no end": (without_marks, "nothing says which token ends a document"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_tokenizer_is_one_line(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    for name, content in tokenizer_files(folders["bytes"] / "tokenizer.json").items():
        (tmp_path / name).write_bytes(content)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as refused:
        Tokenizer(tmp_path)
    assert "\n" not in str(refused.value)


def test_which_tokenizer_of_a_folder_or_a_name(folders: dict[str, Path], tmp_path: Path) -> None:
    """A SentencePiece model goes first where an export could have it."""
    model = (folders["piece"] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer.json").write_bytes((folders["bytes"] / "tokenizer.json").read_bytes())
    assert find_tokenizer(tmp_path).name == "tokenizer.model"
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = True
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert find_tokenizer(tmp_path).name == "tokenizer.json"
    with pytest.raises(UserError, match=r"the folder has none of tokenizer.model"):
        find_tokenizer(folders["piece"].parent)
    for name in ("hf://nobody/nothing", "nobody/nothing"):
        with pytest.raises(UserError, match=r"'nobody/nothing' is neither a folder nor a model that the Hub"):
            find_tokenizer(name)
    (tmp_path / "odd.bin").write_bytes(b"neither")
    with pytest.raises(UserError, match=r"odd.bin: neither a SentencePiece model nor a tokenizer.json"):
        Tokenizer(tmp_path / "odd.bin")


def test_training_is_deterministic_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(TEXT + LIBRARY)
    inputs = [str(tmp_path / "in.txt")]
    found = [train_tokenizer(inputs, tmp_path / name, 350, "bpe-bytes") for name in "ab"]
    assert found[0].sha256 == found[1].sha256
    assert found[0].path == str(tmp_path / "a" / "tokenizer.json")
    for out, size, message in (
        ("c", 257, "257 pieces are taken by bytes and marks"),
        ("c", 10_000, r"too large: \d+ bytes of text give \d+ pieces"),
        ("c.model", 350, "two files, tokenizer.json and tokenizer_config.json"),
    ):
        with pytest.raises(UserError, match=message):
            train_tokenizer(inputs, tmp_path / out, size, "bpe-bytes")
        assert not (tmp_path / out).exists()
