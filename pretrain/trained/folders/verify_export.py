"""An exported model against the run it came from, as a user of transformers meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.errors import UserError
from parallel.checkpoint.folders import MANIFEST
from pretrain.rundir.metrics import read_metrics
from pretrain.tasks.table import task_of
from pretrain.tasks.task import SampleKind
from pretrain.trained.folders import (
    verify_crossed,
    verify_images,
    verify_masked,
    verify_next_token,
    verify_speech,
)
from pretrain.trained.open import open_trained

if TYPE_CHECKING:
    from pretrain.trained.open import Trained

LOSS_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Check:
    """How the models of one kind of samples are compared with their exports."""

    auto_class: str
    """Of transformers, which loads the export."""
    compare: Callable[[Trained, Any, int], tuple[float, float]]
    """From a run, its export and a number of validation samples to the export's loss on them, in
    nats, and the largest difference of some logits in standard deviations of the run's.
    """
    prompt: str
    """What a sample is made of, unless told otherwise."""
    sample: Callable[[Trained, Any, Any, str, float], list[str]]
    """From a run, its export, its tokenizer, a prompt and the loss to lines that show what it
    does."""
    reads: str = "AutoTokenizer"
    """Of transformers, which loads what makes the model's input."""


def _of_text(sample: Callable[[Any, Any, str, float], list[str]]) -> Callable[..., list[str]]:
    """A sample that needs no data of the run."""
    return lambda trained, *asked: sample(*asked)


CHECKS: dict[SampleKind, Check] = {
    "next_token": Check(
        "AutoModelForCausalLM", verify_next_token.compare, "def main(", _of_text(verify_next_token.sample)
    ),
    "masked": Check(
        "AutoModelForMaskedLM",
        verify_masked.compare,
        "def f(self):\n    return [MASK].name",
        _of_text(verify_masked.sample),
    ),
    "images": Check(
        "AutoModelForImageClassification",
        verify_images.compare,
        "",
        verify_images.sample,
        reads="AutoImageProcessor",
    ),
    "pairs": Check(
        "AutoModelForSeq2SeqLM",
        partial(verify_crossed.compare, verify_crossed.pair_rows),
        "Select the file to open.",
        _of_text(verify_crossed.sample),
    ),
    "clips": Check(
        "AutoModelForSpeechSeq2Seq",
        verify_speech.compare,
        "",
        verify_speech.sample,
    ),
    "spans": Check(
        "AutoModelForSeq2SeqLM",
        partial(verify_crossed.compare, verify_crossed.span_rows),
        "def f(self):\n    return <extra_id_0>.name",
        _of_text(verify_crossed.sample),
    ),
}


@dataclass(frozen=True)
class Verification:
    """Loss on the validation samples in nats, logits, and what the export does with a prompt."""

    trained_loss: float
    """Printed by the trainer."""
    exported_loss: float
    """Computed by transformers on the same samples."""
    logit_difference: float
    """The largest, as a share of the logits' standard deviation."""
    samples: int
    model_class: str
    shown: list[str]
    """Lines for people."""

    @property
    def agrees(self) -> bool:
        """Whether the two losses are the same up to 0.2 %."""
        return abs(self.exported_loss - self.trained_loss) <= LOSS_TOLERANCE * self.trained_loss


def check_of(trained: Trained) -> Check:
    """The check of a run's task.

    Raises UserError where there is none, and where the checkpoint names an impossible task.
    """
    try:
        task = task_of(trained.reader.sections.train.task, trained.config.family)
    except ValueError as error:
        raise UserError(
            f"{trained.reader.folder / MANIFEST} is damaged ({error}): use another checkpoint"
        ) from None
    if task.samples not in CHECKS:
        raise UserError(
            f"{trained.reader.folder} was trained with train.task={task.name}, "
            "whose exports have no check yet"
        )
    return CHECKS[task.samples]


def verify_export(run_dir: Path, exported: Path, prompt: str | None = None) -> Verification:
    """Loads the export with transformers and compares.

    Raises UserError for a folder that is no export or brings code that is not ours, which is not
    run, and where the run has no evaluation of its newest checkpoint.
    """
    import transformers
    from transformers.utils.logging import disable_progress_bar

    from model.hf.trust import own_code

    trust = own_code(exported)
    disable_progress_bar()
    trained = open_trained(run_dir)
    trained.check_warm()
    check = check_of(trained)
    evaluations = [
        event for event in read_metrics(run_dir / "metrics.jsonl").eval if event.step == trained.reader.step
    ]
    if not evaluations or not evaluations[-1].samples:
        raise UserError(
            f"{run_dir}/metrics.jsonl has no evaluation at step {trained.reader.step}, "
            "the step of the newest checkpoint"
        )
    samples = int(evaluations[-1].samples)
    loading = getattr(transformers, check.auto_class)
    model = loading.from_pretrained(
        exported, trust_remote_code=trust, dtype=torch.float32, use_safetensors=True
    ).eval()
    tokenizer = getattr(transformers, check.reads).from_pretrained(exported, trust_remote_code=trust)
    with torch.no_grad():
        loss, difference = check.compare(trained, model, samples)
        shown = check.sample(trained, model, tokenizer, check.prompt if prompt is None else prompt, loss)
    return Verification(
        trained_loss=evaluations[-1].loss,
        exported_loss=loss,
        logit_difference=difference,
        samples=samples,
        model_class=type(model).__name__,
        shown=shown,
    )
