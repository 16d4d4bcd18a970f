"""The logit proof: a folder is loaded by transformers as a user would load it, and must give our model's logits."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.folding.pre_ln import Fold
from model.hf.mapping import Target
from model.hf.reference import Evaluation, Weights

# Relative to the standard deviation of the logits. A wrong coefficient, permutation or activation is orders of magnitude above both.
EXACT_TOLERANCE = 1e-5
LIMIT = 1e-4


class ProofError(UserError):
    """The exported folder computes something else."""


@dataclass(frozen=True)
class Proof:
    """All in units of `scale`, the standard deviation of our logits. difference, tolerance: largest logit difference found and allowed.

    epsilon_effect: how far the exported epsilons move our logits, in fp64. rounding: how far fp32 arithmetic moves them. tokens: positions compared.
    """

    difference: float
    tolerance: float
    scale: float
    tokens: int
    epsilon_effect: float
    rounding: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2e} of a standard deviation ({self.scale:.3g}), "
            f"allowed {self.tolerance:.2e}, over {self.tokens} tokens"
        )


def proof_tokens(config: ModelConfig, positions: int, given: Tensor | None = None) -> Tensor:
    """Token ids [b, s]: two random rows of up to 64 positions, or the given ones with the random rows below them, cut to one length."""
    length = min(positions, 64) if given is None else min(positions, given.shape[1])
    random = torch.randint(0, config.vocab_size or 1, (2, length), generator=torch.Generator().manual_seed(0))
    return random if given is None else torch.cat((given[:, :length], random))


def change(a: Tensor, b: Tensor) -> float:
    """Largest difference between two sets of logits, in standard deviations of the second. NaN where either is not finite."""
    return float((a.double() - b.double()).abs().max() / b.double().std())


def epsilon_effect(
    weights: Weights, config: ModelConfig, tokens: Tensor, logit_scale: float, fold: Fold
) -> float:
    """How far the epsilons of a fold move the logits, in fp64: what separates the export from our model beside rounding. 0 for an exact fold."""
    if not fold.epsilons:
        return 0.0
    own, folded = (
        _in_float64(weights, config, tokens, logit_scale, epsilons) for epsilons in ({}, fold.epsilons)
    )
    return change(folded, own)


def _in_float64(
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    logit_scale: float,
    epsilons: Mapping[str, float] | None = None,
) -> Tensor:
    """Our logits [b, s, v] without rounding, for the very constants that fp32 uses."""
    plan = config.depth_plan().in_float32()
    return Evaluation(
        weights, config, logit_scale=logit_scale, dtype=torch.float64, epsilons=epsilons, plan=plan
    )(tokens)


def load(folder: Path, target: Target) -> Any:
    """The model of a folder in fp32, through the class that a user gets. Only our own modelling file is trusted."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=target == "fathom"
        ).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def forget(model: Any) -> None:
    """Removes the copy of a modelling file that transformers cached for a folder which will not stay where it is."""
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    parts = type(model).__module__.split(".")
    if parts[0] != "transformers_modules":
        return
    package = ".".join(parts[:2])
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    shutil.rmtree(Path(HF_MODULES_CACHE, *parts[:2]), ignore_errors=True)


def logits(folder: Path, target: Target, tokens: Tensor) -> Tensor:
    """fp32 logits [b, s, v] of token ids [b, s] by the model of a folder."""
    model = load(folder, target)
    try:
        with torch.no_grad():
            return model(input_ids=tokens, use_cache=False).logits.float()
    finally:
        forget(model)


def prove(
    folder: Path,
    target: Target,
    weights: Weights,
    config: ModelConfig,
    tokens: Tensor,
    *,
    logit_scale: float,
    fold: Fold,
    effect: float,
    reference: Callable[[Tensor], Tensor] | None = None,
) -> Proof:
    """Compares the logits of a folder with two others: the plain evaluation with the exported epsilons, from which only rounding may separate it, and our
    model's own by `reference` (tokens [b, s] -> [b, s, at least v]; the plain evaluation where None), from which `effect` (`epsilon_effect`) may as well.

    Rounding is allowed EXACT_TOLERANCE, or 4 x the measured effect of fp32 on our own logits, which grows with depth, but never more than LIMIT.
    Raises ProofError with the numbers.
    """
    plain = Evaluation(weights, config, logit_scale=logit_scale)(tokens)
    ours = reference(tokens).float()[..., : config.vocab_size] if reference else plain
    if not (plain.isfinite().all() and ours.isfinite().all()):
        raise UserError("the model's own logits are not finite: this checkpoint cannot be exported")
    rounding = change(plain, _in_float64(weights, config, tokens, logit_scale))
    allowed = min(max(EXACT_TOLERANCE, 4 * rounding), LIMIT)
    theirs, scale = logits(folder, target, tokens), float(ours.double().std())
    if theirs.shape != ours.shape:
        raise ProofError(
            f"the exported {target} model gives logits of shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}: nothing was written"
        )
    expected = (
        Evaluation(weights, config, logit_scale=logit_scale, epsilons=fold.epsilons)(tokens)
        if fold.epsilons
        else plain
    )
    for other, tolerance in ((expected, allowed), (ours, min(allowed + effect, LIMIT))):
        proof = Proof(change(theirs, other), tolerance, scale, tokens.numel(), effect, rounding)
        # Not `difference > tolerance`, which a NaN would pass.
        if not proof.difference <= proof.tolerance:
            raise ProofError(
                f"the exported {target} model does not compute this model: {proof}; nothing was written"
            )
    return proof
