"""Factors on rate, epsilon and decay by what a parameter is for: one table of roles.

A factor is a number, or a word for one that follows the model's size, so that the same recipe
serves every depth and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from model.config import ModelConfig
from model.parameters.table import Role, Row, parameter_table
from model.sections import Strict
from parallel.factors import Factors
from parallel.optimizers import OPTIMIZERS, OptimizerName
from pretrain.config.sections.transfer import transferred

WORDS: dict[str, Callable[[ModelConfig], float]] = {
    "sqrt(hidden)": lambda model: math.sqrt(model.hidden_size),
    # Of the stack that a parameter is in; the last one's for those outside of the layers.
    "1/layers": lambda model: 1 / model.num_layers,
    "1/sqrt(layers)": lambda model: 1 / math.sqrt(model.num_layers),
}
"""Word of a factor -> its value for a model."""
Word = Literal["sqrt(hidden)", "1/layers", "1/sqrt(layers)"]
Factor = Annotated[float, Field(gt=0, ge=1e-30, le=1e30)] | Word


class RoleFactors(Strict):
    """Of the parameters of one role."""

    rate: Factor = Field(
        1.0,
        description="Factor on the learning rate: a number, sqrt(hidden), 1/layers or 1/sqrt(layers).",
    )
    eps: Factor = Field(1.0, description="Factor on Adam's epsilon, as `rate`.")
    decay: Factor = Field(
        1.0,
        description="Factor on the weight decay, as `rate`. A step decays by its rate times this.",
    )


class FactorsConfig(Strict):
    """What each kind of parameter multiplies the optimizer's settings by."""

    embedding: RoleFactors = Field(
        default_factory=RoleFactors,
        description="Tables of words, positions and token types, the map of patches, and convolutions over "
        "frames. "
        "Tables of variance 1 move "
        "sqrt(hidden) times less, for their size, than GPT-2's: rate: sqrt(hidden).",
    )
    stream_norm: RoleFactors = Field(
        default_factory=RoleFactors,
        description="Norms that the stream itself passes, in post-norm schemes. "
        "They act one after the other, so that their steps multiply: rate: 1/layers.",
    )
    norm: RoleFactors = Field(default_factory=RoleFactors, description="All other norms.")
    bias: RoleFactors = Field(
        default_factory=RoleFactors, description="Biases of linear layers, and of the logits."
    )
    hidden: RoleFactors = Field(default_factory=RoleFactors, description="Matrices of layers and head.")
    output: RoleFactors = Field(
        default_factory=RoleFactors, description="An output projection that is not the table of words."
    )


SPECIAL = {
    Role.WORD: "embedding",
    Role.POSITION: "embedding",
    Role.TOKEN_TYPE: "embedding",
    Role.PATCH: "embedding",
    Role.CLASS_TOKEN: "embedding",
    Role.FRAMES: "embedding",
    Role.LINEAR_BIAS: "bias",
    Role.LOGIT_BIAS: "bias",
    Role.OUTPUT: "output",
}
NORMS = (Role.NORM_GAIN, Role.NORM_BIAS)
DECAYED = ("hidden", "output", "embedding")
"""Roles whose parameters may be decayed."""


def role_of(row: Row) -> str:
    """The field of `FactorsConfig` that a parameter reads."""
    if row.role in NORMS:
        return "stream_norm" if row.in_stream else "norm"
    return SPECIAL.get(row.role, "hidden")


def factors_of(factors: FactorsConfig, model: ModelConfig) -> Callable[[Row], Factors]:
    """From a parameter of the model to its factors, those of `model.transfer` among them."""
    last = model.blueprint.stacks[-1]
    owned = {stack.name: model.of(stack) for stack in model.blueprint.stacks}
    values = {
        (stack, name): Factors(*(_number(factor, own) for factor in (role.rate, role.eps, role.decay)))
        for stack, own in owned.items()
        for name, role in ((name, getattr(factors, name)) for name in FactorsConfig.model_fields)
    }

    def of(row: Row) -> Factors:
        stack = last.name if row.layer is None else row.stack
        return values[stack, role_of(row)].times(transferred(owned[stack], row))

    return of


def check_factors(
    factors: FactorsConfig, model: ModelConfig, *, optimizer: OptimizerName, decay_embeddings: bool
) -> None:
    """Raises ValueError, naming the first factor that has no effect on this model."""
    if factors == FactorsConfig():
        return
    known = model if model.vocab_size else model.model_copy(update={"vocab_size": 2})
    present = {role_of(row) for row in parameter_table(known, positions=1, source_positions=1)}
    for name in FactorsConfig.model_fields:
        given: RoleFactors = getattr(factors, name)
        for key in RoleFactors.model_fields:
            if getattr(given, key) == 1.0:
                continue
            place = f"optimizer.factors.{name}.{key}={getattr(given, key)}"
            if name not in present:
                raise ValueError(f"{place} has no effect: {_absent(name, model)}; remove it")
            if key == "decay" and name not in DECAYED:
                raise ValueError(f"{place} has no effect: only matrices are decayed; remove it")
            if key == "decay" and name == "embedding" and not decay_embeddings:
                raise ValueError(
                    f"{place} has no effect with optimizer.decay_embeddings=false: "
                    "set that to true or remove the factor"
                )
            update = OPTIMIZERS[optimizer].update(hidden=name == "hidden")
            if key == "eps" and not update.has_epsilon:
                raise ValueError(
                    f"{place} has no effect with optimizer.kind={optimizer}, which has no epsilon: remove it"
                )


def _absent(name: str, model: ModelConfig) -> str:
    why = {
        "stream_norm": f"model.scheme={model.scheme} has norms on its branches only",
        "output": "model.tie_embeddings=true makes the table of words the output projection",
        "bias": "model.bias=false leaves no biases",
    }
    return why.get(name, "the model has no such parameters")


def _number(factor: float | str, model: ModelConfig) -> float:
    return WORDS[factor](model) if isinstance(factor, str) else factor
