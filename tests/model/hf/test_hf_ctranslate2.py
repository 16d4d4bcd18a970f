"""CTranslate2 computes what an export does: logits, greedy texts, beams, an encoder's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from tests.model.hf.clients import (
    DECODERS,
    DEEP,
    LAYERS,
    NEW,
    PROMPTS,
    Exported,
    exported,
    make_tokenizer,
    quick_collections,
    spread,
)

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (the extra clients)")

HEADS = {"encoder_attention_heads": 4}
"""It takes the encoder's number of heads for the decoder's too."""
FIXED = {"position": "sinusoidal", "logit_bias": True}
CROSSED: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("post_ln", {"embedding_norm": True}),
    "bart, positions of fixed size": ("deepnorm", {"embedding_norm": True, **FIXED}),
    "mbart": ("pre_ln", {"embedding_norm": True}),
}
"""Case -> scheme and settings; its target is the first word."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def converted(folder: Path) -> str:
    """As `ct2-transformers-converter --model FOLDER` does."""
    out = folder.with_name("ct2")
    with quick_collections():
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(out))
    return str(out)


def check_decoder(made: Exported) -> None:
    generator = ctranslate2.Generator(converted(made.folder), intra_threads=1)
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    codec = AutoTokenizer.from_pretrained(made.folder)
    for prompt in PROMPTS:
        ids = codec(prompt)["input_ids"]
        ours = made.continued(prompt)
        whole = torch.tensor([ids + ours])
        theirs = model.generate(whole[:, : len(ids)], do_sample=False, max_new_tokens=NEW)
        assert theirs.tolist() == whole.tolist()
        (found,) = generator.generate_batch(
            [codec.convert_ids_to_tokens(ids)],
            beam_size=1,
            max_length=NEW,
            include_prompt_in_result=False,
        )
        assert found.sequences_ids[0] == ours
        scored = np.array(generator.forward_batch([codec.convert_ids_to_tokens(ids + ours)]))
        with torch.no_grad():
            wanted = model(whole).logits
        # What a fold does to the epsilon of LayerNorm is not in its file: it has 1e-5 always.
        assert spread(wanted, torch.from_numpy(scored)[..., : wanted.shape[-1]]) < 1e-4


@pytest.mark.parametrize("target", DECODERS)
def test_a_decoder_goes_on_with_the_same_tokens(target: str, tokenizer: Path, tmp_path: Path) -> None:
    check_decoder(exported(tmp_path / "hf", target, tokenizer, **DECODERS[target]))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", DEEP)
def test_a_deep_decoder_goes_on_with_the_same_tokens(scheme: str, tokenizer: Path, tmp_path: Path) -> None:
    target, given = DEEP[scheme]
    made = exported(tmp_path / "hf", target, tokenizer, scheme=scheme, num_layers=LAYERS, **given)
    check_decoder(made)


@pytest.mark.parametrize("case", CROSSED)
def test_an_encoder_decoder_finds_the_same_beams(case: str, tokenizer: Path, tmp_path: Path) -> None:
    scheme, given = CROSSED[case]
    made = exported(
        tmp_path / "hf", case.partition(",")[0], tokenizer, "seq2seq", scheme=scheme, **HEADS, **given
    )
    translator = ctranslate2.Translator(converted(made.folder), intra_threads=1)
    model = AutoModelForSeq2SeqLM.from_pretrained(made.folder).eval()
    codec = AutoTokenizer.from_pretrained(made.folder)
    for prompt in PROMPTS:
        source = codec(prompt)["input_ids"]
        for beams in (1, 4):
            wanted = model.generate(
                torch.tensor([source]), do_sample=False, num_beams=beams, max_new_tokens=NEW, max_length=None
            )
            found = translator.translate_batch(
                [codec.convert_ids_to_tokens(source)], beam_size=beams, max_decoding_length=NEW
            )
            ids = codec.convert_tokens_to_ids(found[0].hypotheses[0])
            assert ids == [token for token in wanted[0, 1:].tolist() if token != codec.eos_token_id]


def test_an_encoder_has_the_same_states(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path, "all")
    made = exported(tmp_path / "hf", "bert", tokenizer, "bert", scheme="post_ln", embedding_norm=True)
    encoder = ctranslate2.Encoder(converted(made.folder), intra_threads=1)
    model = AutoModel.from_pretrained(made.folder).eval()
    codec = AutoTokenizer.from_pretrained(made.folder)
    for prompt in PROMPTS:
        ids = codec(prompt)["input_ids"]
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).last_hidden_state
        found = torch.from_numpy(np.array(encoder.forward_batch([ids]).last_hidden_state))
        assert spread(wanted, found) < 1e-5
