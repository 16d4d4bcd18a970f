"""The logit proof: an exported folder must give our model's logits.

transformers loads the folder as a user would load it.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.config import ModelConfig
from model.depth.sublayer import Sublayer
from model.errors import UserError
from model.hf.crossed_reference import CrossedEvaluation, Side
from model.hf.folding.pre_ln import Fold
from model.hf.names.conversions import COLOURS, Target
from model.hf.packaging import packaging
from model.hf.reference import Evaluation, Weights
from model.speech import FRAMES_PER_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative to the standard deviation of the logits.
# A wrong coefficient, permutation or activation is orders of magnitude above both.
EXACT_TOLERANCE = 1e-5
LIMIT = 1e-4
ALIKE = 0.99
"""Cosine of the logits in the training's precision to the export's, above which nothing is asked.

Rounding to bf16 leaves 0.997 at 1000 layers.
"""
IMAGES = 8
"""Random images that are asked."""
AMPLIFIED = 10
"""Below it, how many times what rounding the activations does is still rounding."""


class ProofError(UserError):
    """The exported folder computes something else."""


@dataclass(frozen=True)
class Proof:
    """What was compared; differences are in units of `scale`."""

    difference: float
    """Largest logit difference found."""
    tolerance: float
    """Largest logit difference allowed."""
    scale: float
    """The standard deviation of our logits."""
    tokens: int
    """Positions compared."""
    epsilon_effect: float
    """How far the exported epsilons move our logits, in fp64."""
    rounding: float
    """How far fp32 arithmetic moves our logits."""
    trained: float | None = None
    """Cosine of our logits in the precision of the training to the export's in fp32.

    None where that was fp32, or is not known.
    """

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.difference:.2e} of a standard deviation ({self.scale:.3g}), "
            f"allowed {self.tolerance:.2e}, over {self.tokens} tokens"
        )


@dataclass(frozen=True)
class Inputs:
    """What both models are asked. All tensors are [b, s], those of a source [b, t]."""

    tokens: Tensor
    keep: Tensor | None = None
    """Not of a decoder by itself: 0 for padding, whose logits mean nothing."""
    types: Tensor | None = None
    """Rows of an encoder's table of token types, where it has one."""
    source: Tensor | None = None
    """What the encoder under a decoder reads: ids, or standardised frames [b, f, m]."""
    source_keep: Tensor | None = None
    """0 for its padding."""
    images: bool = False
    """`tokens` are standardised images [b, c, h, w]."""

    def ask(self, ours: Callable[..., Tensor]) -> Tensor:
        """Logits by a function of ours: [b, s, v], or [tokens, v] without those of padding."""
        if self.source is not None:
            more = {"source": self.source, "source_keep": self.source_keep, "keep": self.keep}
            return self.seen(ours(self.tokens, **more))
        if self.keep is None:
            return ours(self.tokens)
        return self.seen(ours(self.tokens, keep=self.keep, types=self.types))

    def seen(self, logits_bsv: Tensor) -> Tensor:
        """Logits without those of padding."""
        return logits_bsv if self.keep is None else logits_bsv[self.keep.bool()]

    def arguments(self) -> dict[str, Tensor | bool | None]:
        """What transformers calls them."""
        if self.source is not None:
            return {
                "input_features" if self.source.is_floating_point() else "input_ids": self.source,
                "attention_mask": self.source_keep,
                "decoder_input_ids": self.tokens,
                "decoder_attention_mask": self.keep,
                "use_cache": False,
            }
        if self.images:
            grey = self.tokens.shape[1] == 1
            return {"pixel_values": self.tokens.expand(-1, COLOURS, -1, -1) if grey else self.tokens}
        if self.keep is None:
            return {"input_ids": self.tokens, "use_cache": False}
        given: dict[str, Tensor | bool | None] = {"input_ids": self.tokens, "attention_mask": self.keep}
        return given if self.types is None else {**given, "token_type_ids": self.types}

    @property
    def count(self) -> int:
        """Positions, or images, with logits."""
        if self.images:
            return len(self.tokens)
        return self.tokens.numel() if self.keep is None else int(self.keep.sum())


