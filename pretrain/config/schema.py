"""The configuration of a run: one strict schema.

It is assembled from the sections that each folder owns.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from model.config import ModelConfig
from model.depth.ramp import end
from model.loss_kernels import LossKernelName
from model.sections import Strict
from parallel.config import Fp8Config, ParallelConfig
from parallel.optimizers import OPTIMIZERS, OptimizerName
from pretrain.config.conflicts import (
    check_compile,
    check_cuda_graph,
    check_documents,
    check_fused_products,
    check_growth,
    check_joined,
    check_loss_chunk,
    check_loss_kernel,
    check_optimizer,
    check_schedule,
    check_spans,
    check_task,
    check_transfer,
    check_window,
)
from pretrain.config.sections.augment import Augment
from pretrain.config.sections.checkpoint import CheckpointConfig
from pretrain.config.sections.factors import FactorsConfig, check_factors
from pretrain.config.sections.growth import (
    BatchRampup,
    Growth,
    LengthWarmup,
    batch_growth,
    length_growth,
)
from pretrain.config.sections.limits import NAME, SAMPLES, STEPS, FilePath
from pretrain.config.sections.log import LogConfig
from pretrain.config.sections.masking import Masking
from pretrain.config.sections.schedules import SCHEDULES
from pretrain.config.sections.spans import Spans
from pretrain.config.sections.spec_augment import SpecAugment
from pretrain.config.sections.spikes import SpikeConfig
from pretrain.tasks.table import summaries, task_of
from pretrain.tasks.task import Task

Decay = Annotated[float, Field(ge=0, lt=1)]


class Corpus(Strict):
    """One prepared data set in a blend."""

    path: FilePath = Field(description="Folder written by `fathom data prepare`.")
    weight: float = Field(
        1.0,
        ge=1e-9,
        le=1e9,
        description="Relative share of training samples; weights are normalised over the blend.",
    )


class DataConfig(Strict):
    """Where tokens come from."""

    corpora: list[Corpus] = Field(
        min_length=1,
        max_length=1000,
        description="Prepared data sets, blended by weight. All must share one tokenizer.",
    )
    seq_length: int = Field(ge=2, le=1 << 26, description="Tokens per training sample.")
    source_length: int | None = Field(
        None,
        ge=1,
        le=1 << 26,
        description="Tokens per sample that the encoder under a decoder reads; data.seq_length are then "
        "the decoder's. Only model.family=seq2seq has it, and needs it.",
    )
    document_mask: bool = Field(
        False,
        description="Documents that share a sample do not see each other, and positions start again with "
        "each. Of train.task=causal_lm; masked_lm has it in any case.",
    )
    cache: FilePath | None = Field(
        None, description="Folder for sample indices; null means `index_cache` beside the first corpus."
    )
    changed_at_step: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description="Go on from the checkpoint of this step although the corpora or weights were others; "
        "samples are those that the new ones have from there on.",
    )


MOMENTUM = 0.95
"""Muon's momentum where the configuration gives none."""

SKIP_LIMIT = 10
"""Steps in a row that may be left out, where the configuration gives no number."""


