"""How well the encoder of a checkpoint tells hidden tokens, on the samples of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import UserError
from pretrain.tasks.task import perplexity

if TYPE_CHECKING:
    from collections.abc import Callable

    from pretrain.data.samples import MaskedTokens
    from pretrain.trained.open import Trained

BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Told:
    """Losses of hidden tokens, summed."""

    checkpoint: str
    step: int
    data: str
    samples: int
    window: int
    """Tokens of a sample."""
    rate: float
    """Share of them that was hidden, or shown changed or as it is, as in training."""
    precision: str
    nats: float
    tokens: int
    """Hidden ones."""
    right: int
    """Of which the likeliest token was the one."""

    def to_json(self) -> dict[str, object]:
        """All of it as plain data."""
        facts: dict[str, object] = {name: value for name, value in vars(self).items() if name != "nats"}
        loss = self.nats / self.tokens
        return facts | {
            "total_nats": self.nats,
            "loss": loss,
            "pseudo_perplexity": perplexity(loss),
            "accuracy": self.right / self.tokens,
        }


def evaluate_masked(
    trained: Trained,
    *,
    data: Path | str | None = None,
    split: str = "validation",
    samples: int | None = None,
    batch_size: int | None = None,
    precision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Told:
    """Loss and accuracy on hidden tokens of a split of a prepared data set.

    data: None means the run's own. samples: from the first on; None: all.
    batch_size: samples at once; None: the run's micro_batch_size. precision: None: the run's.
    Masks are drawn as the trainer's evaluation draws them, the same in all runs: its first
    `train.eval_samples` samples of the validation split are these, and their loss is the same.
    Raises UserError where data and model do not fit.
    """
    from pretrain.trained.measures.windows import rows_asked
    from pretrain.trained.scorer import Scorer

    run = trained.reader.sections
    source, name = masked_samples(trained, data, split)
    count = rows_asked(source.blend, samples, f"{split} split of {name}")
    batch_size = batch_size or run.train.micro_batch_size or BATCH
    scorer = Scorer(trained, precision or run.train.precision or "auto")
    nats, tokens, right = 0.0, 0, 0
    for at in range(0, count, batch_size):
        batch = source.batch(range(at, min(at + batch_size, count)))
        losses, hits = scorer.told(batch)
        counted = batch["weights"] > 0
        nats += float(losses[counted].double().sum())
        tokens, right = tokens + int(counted.sum()), right + int(hits[counted].sum())
        if progress:
            progress(min(at + batch_size, count), count)
    if not tokens:
        raise UserError(f"the {split} split of {name} has no token to hide")
    return Told(
        checkpoint=str(trained.reader.folder),
        step=trained.reader.step,
        data=f"{split} split of {name}",
        samples=count,
        window=source.blend.seq_length,
        rate=source.source.settings.rate,
        precision=scorer.label,
        nats=nats,
        tokens=tokens,
        right=right,
    )


def masked_samples(trained: Trained, data: Path | str | None, split: str) -> tuple[MaskedTokens, str]:
    """Samples of a split, masked as in the run, and what they are of."""
    from pretrain.config.errors import checked
    from pretrain.config.sections.masking import Masking
    from pretrain.data.masked.samples import open_masked
    from pretrain.data.samples import MaskedTokens
    from pretrain.data.tokens.tokenizer import Tokenizer
    from pretrain.trained.measures.windows import check_fits, chosen

    run = trained.reader.sections
    corpora, cache = chosen(trained, data)
    given = run.masking or {}
    masking = checked(Masking, given, f"{trained.reader.folder}, masking.")
    window = run.data.seq_length or trained.positions
    source = open_masked(corpora, split, window, 0, cache, masking, alone=True)
    own = Tokenizer(trained.tokenizer) if trained.tokenizer else None
    return MaskedTokens(source, trained.config), check_fits(trained, own, corpora, source.blend)
