"""The pipeline of transformers that continues texts, on exports.

Those of other families: test_hf_encoder_tokenizer.py, test_hf_images.py and test_hf_speech.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import pipeline

from pretrain.data.tokens.tokenizer import Tokenizer
from tests.model.hf.clients import NEW, PROMPTS, exported, make_tokenizer


@pytest.mark.parametrize(("target", "scheme"), [("gpt2", "pre_ln"), ("fathom", "b2t")])
def test_text_generation_writes_what_fathom_generate_writes(target: str, scheme: str, tmp_path: Path) -> None:
    made = exported(tmp_path / "hf", target, make_tokenizer(tmp_path), scheme=scheme)
    write = pipeline("text-generation", model=str(made.folder), trust_remote_code=target == "fathom")
    codec = Tokenizer(made.tokenizer)
    texts = [text["generated_text"] for (text,) in write(list(PROMPTS), max_new_tokens=NEW, do_sample=False)]
    assert texts == [prompt + codec.decode(made.continued(prompt)) for prompt in PROMPTS]