class OptimizerConfig(Strict):
    """AdamW, or Muon for hidden matrices and AdamW for the rest.

    Biases, norms and embeddings' one-dimensional parameters are not decayed.
    """

    kind: OptimizerName = Field(
        "adamw",
        description="muon: orthogonal updates for matrices of layers and head, AdamW for everything else.",
    )
    lr: float = Field(
        ge=1e-30,
        le=1e30,
        description="Peak learning rate; Muon's updates are scaled to the size of AdamW's and share it.",
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.95), description="Decay rates of Adam's first and second moment."
    )
    eps: float = Field(1e-8, ge=1e-30, le=1, description="Adam's epsilon.")
    momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Decay rate of Muon's momentum; read with kind=muon only, where null means 0.95.",
    )
    weight_decay: float = Field(0.1, ge=0, le=1000, description="Decoupled weight decay of matrices.")
    decay_embeddings: bool = Field(False, description="Decay embedding tables too.")
    factors: FactorsConfig = Field(
        default_factory=FactorsConfig, description="Factors on lr, eps and weight_decay by role."
    )
    clip_grad: float = Field(
        1.0, ge=0, le=1e30, description="Global gradient norm limit; 0 turns clipping off."
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.momentum is not None and not OPTIMIZERS[self.kind].has_momentum:
            others = " or ".join(name for name, one in OPTIMIZERS.items() if one.has_momentum)
            raise ValueError(
                f"optimizer.momentum={self.momentum} has no effect with optimizer.kind={self.kind}: "
                f"remove it or set optimizer.kind={others}"
            )
        return self


class BranchConfig(Strict):
    """Progressive residual warm-up: branches come in layer by layer, under any scheme."""

    kind: Literal["none", "linear", "linear_square", "stagewise", "equal"] = Field(
        "none",
        description="How the share of layer l's branches rises from 0 to 1. "
        "linear: over l x steps; linear_square: the square of that; "
        "stagewise: one layer after the other; equal: all layers together.",
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description="Steps in which the first layer comes in; "
        "the last one is whole after model.num_layers x steps. "
        "Read with a kind only, and needed then: the authors take 1000, and 500 from 96 layers on.",
    )

    @model_validator(mode="after")
    def _check(self) -> BranchConfig:
        if self.kind == "none" and self.steps is not None:
            raise ValueError(
                f"schedule.branch.steps={self.steps} has no effect with schedule.branch.kind=none: "
                "remove it or choose a kind"
            )
        if self.kind != "none" and self.steps is None:
            raise ValueError(
                f"schedule.branch.kind={self.kind} needs schedule.branch.steps, "
                "the steps in which the first layer comes in: give a number"
            )
        return self

    def last_step(self, layers: int) -> int:
        """Steps after which a model of so many layers is its scheme's; 0 without a warm-up."""
        return 0 if self.steps is None else end(layers, self.steps)


class ScheduleConfig(Strict):
    """Learning rate over steps, and shares of the branches."""

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = Field(
        "cosine",
        description="Shape after warm-up. wsd: constant, then linear decay over decay_steps. "
        "inverse_sqrt: the root of warmup_steps / step, whatever the run's length.",
    )
    warmup_steps: int = Field(0, ge=0, le=STEPS, description="Steps of linear warm-up from 0.")
    decay_steps: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description="Steps of the final decay; read with kind=wsd only, where null means 10 % of all steps.",
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate divided by the peak.")
    branch: BranchConfig = Field(
        default_factory=BranchConfig, description="Warm-up of the layers' branches; none by default."
    )
    batch_rampup: BatchRampup = Field(
        default_factory=BatchRampup, description="Fewer samples in the first steps; none by default."
    )
    seq_length_warmup: LengthWarmup = Field(
        default_factory=LengthWarmup, description="Shorter sequences in the first steps; none by default."
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        shape = SCHEDULES[self.kind]
        floor = ScheduleConfig.model_fields["min_lr_ratio"].default
        if not shape.has_floor and self.min_lr_ratio != floor:
            raise ValueError(
                f"schedule.min_lr_ratio={self.min_lr_ratio} has no effect with schedule.kind={self.kind}: "
                "remove it or choose another schedule.kind"
            )
        if self.decay_steps is not None and not shape.has_decay:
            others = " or ".join(name for name, other in SCHEDULES.items() if other.has_decay)
            raise ValueError(
                f"schedule.decay_steps={self.decay_steps} has no effect with schedule.kind={self.kind}: "
                f"remove it or set schedule.kind={others}"
            )
        return self


class TrainConfig(Strict):
    """The loop."""

    task: str | None = Field(
        None,
        description=f"What is trained for; null: the task of the model's family. {summaries()}.",
    )
    steps: int = Field(ge=1, le=STEPS, description="Optimizer steps of the whole run.")
    stop_at_step: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description=(
            "Save and leave cleanly after this step although the run is not finished; "
            "schedules still span `steps`."
        ),
    )
    global_batch_size: int = Field(
        ge=1, le=SAMPLES, description="Samples per optimizer step over all processes."
    )
    micro_batch_size: int = Field(ge=1, le=SAMPLES, description="Samples per forward pass of one process.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description=(
            "auto: bf16 where the hardware computes it fast, else fp32. "
            "Gradients and weights accumulate in fp32."
        ),
    )
    fp32_residual: bool = Field(
        False,
        description=(
            "Keep the residual stream in fp32 where the branches compute in bf16 or fp8: "
            "its sum over the layers is then not rounded. "
            "Costs memory traffic around every branch, and twice the bytes between pipeline stages."
        ),
    )
    kernels: Literal["auto", "local", "te", "local_joined", "te_joined"] = Field(
        "auto",
        description=(
            "Parts of the layers. te: Transformer Engine's; local: PyTorch's; "
            "auto: te for bf16 on a GPU where it is installed. "
            "local_joined, te_joined: theirs, but each residual join and the norm after it in one pass, "
            "by Triton on a GPU and by torch.compile on a CPU; local_joined also each activation with "
            "bias and gate, and on a GPU its norm in subln, rotation and gradients of queries, keys "
            "and values. "
            "Weights fit all."
        ),
    )
    compile: bool = Field(
        False,
        description=(
            "Compile with torch.compile, once for all layers: "
            "whole layers of PyTorch's kernels, or the residual joins between Transformer Engine's. "
            "Without context parallelism, zero below 3. Dropout then draws other masks."
        ),
    )
    cuda_graph: bool = Field(
        False,
        description=(
            "Launch forward and backward of a step at once, as a CUDA graph; "
            "without context parallelism, ZeRO-3, or recomputation of what drops."
        ),
    )
    gradient_accumulation_fusion: bool = Field(
        False,
        description=(
            "The product that is a weight's gradient adds it to the sum over micro-batches itself; "
            "with joined kernels the passes that sum gradients of biases and norms do so too. "
            "Without ZeRO-3 and compiled layers; in bf16 it needs a GPU. Rounds in another order."
        ),
    )
    residual_in_product: bool = Field(
        False,
        description=(
            "The last product of a branch adds to the residual itself, and has the branch's factor; "
            "with kernels=local, where nothing stands between the product and the join. "
            "Rounds in another order."
        ),
    )
    activation_in_product: bool = Field(
        False,
        description=(
            "The first product of a feed-forward gives its activation too, and the product that is the "
            "gradient of what the second one read goes through it; with kernels=local_joined, on a GPU. "
            "Rounds in another order."
        ),
    )
    fp8: Fp8Config = Field(default_factory=Fp8Config, description="FP8 matrix products.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of each label that is spread evenly over the vocabulary in training. "
        "Losses are logged without it.",
    )
    z_loss: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Factor on log(Z)^2 beside the loss of each label, Z the sum of exp(logits), which keeps "
        "logits near log probabilities (PaLM: 1e-4). Losses are logged without it.",
    )
    loss_chunk: int | None = Field(
        None,
        ge=1,
        le=SAMPLES,
        description="Positions of each sequence whose logits exist at once; null: all. "
        "Saves memory where the vocabulary is large, and computes the logits twice.",
    )
    loss_kernel: LossKernelName = Field(
        "local",
        description="What computes the output projection and the loss of training. "
        "local: the logits, then the loss of them, as `loss_chunk` says; the others take both together, "
        "some positions at a time. torch: PyTorch's (2.13 and up), in fp32; liger: Liger-Kernel's, on GPUs. "
        "Without tensor parallelism, CUDA graphs, zero below 3.",
    )
    seed: int = Field(1234, ge=0, lt=2**63, description="Seed of weights, data order and dropout.")
    eval_interval: int = Field(
        0,
        ge=0,
        le=STEPS,
        description="Steps between evaluations on the validation split; 0: only at the end.",
    )
    eval_samples: int = Field(
        64, ge=0, le=SAMPLES, description="Validation samples per evaluation; 0 turns evaluation off."
    )
    nan_guard: Literal["stop", "skip"] = Field(
        "stop", description="A non-finite loss or gradient: stop the run, or skip that step and count it."
    )
    skip_limit: int | None = Field(
        None,
        ge=1,
        le=STEPS,
        description="Steps in a row that nan_guard=skip leaves out before it stops the run too; "
        "read with nan_guard=skip only, where null means 10.",
    )

    spikes: SpikeConfig = Field(default_factory=SpikeConfig, description="Steps that would harm.")

    @field_validator("precision", mode="before")
    @classmethod
    def _check_precision(cls, value: object) -> object:
        if value in ("fp16", "float16", "half"):
            raise ValueError(
                f"train.precision={value} needs loss scaling, which Fathom does not do: "
                "set train.precision=bf16, or fp32 on GPUs without bf16"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.stop_at_step is not None and self.stop_at_step > self.steps:
            raise ValueError(
                f"train.stop_at_step={self.stop_at_step} has no effect with "
                f"train.steps={self.steps}: remove it or set a smaller one"
            )
        if self.fp32_residual and self.precision == "fp32":
            raise ValueError(
                "train.fp32_residual=true has no effect with train.precision=fp32, "
                "where the whole model is in fp32: set it to false"
            )
        if self.skip_limit is not None and self.nan_guard != "skip":
            raise ValueError(
                f"train.skip_limit={self.skip_limit} has no effect with train.nan_guard={self.nan_guard}: "
                "remove it or set train.nan_guard=skip"
            )
        if self.spikes.sigma is not None and self.spikes.window // 2 >= self.steps:
            raise ValueError(
                f"train.spikes.window={self.spikes.window} has no effect with train.steps={self.steps}: "
                "half a window of steps has to come first; give a smaller one or remove train.spikes"
            )
        if self.fp8.recipe != "none" and self.kernels.startswith("local"):
            raise ValueError(
                f"train.fp8.recipe={self.fp8.recipe} needs Transformer Engine's kernels: "
                "set train.kernels=te or train.fp8.recipe=none"
            )
        self.fp8.check_weights(self.precision)
        return self


class RunConfig(Strict):
    """Everything that defines a run."""

    name: str = Field(
        max_length=NAME,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the run; its folder is `runs_dir`/`name`.",
    )
    runs_dir: FilePath = Field("runs", description="Parent of run folders.")
    model: ModelConfig
    data: DataConfig
    masking: Masking = Field(
        default_factory=Masking, description="What is to be predicted, where train.task hides tokens."
    )
    spans: Spans = Field(
        default_factory=Spans, description="What is hidden, where train.task hides parts of a text."
    )
    augment: Augment = Field(
        default_factory=Augment, description="Changes of training images, where train.task reads images."
    )
    spec_augment: SpecAugment = Field(
        default_factory=SpecAugment,
        description="What is hidden of training recordings, where train.task reads recordings.",
    )
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    log: LogConfig = Field(default_factory=LogConfig)

    @property
    def task(self) -> Task:
        """What is trained for."""
        return task_of(self.train.task, self.model.family)

    @property
    def batch_sizes(self) -> Growth:
        """Samples of every step."""
        return batch_growth(self.schedule.batch_rampup, self.train.global_batch_size)

    @property
    def seq_lengths(self) -> Growth:
        """Tokens of a sequence in every step; a sample has as many as ever."""
        return length_growth(self.schedule.seq_length_warmup, self.data.seq_length)

    @property
    def hides_documents(self) -> bool:
        """Whether documents that share a sample do not see each other, in one stack."""
        return self.data.document_mask or "masking" in self.task.sections

    @property
    def target_share(self) -> float:
        """Share of a sample's positions that have labels."""
        if self.model.image is not None:
            return 1 / self.model.image.tokens
        return self.masking.rate if "masking" in self.task.sections else 1.0

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_task(self)
        check_spans(self)
        check_documents(self)
        check_growth(self)
        check_optimizer(self.optimizer.kind, self.parallel)
        check_schedule(self)
        check_transfer(self)
        check_window(self)
        check_loss_chunk(self)
        check_loss_kernel(self)
        check_factors(
            self.optimizer.factors,
            self.model,
            optimizer=self.optimizer.kind,
            decay_embeddings=self.optimizer.decay_embeddings,
        )
        check_joined(self)
        check_fused_products(self)
        if self.train.compile:
            check_compile(self)
        if self.train.cuda_graph:
            check_cuda_graph(self)
        return self