def proof_inputs(
    config: ModelConfig, positions: int, given: Tensor | None = None, source_positions: int | None = None
) -> Inputs:
    """Two random rows of up to 64 positions.

    Unless it is of a decoder by itself, the second half of the last is padding; types are random.
    Sources are as long as fits and padded in the first row.
    given: rows that the random ones are put below, all cut to one length; of no encoder-decoder.
    Of a model of images random ones.
    """
    generator = torch.Generator().manual_seed(0)
    if config.image is not None:
        drawn = torch.randn(IMAGES, *config.image.shape, generator=generator)
        return Inputs(drawn if given is None else torch.cat((given, drawn)), images=True)
    length = min(positions, 64) if given is None else min(positions, given.shape[1])
    tokens = torch.randint(0, config.vocab_size or 1, (2, length), generator=generator)
    if given is not None:
        tokens = torch.cat((given[:, :length], tokens))
    crossed = config.blueprint.crossed
    if not crossed and config.stack.causal:
        return Inputs(tokens)
    keep, types = torch.ones_like(tokens), None
    keep[-1, (length + 1) // 2 :] = 0
    if config.token_types:
        types = torch.randint(0, config.token_types, tokens.shape, generator=generator)
    if not crossed:
        return Inputs(tokens, keep, types)
    length = min(source_positions or positions, 64)
    if config.speech is not None:
        # Convolutions of transformers read what stands behind the end of a clip: none is padded.
        shape = len(tokens), FRAMES_PER_TOKEN * length, config.speech.filters
        padding = config.blueprint.sinusoid.first - 1  # has no position there, and no place in a text
        heard = torch.randn(shape, generator=generator)
        return Inputs(tokens.masked_fill(tokens == padding, 0), keep, None, heard)
    source = torch.randint(0, config.vocab_size or 1, (len(tokens), length), generator=generator)
    source_keep = torch.ones_like(source)
    source_keep[0, (2 * length + 2) // 3 :] = 0
    return Inputs(tokens, keep, None, source, source_keep)


def change(a: Tensor, b: Tensor) -> float:
    """Largest difference between two sets of logits, in standard deviations of the second.

    NaN where either is not finite.
    """
    return float((a.double() - b.double()).abs().max() / b.double().std())


def epsilon_effect(
    weights: Weights, config: ModelConfig, inputs: Inputs, logit_scale: float, fold: Fold
) -> float:
    """How far the epsilons of a fold move the logits, in fp64; 0 for an exact fold.

    This is what separates the export from our model beside rounding.
    """
    if not fold.epsilons:
        return 0.0
    own, folded = (
        _in_float64(weights, config, inputs, logit_scale, epsilons) for epsilons in ({}, fold.epsilons)
    )
    return change(folded, own)


def _in_float64(
    weights: Weights,
    config: ModelConfig,
    inputs: Inputs,
    logit_scale: float,
    epsilons: Mapping[str, float] | None = None,
) -> Tensor:
    """Our logits [b, s, v] without rounding."""
    return inputs.ask(
        evaluation(weights, config, logit_scale=logit_scale, dtype=torch.float64, epsilons=epsilons)
    )


class _Rounded(Evaluation):
    """Our model in fp32, its activations rounded to bf16.

    This is what computing in bf16 has to bear, constants aside.
    """

    def _sublayer(
        self,
        x: Tensor,
        given: Tensor,
        c: Sublayer,
        branch: Callable[[Tensor], Tensor],
        names: tuple[str, str],
        kept: Tensor | None,
    ) -> Tensor:
        return super()._sublayer(x, given, c, branch, names, kept).bfloat16().float()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return super()._norm(x, name).bfloat16().float()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return super()._linear(x, name).bfloat16().float()


class _RoundedSide(_Rounded, Side):
    """The same of one of two stacks."""


class _RoundedBoth(CrossedEvaluation):
    """The same of an encoder and a decoder."""

    side = _RoundedSide


def evaluation(
    weights: Weights,
    config: ModelConfig,
    *,
    logit_scale: float,
    dtype: torch.dtype = torch.float32,
    epsilons: Mapping[str, float] | None = None,
    rounded: bool = False,
) -> Callable[..., Tensor]:
    """The plain evaluation of a model of any family.

    rounded: its activations to bf16. Other arguments as `Evaluation`.
    """
    kinds: dict[tuple[bool, bool], Callable[..., Callable[..., Tensor]]] = {
        (False, False): Evaluation,
        (False, True): _Rounded,
        (True, False): CrossedEvaluation,
        (True, True): _RoundedBoth,
    }
    kind = kinds[config.blueprint.crossed, rounded]
    return kind(weights, config, logit_scale=logit_scale, dtype=dtype, epsilons=epsilons)


def prove_precision(
    theirs: Tensor,
    weights: Weights,
    config: ModelConfig,
    inputs: Inputs,
    *,
    logit_scale: float,
    trained: Callable[..., Tensor],
) -> float:
    """Cosine of the logits in the precision of the training, by `trained`, to the export's in fp32.

    theirs: the export's logits [b, s, v]; trained: tokens [b, s] -> [b, s, at least v].
    Raises ProofError where that precision computes another function.
    A function that makes roundings much larger by itself, as plain post-LN of hundreds of layers
    does, is none: there fp32 with rounded activations is as far off.
    """
    ours = inputs.ask(lambda *args, **more: trained(*args, **more).float().cpu())[..., : config.vocab_size]
    found = _cosine(ours, theirs)
    if found >= ALIKE:
        return found
    rounded = _cosine(inputs.ask(evaluation(weights, config, logit_scale=logit_scale, rounded=True)), theirs)
    # Not `1 - found > ...`, which a NaN would pass.
    if not 1 - found <= AMPLIFIED * (1 - rounded):
        raise ProofError(
            "in the precision of its training this model computes something else than in fp32: "
            f"the cosine of their logits is {found:.4f}, and rounding alone leaves {rounded:.4f}; "
            "nothing was written. Please report it with the configuration of the run"
        )
    return found


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a * b).sum() / a.norm() / b.norm())


