"""What a user may say about the parallel layout and the engine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from model.errors import UserError
from model.sections import LAYERS, Strict


class Fp8Config(Strict):
    """Matrix products of the layers in FP8, through Transformer Engine.

    Weights, activations between products and attention stay in bf16.
    """

    recipe: Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        "none",
        description="How FP8 tensors are scaled. none: no FP8; "
        "delayed: by the largest values of past steps, "
        "tensorwise: by each tensor's present one (both from Ada on); "
        "blockwise: by tiles (from Hopper on); mxfp8: by groups of 32 (Blackwell).",
    )
    first_last_bf16: bool = Field(
        False, description="Keep the first and the last layer in bf16; not with recipe=delayed."
    )

    @model_validator(mode="after")
    def _check(self) -> Fp8Config:
        if self.first_last_bf16 and self.recipe in ("none", "delayed"):
            why = "has no effect with" if self.recipe == "none" else "does not combine with"
            raise ValueError(
                f"train.fp8.first_last_bf16=true {why} train.fp8.recipe={self.recipe}: set it to false, "
                "or set train.fp8.recipe=tensorwise"
            )
        return self

    def check_weights(self, precision: str) -> None:
        """Raises UserError for weights in fp32, of which no product is in FP8."""
        if self.recipe != "none" and precision == "fp32":
            raise UserError(
                f"train.fp8.recipe={self.recipe} needs weights in bf16: "
                "set train.precision=bf16 or train.fp8.recipe=none"
            )


class RecomputeConfig(Strict):
    """Activation recomputation."""

    granularity: Literal["none", "selective", "full"] = Field(
        "none", description="none; selective: attention cores only; full: whole layers."
    )
    num_layers: int = Field(
        1, ge=1, le=LAYERS, description="Layers per recomputed group; read with granularity=full."
    )

    @model_validator(mode="after")
    def _check(self) -> RecomputeConfig:
        if self.num_layers != 1 and self.granularity != "full":
            raise ValueError(
                f"parallel.recompute.num_layers={self.num_layers} has no effect with "
                f"parallel.recompute.granularity={self.granularity}: "
                "remove it or set parallel.recompute.granularity=full"
            )
        return self

    def core_fields(self) -> dict[str, Any]:
        """Megatron-core's fields for it."""
        if self.granularity == "none":
            return {}
        if self.granularity == "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": self.num_layers,
        }


class OffloadConfig(Strict):
    """Host offload."""

    optimizer: bool = Field(
        False,
        description="Keep fp32 weights and moments in host memory and step there (ZeRO-1 or 2). "
        "Results stay the same; on a CPU host so does everything.",
    )


class ParallelConfig(Strict):
    """How the model is laid out over processes.

    Data-parallel size = processes / (tensor x pipeline x context).
    """

    processes: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Local processes `fathom pretrain` starts when no launcher did; null means one per GPU, "
        "or 1 on a CPU host.",
    )
    tensor: int = Field(1, ge=1, le=1 << 16, description="Tensor-parallel size (TP).")
    pipeline: int = Field(1, ge=1, le=1 << 16, description="Pipeline stages (PP).")
    virtual_stages: int = Field(
        1, ge=1, le=1 << 16, description="Model chunks per pipeline stage (interleaved schedule)."
    )
    pipeline_split: (
        Annotated[list[Annotated[int, Field(ge=0, le=LAYERS)]], Field(min_length=1, max_length=LAYERS)]
        | Literal["auto"]
        | None
    ) = Field(
        None,
        description="Layers of each pipeline stage, first to last, for uneven splits; auto: as many "
        "sublayers in all as the layers allow, of which a layer with cross-attention has three; "
        "null: equal numbers of layers.",
    )
    context: int = Field(1, ge=1, le=1 << 16, description="Context-parallel size (CP).")
    sequence_parallel: bool = Field(
        False,
        description="Shard norms and residual stream along the sequence over the tensor-parallel group.",
    )
    zero: Literal[0, 1, 2, 3] = Field(
        1,
        description="DeepSpeed ZeRO stage: 1 and 2 shard optimizer state, "
        "3 gradients and parameters too (no pipeline).",
    )
    recompute: RecomputeConfig = Field(
        default_factory=RecomputeConfig, description="Activation recomputation."
    )
    overlap_grad_reduce: bool | None = Field(
        None,
        description="Reduce gradients over data-parallel ranks while the last backward pass still runs. "
        "null: where it can be, which is below ZeRO-3 and with grad_reduce=fp32, but not from a CUDA graph.",
    )
    grad_reduce: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Format in which gradients go to other data-parallel ranks; sums are fp32. "
        "bf16: half the bytes, after the backward passes (zero=1 or 2).",
    )
    offload: OffloadConfig = Field(default_factory=OffloadConfig, description="Host offload.")
    timeout_minutes: float = Field(
        10.0, ge=0.01, le=10**6, description="A collective that takes longer than this ends the run."
    )
    step_timeout_minutes: float | None = Field(
        None,
        ge=0,
        le=10**6,
        description="A training step that takes longer ends the run on all processes, "
        "with a stack dump of each and the late one named. null: ten times the slowest of the latest steps, "
        "at least half of timeout_minutes; 0: off. The first step of a start, "
        "evaluation and checkpoints have an hour.",
    )
    preflight: bool = Field(
        True,
        description="Check every node (GPUs, versions, run directory, clock, network) before the first step.",
    )

    def reduces_early(self, *, graph: bool) -> bool:
        """Whether gradients may leave while the last backward pass still runs.

        graph: a CUDA graph launches the passes; gradients leave from one if it is asked for.
        """
        chosen = not graph if self.overlap_grad_reduce is None else self.overlap_grad_reduce
        return chosen and self.zero < 3 and self.grad_reduce == "fp32"
