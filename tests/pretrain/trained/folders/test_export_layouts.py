"""A checkpoint of two tensor-parallel by two pipeline ranks, exported and evaluated.

One process without a process group of its own does both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.hf.proof import Inputs, logits
from pretrain.data.blend import open_blend
from pretrain.data.samples import next_tokens
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.train.steps import evaluation_step
from pretrain.trained.folders.export import export_checkpoint
from pretrain.trained.measures.perplexity import evaluate
from pretrain.trained.open import open_trained
from tests.distributed import Group, launch
from tests.parallel.training import SEQ_LENGTH, engine_of, given, run_config, train, whole_parameters
from tests.pretrain.small import VOCAB, small_data
from tests.reference import gpt

MODEL = given(
    scheme="b2t",
    vocab_size=VOCAB,
    num_query_groups=2,
    position="rotary",
    activation="swiglu",
    normalization="rmsnorm",
    tie_embeddings=False,
)
LAYOUT = given(tensor=2, pipeline=2, sequence_parallel=True)
SAMPLES = 8


def train_and_save(data: str, folder: str) -> Any:
    """Runs inside four ranks.

    Two steps, a checkpoint, the loss of the first validation samples, and all parameters.
    """
    from parallel.checkpoint.writer import save

    config = run_config(MODEL, LAYOUT)
    config.data.corpora[0].path = data
    engine = engine_of(config)
    train(config, engine, 0, 2)
    tokenizer = (Path(data) / "tokenizer.model").read_bytes()
    facts = given(optimizer_step=2, consumed_tokens=2 * 8 * SEQ_LENGTH, seed=1)
    save(
        engine,
        Path(folder),
        2,
        progress=facts,
        config=config.model_dump(mode="json"),
        versions={},
        extra={"tokenizer.model": tokenizer},
    )
    blend = open_blend(config.data.corpora, "validation", SEQ_LENGTH, 0, None)
    parts = blend.batch(range(SAMPLES)).split(config.train.micro_batch_size)
    batches = [next_tokens(part) for part in parts]
    total, targets = engine.evaluate(
        evaluation_step(CAUSAL_LM), lambda: iter(batches), len(batches), CAUSAL_LM.sums
    )
    loss = total / targets
    parameters, unequal = whole_parameters(engine)
    return (loss, parameters, unequal) if torch.distributed.get_rank() == 0 else None


def test_from_tp2_pp2(tmp_path: Path) -> None:
    data = small_data(tmp_path)
    ((first, *_),) = launch(Group(4, train_and_save, (str(data), str(tmp_path / "checkpoints"))))
    loss, parameters, unequal = first
    assert not unequal
    result = export_checkpoint(tmp_path / "checkpoints", tmp_path / "hf", max_shard_size="20KB")
    assert result.architecture == "fathom"
    assert sum(name.endswith(".safetensors") for name in result.files) > 3
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| training step | 2 |" in card
    assert "| training tokens | 256 |" in card
    # Against the reference on the parameters as the ranks held them.
    # Those never went through a checkpoint.
    shape = gpt.Shape("b2t", 4, 4, groups=2, activation="swiglu", normalization="rmsnorm", position="rotary")
    tokens = torch.randint(0, VOCAB, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        logits(tmp_path / "hf", "fathom", open_trained(tmp_path / "checkpoints").config, Inputs(tokens)),
        gpt.logits(parameters, shape, tokens)[..., :VOCAB],
        rtol=0,
        atol=1e-5,
    )
    scored = evaluate(tmp_path / "checkpoints", samples=SAMPLES)
    assert abs(scored.nats / scored.tokens / loss - 1) < 1e-6
