"""torch's ONNX exporter takes exports, by the lines of docs/huggingface.md.

onnxruntime gives their logits, for other lengths and batches than it was traced with.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.documents.test_site import DOCS
from tests.model.hf.clients import DECODERS, SIZE, exported, make_tokenizer, spread

LACKS = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"not installed (the extra clients): {', '.join(LACKS)}"),
]


def recipe() -> str:
    """The Python of the section on ONNX."""
    section = (DOCS / "huggingface.md").read_text(encoding="utf-8").partition("### ONNX\n")[2]
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("target", ["gpt2", "llama", "opt", "qwen3"])
def test_onnxruntime_gives_the_logits(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime
    from transformers import AutoModelForCausalLM

    made = exported(tmp_path / "hf", target, make_tokenizer(tmp_path), **DECODERS[target])
    monkeypatch.chdir(tmp_path)
    exec(recipe().replace("runs/NAME/hf", str(made.folder)), {})
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    model = AutoModelForCausalLM.from_pretrained(made.folder).eval()
    tokens = torch.randint(0, SIZE, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    given = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()}
    (found,) = session.run(["logits"], given)
    with torch.no_grad():
        wanted = model(tokens, attention_mask=mask).logits
    seen = mask.bool()
    assert spread(wanted[seen], torch.from_numpy(np.array(found))[seen]) < 1e-5