def load_exported(folder: Path, target: Target, config: ModelConfig) -> PreTrainedModel:
    """The model of a folder in fp32, through the class that a user gets.

    Only our own modelling files are trusted.
    """
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return (
            getattr(transformers, packaging(config).auto)
            .from_pretrained(folder, dtype=torch.float32, trust_remote_code=target == "fathom")
            .eval()
        )
    finally:
        if shown:
            logging.enable_progress_bar()


def forget(model: PreTrainedModel) -> None:
    """Removes the copy of a modelling file that transformers cached for a folder.

    The folder will not stay where it is.
    """
    from transformers.dynamic_module_utils import HF_MODULES_CACHE

    parts = type(model).__module__.split(".")
    if parts[0] != "transformers_modules":
        return
    package = ".".join(parts[:2])
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    shutil.rmtree(Path(HF_MODULES_CACHE, *parts[:2]), ignore_errors=True)


def logits(folder: Path, target: Target, config: ModelConfig, inputs: Inputs) -> Tensor:
    """fp32 logits, as `Inputs.ask` gives them, by the model of a folder."""
    model = load_exported(folder, target, config)
    try:
        with torch.no_grad():
            return inputs.seen(model(**inputs.arguments()).logits.float())
    finally:
        forget(model)


def prove(
    folder: Path,
    target: Target,
    weights: Weights,
    config: ModelConfig,
    inputs: Inputs,
    *,
    logit_scale: float,
    fold: Fold,
    effect: float,
    reference: Callable[..., Tensor] | None = None,
    trained: Callable[..., Tensor] | None = None,
) -> Proof:
    """Compares the logits of a folder with two others.

    The first is the plain evaluation with the exported epsilons, from which only rounding may
    separate it. The second is our model's own, from which `effect` (`epsilon_effect`) may as well.
    With `trained`, also with our logits in the precision of the training (`prove_precision`).

    reference: tokens [b, s] -> our model's own logits [b, s, at least v];
        the plain evaluation where None.
    Rounding is allowed EXACT_TOLERANCE, or 4 x the measured effect of fp32 on our own logits,
    which grows with depth, but never more than LIMIT.
    Raises ProofError with the numbers.
    """
    plain = inputs.ask(evaluation(weights, config, logit_scale=logit_scale))
    ours = inputs.ask(reference).float()[..., : config.vocab_size] if reference else plain
    if not (plain.isfinite().all() and ours.isfinite().all()):
        raise UserError("the model's own logits are not finite: this checkpoint cannot be exported")
    rounding = change(plain, _in_float64(weights, config, inputs, logit_scale))
    allowed = min(max(EXACT_TOLERANCE, 4 * rounding), LIMIT)
    theirs, scale = logits(folder, target, config, inputs), float(ours.double().std())
    if theirs.shape != ours.shape:
        raise ProofError(
            f"the exported {target} model gives logits of shape {tuple(theirs.shape)}, "
            f"ours {tuple(ours.shape)}: nothing was written"
        )
    expected = (
        inputs.ask(evaluation(weights, config, logit_scale=logit_scale, epsilons=fold.epsilons))
        if fold.epsilons
        else plain
    )
    for other, tolerance in ((expected, allowed), (ours, min(allowed + effect, LIMIT))):
        proof = Proof(change(theirs, other), tolerance, scale, inputs.count, effect, rounding)
        # Not `difference > tolerance`, which a NaN would pass.
        if not proof.difference <= proof.tolerance:
            raise ProofError(
                f"the exported {target} model does not compute this model: {proof}; nothing was written"
            )
    if trained is None:
        return proof
    alike = prove_precision(theirs, weights, config, inputs, logit_scale=logit_scale, trained=trained)
    return replace(proof, trained=alike)
