"""Number formats and kernels: what a machine can do, and what a run's wishes come to on it.

Megatron-core without Transformer Engine ignores fp8 without a word.
Transformer Engine fails on an unfit GPU in the middle of the first step.
Both are found here, before anything is built.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.config import ModelConfig
from model.errors import UserError
from parallel.config import Fp8Config
from parallel.hardware.versions import in_range, installed, supported

if TYPE_CHECKING:  # Megatron-core takes seconds to import, and questions about a machine do not need it
    from model.network.parts import Kernels
    from parallel.topology import Layout

INSTALL = "install it (pip install --no-build-isolation '.[te]')"
AMAX_HISTORY = 1024
"""Steps over which delayed scaling looks back for the largest value.

Transformer Engine's default.
"""


@dataclass(frozen=True)
class Fp8Recipe:
    """One way to scale FP8 tensors."""

    lowest: tuple[int, int]
    """Lowest compute capability that can run it."""
    cuda: tuple[int, int]
    """Lowest version of the toolkit torch was built with."""
    below: tuple[int, int] = (99, 0)
    """Compute capability from which on it does not run."""
    multiple: int = 16
    """What sizes of matrices must be divisible by."""
    format: str = "hybrid"
    """Megatron-core's; hybrid has E5M2 gradients."""

    def runs_on(self, machine: Machine) -> bool:
        """Whether a machine's GPU and toolkit can run it."""
        return self.lowest <= machine.capability < self.below and machine.cuda >= self.cuda


# In order of preference where another one does not run.
# Requirements are those of Transformer Engine, the same from 2.9 to 2.20
# (`transformer_engine.pytorch.quantization`).
RECIPES = {
    "mxfp8": Fp8Recipe(lowest=(10, 0), below=(12, 0), cuda=(12, 8), multiple=32, format="e4m3"),
    "blockwise": Fp8Recipe(lowest=(9, 0), cuda=(12, 9), format="e4m3"),
    "tensorwise": Fp8Recipe(lowest=(8, 9), cuda=(12, 1)),
    "delayed": Fp8Recipe(lowest=(8, 9), cuda=(12, 1)),
}


@dataclass(frozen=True)
class Machine:
    """What decides about formats and kernels."""

    gpu: str | None = None
    """Its name, None without one."""
    capability: tuple[int, int] = (0, 0)
    """The GPU's compute capability."""
    cuda: tuple[int, int] = (0, 0)
    """Toolkit of torch, (0, 0) without."""
    te: str | None = None
    """Version of Transformer Engine that can be imported."""
    te_problem: str = "is not installed"
    """Why there is none."""
    triton: str | None = None
    """Version of Triton that is installed."""

    @property
    def fast_bf16(self) -> bool:
        """Whether matrix units compute bf16 (compute capability 8.0 and up)."""
        return self.capability >= (8, 0)

    def recipes(self) -> list[str]:
        """FP8 recipes that run here, best first; none without Transformer Engine."""
        return [name for name, recipe in RECIPES.items() if self.te and recipe.runs_on(self)]


@functools.cache
def this_machine() -> Machine:
    """The machine of this process, by its current GPU.

    Imports Transformer Engine where there is a GPU.
    """
    if not torch.cuda.is_available():
        return Machine(te_problem="is not used without a GPU")
    major, _, minor = (torch.version.cuda or "0.0").partition(".")
    te, problem = _transformer_engine()
    return Machine(
        torch.cuda.get_device_name(),
        torch.cuda.get_device_capability(),
        (int(major), int(minor.partition(".")[0])),
        te,
        problem,
        installed("triton"),
    )


def _transformer_engine() -> tuple[str | None, str]:
    version = installed("transformer-engine")
    if version is None:
        return None, "is not installed"
    if not in_range("transformer-engine", version):
        return None, f"{version} is outside the supported range {supported().get('transformer-engine')}"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken installation raises whatever its loader meets
        return (
            None,
            f"{version} cannot be imported "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})",
        )
    return version, ""


