"""An exported model against the run it came from, as a user of transformers meets it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.errors import UserError
from pretrain.rundir.metrics import read_metrics

if TYPE_CHECKING:
    from pretrain.trained.open import Trained

LOSS_TOLERANCE = 2e-3
BATCH = 8


TEMPERATURE, TOP_P = 1.0, 0.95
"""Of the sample. Below 1, models that have seen little text repeat themselves."""


@dataclass(frozen=True)
class Verification:
    """Loss on the validation tokens in nats per token, logits, and a sample."""

    trained_loss: float
    """Printed by the trainer."""
    exported_loss: float
    """Computed by transformers on the same tokens."""
    logit_difference: float
    """The largest, as a share of the logits' standard deviation."""
    samples: int
    model_class: str
    prompt: str
    sample: str
    """Text generated from the prompt."""

    @property
    def agrees(self) -> bool:
        """Whether the two losses are the same up to 0.2 %."""
        return abs(self.exported_loss - self.trained_loss) <= LOSS_TOLERANCE * self.trained_loss


def validation_tokens(trained: Trained, samples: int) -> torch.Tensor:
    """The tokens [samples, seq_length + 1] that the trainer evaluated on."""
    from pretrain.data.blend import open_blend

    data, seed = trained.reader.sections.data, trained.reader.sections.train.seed
    if data.seq_length is None or seed is None:
        raise UserError(
            f"{trained.reader.folder} names no data.seq_length or no train.seed: use another checkpoint"
        )
    cache = Path(data.cache) if data.cache else None
    blend = open_blend(trained.corpora(), "validation", data.seq_length, seed, cache, alone=True)
    return blend.batch(range(samples))


def verify_export(run_dir: Path, exported: Path, prompt: str, new_tokens: int = 48) -> Verification:
    """Loads the export with transformers and compares.

    Raises UserError for a folder that is no export or brings code that is not ours, which is not
    run, and where the run has no evaluation of its newest checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from model.hf.reference import Evaluation
    from model.hf.trust import own_code
    from pretrain.trained.open import open_trained

    trust = own_code(exported)
    disable_progress_bar()
    trained = open_trained(run_dir, "the comparison with an export")
    trained.check_warm()
    evaluations = [
        event for event in read_metrics(run_dir / "metrics.jsonl").eval if event.step == trained.reader.step
    ]
    if not evaluations or not evaluations[-1].samples:
        raise UserError(
            f"{run_dir}/metrics.jsonl has no evaluation at step {trained.reader.step}, "
            "the step of the newest checkpoint"
        )
    tokens = validation_tokens(trained, int(evaluations[-1].samples))
    model = AutoModelForCausalLM.from_pretrained(
        exported, trust_remote_code=trust, dtype=torch.float32, use_safetensors=True
    ).eval()
    with torch.no_grad():
        losses = [_loss(model(batch[:, :-1]).logits, batch) for batch in tokens.split(BATCH)]
        theirs = model(tokens[:BATCH, :-1]).logits
    ours = Evaluation(
        dict(trained.weights), ModelConfig(**trained.config.model_dump()), logit_scale=trained.logit_scale
    )(tokens[:BATCH, :-1])
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=trust)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    generated = model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=True, temperature=TEMPERATURE, top_p=TOP_P
    )
    return Verification(
        trained_loss=evaluations[-1].loss,
        exported_loss=float(torch.cat(losses).mean()),
        logit_difference=float((ours - theirs).abs().max() / ours.std()),
        samples=len(tokens),
        model_class=type(model).__name__,
        prompt=prompt,
        sample=tokenizer.decode(generated[0][inputs["input_ids"].shape[1] :]),
    )


def _loss(logits_bsv: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Loss per token, flat."""
    return F.cross_entropy(logits_bsv.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