@dataclass(frozen=True)
class Numerics:
    """What a run computes with."""

    dtype: torch.dtype
    """Of weights and activations."""
    kernels: Kernels
    recipe: str | None = None
    """Of FP8 products, None for none."""
    first_last_bf16: bool = False
    fp32_residual: bool = False
    """The residual stream is in fp32 although `dtype` is not."""
    joins: str | None = None
    """What computes residual joins and the norms after them in one pass, by its name in
    `model.layers.one_pass.MAKERS`; None: nothing, both are apart.
    """

    @property
    def label(self) -> str:
        """fp8, bf16 or fp32: the format of the matrix products."""
        return "fp8" if self.recipe else {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    def core_fields(self) -> dict[str, object]:
        """Megatron-core's configuration fields about precision, but for the format of weights."""
        stream: dict[str, object] = {"fp32_residual_connection": True} if self.fp32_residual else {}
        if self.recipe is None:
            return stream
        return stream | {
            "fp8": RECIPES[self.recipe].format,
            "fp8_recipe": self.recipe,
            "fp8_amax_history_len": AMAX_HISTORY,
            "fp8_amax_compute_algo": "max",
            "first_last_layers_bf16": self.first_last_bf16,
        }


def numerics_for(
    precision: str, kernels: str, fp8: Fp8Config, machine: Machine, *, fp32_residual: bool = False
) -> Numerics:
    """What the precision settings of a configuration mean on a machine.

    These are `train.precision`, `train.kernels`, `train.fp8` and `train.fp32_residual`.
    precision auto: bf16 where the GPU computes it fast, else fp32.
    kernels auto: Transformer Engine for bf16 and fp8 where it can be used.
    Raises UserError for what the machine cannot do, naming the nearest choice that works.
    """
    dtype = {
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "auto": torch.bfloat16 if machine.fast_bf16 else torch.float32,
    }[precision]
    joins = _joins(kernels, machine) if kernels.endswith("_joined") else None
    if kernels.startswith("te") and machine.te is None:
        why = (
            "needs a GPU, and this machine has none"
            if machine.gpu is None
            else f"needs Transformer Engine, which {machine.te_problem}: {INSTALL}"
        )
        raise UserError(
            f"train.kernels={kernels} {why}; without it, set train.kernels={kernels.replace('te', 'local')}"
        )
    if fp8.recipe != "none":
        _check_fp8(fp8.recipe, machine)
        fp8.check_weights("fp32" if dtype == torch.float32 else "bf16")
    if fp32_residual and dtype == torch.float32:
        raise UserError(
            "train.fp32_residual=true has no effect: train.precision=auto is fp32 on this machine; "
            "set train.fp32_residual=false or train.precision=bf16"
        )
    auto: Kernels = "te" if machine.te is not None and dtype == torch.bfloat16 else "local"
    parts = PARTS.get(kernels, auto)
    recipe = None if fp8.recipe == "none" else fp8.recipe
    return Numerics(dtype, parts, recipe, fp8.first_last_bf16, fp32_residual, joins)


PARTS: dict[str, Kernels] = {"local": "local", "local_joined": "local", "te": "te", "te_joined": "te_apart"}
"""What layers are made of, by `train.kernels`; `auto` depends on the machine."""


def _joins(kernels: str, machine: Machine) -> str:
    """What computes joins together with norms here, as `Numerics.joins`.

    Raises UserError for a GPU without Triton.
    """
    if machine.gpu is None:
        return "compile"
    if machine.triton is None:
        raise UserError(
            f"train.kernels={kernels} needs Triton, which is not installed: install it "
            f"(pip install '.[kernels]'), or set train.kernels={kernels.removesuffix('_joined')}"
        )
    return "triton"


def fallback(kernels: str, numerics: Numerics, machine: Machine) -> str | None:
    """A line for users whose Transformer Engine is installed but cannot be used; else None.

    There `auto` quietly took PyTorch's kernels.
    """
    if (
        kernels != "auto"
        or numerics.kernels == "te"
        or numerics.dtype != torch.bfloat16
        or machine.gpu is None
        or installed("transformer-engine") is None
    ):
        return None
    return (
        f"Transformer Engine {machine.te_problem}: layers run in plain PyTorch, slower; "
        "mend it, or set train.kernels=local"
    )


def _check_fp8(recipe: str, machine: Machine) -> None:
    if machine.gpu is None:
        raise UserError(
            f"train.fp8.recipe={recipe} needs a GPU, and this machine has none: set train.fp8.recipe=none"
        )
    if machine.te is None:
        raise UserError(
            f"train.fp8.recipe={recipe} needs Transformer Engine, which {machine.te_problem}; "
            f"without it the run would silently compute in bf16: {INSTALL}, or set train.fp8.recipe=none"
        )
    if RECIPES[recipe].runs_on(machine):
        return
    need, here = RECIPES[recipe], machine.capability
    fits = need.lowest <= here < need.below
    upto = f" and below {_dots(need.below)}" if need.below[0] < 99 else ""
    why = (
        f"CUDA {_dots(need.cuda)}, and torch was built with {_dots(machine.cuda)}"
        if fits
        else f"compute capability {_dots(need.lowest)}{upto}, and {machine.gpu} has {_dots(here)}"
    )
    nearest = next(iter(machine.recipes()), "none")
    raise UserError(
        f"train.fp8.recipe={recipe} needs {why}: set train.fp8.recipe={nearest}"
        + (" and train.precision=bf16" if nearest == "none" else "")
    )


def _dots(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def check_sizes(
    numerics: Numerics, model: ModelConfig, layout: Layout, *, seq_length: int, micro_batch_size: int
) -> None:
    """Raises UserError where FP8 products would meet a matrix that their kernels do not take.

    It is the size that does not fit; the error names the size to change.
    """
    if numerics.recipe is None:
        return
    multiple, tensor = RECIPES[numerics.recipe].multiple, layout.tensor
    width = model.kv_channels
    tokens = seq_length // layout.context * micro_batch_size
    tokens //= tensor if layout.sequence_parallel else 1
    sizes = {
        "model.hidden_size": model.hidden_size,
        "query, key and value rows per tensor-parallel rank "
        "(model.num_attention_heads, model.num_query_groups, model.head_dim)": (
            (model.num_attention_heads + 2 * model.groups) * width // tensor
        ),
        "attention width per tensor-parallel rank (model.num_attention_heads x head width)": (
            model.num_attention_heads * width // tensor
        ),
        "model.ffn_hidden_size per tensor-parallel rank": model.ffn_size // tensor,
        "tokens of a micro-batch per rank (data.seq_length x train.micro_batch_size)": tokens,
    }
    for what, size in sizes.items():
        if size % multiple:
            raise UserError(
                f"train.fp8.recipe={numerics.recipe}: {what} = {size} is not a multiple of {multiple}: "
                "change it, or set train.fp8.recipe=none"
            )
    if (
        numerics.recipe == "blockwise"
        and layout.sequence_parallel
        and (tokens % 128 or model.hidden_size % 128)
    ):
        raise UserError(
            "train.fp8.recipe=blockwise with parallel.sequence_parallel=true gathers tiles of 128 x 128: "
            f"tokens of a micro-batch per rank ({tokens}) and model.hidden_size={model.hidden_size} must be "
            "multiples of 128; change them, or set train.fp8.recipe=tensorwise"
        )
