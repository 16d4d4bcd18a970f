"""Options of a run that exclude each other, whatever the machine.

They are refused while the configuration is read, before any process starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.config import ModelConfig
from model.loss_kernels import INSTEAD, LOSS_KERNELS, LossKernelName
from model.words import written
from parallel.config import ParallelConfig
from parallel.optimizers import OPTIMIZERS, OptimizerName
from pretrain.config.sections.spans import span_counts
from pretrain.tasks.table import OWN_SECTIONS, task_of

if TYPE_CHECKING:
    from pretrain.config.schema import RunConfig

SELDOM = 10
"""Steps between full measurements of signals from which a CUDA graph is worth its captures."""


def check_optimizer(kind: OptimizerName, parallel: ParallelConfig) -> None:
    """Raises ValueError for a layout that an optimizer has no form for."""
    optimizer = OPTIMIZERS[kind]
    if parallel.zero in optimizer.no_zero:
        possible = next(stage for stage in (1, 0, 2, 3) if stage not in optimizer.no_zero)
        raise ValueError(
            f"optimizer.kind={kind} does not combine with parallel.zero={parallel.zero}: "
            f"{optimizer.no_zero[parallel.zero]}; set parallel.zero={possible} or optimizer.kind=adamw"
        )
    if parallel.offload.optimizer and optimizer.no_offload:
        raise ValueError(
            f"optimizer.kind={kind} {optimizer.no_offload}: "
            "set parallel.offload.optimizer=false or optimizer.kind=adamw"
        )


def check_documents(config: RunConfig) -> None:
    """Raises ValueError where `data.document_mask=true` has no effect, or no form yet."""
    if not config.data.document_mask:
        return
    task = task_of(config.train.task, config.model.family)
    if task.samples != "next_token":
        raise ValueError(
            f"data.document_mask=true has no effect with train.task={task.name}, "
            "whose samples say themselves what sees what: remove it"
        )
    if config.train.cuda_graph:
        raise ValueError(
            "data.document_mask=true does not combine with train.cuda_graph=true yet: "
            "set train.cuda_graph=false"
        )


def check_growth(config: RunConfig) -> None:
    """Raises ValueError for what grows and cannot: stages, or what they do not combine with."""
    sizes, lengths = config.batch_sizes, config.seq_lengths
    graph, steps = config.train.cuda_graph, config.train.steps
    for name, growth in (("batch_rampup", sizes), ("seq_length_warmup", lengths)):
        if growth.grows and growth.steps >= steps:
            raise ValueError(
                f"schedule.{name}.steps={growth.steps} do not end within train.steps={steps}: give fewer"
            )
        if growth.grows and graph:
            raise ValueError(
                f"train.cuda_graph=true does not combine with schedule.{name}.start={growth.values[0]}: "
                "a graph has steps of one form; set it to false"
            )
    if not lengths.grows:
        return
    first = f"schedule.seq_length_warmup.start={lengths.values[0]}"
    if config.task.samples != "next_token":
        raise ValueError(
            f"{first} does not combine with train.task={config.task.name}, whose samples are no windows "
            "of a stream: remove it"
        )
    if config.train.compile:
        raise ValueError(
            f"train.compile=true does not combine with {first}, by which layers would be compiled for each "
            "length: set it to false"
        )


def check_transfer(config: RunConfig) -> None:
    """Raises ValueError for an optimizer whose rates `model.transfer` does not know."""
    method, kind = config.model.transfer.method, config.optimizer.kind
    if method != "none" and not OPTIMIZERS[kind].transfers:
        raise ValueError(
            f"model.transfer.method={method} does not combine with optimizer.kind={kind}: "
            "its rates are AdamW's; set one of them to its default"
        )


def check_window(config: RunConfig) -> None:
    """Raises ValueError for a window that hides nothing from a sequence."""
    window, length = config.model.window, config.data.seq_length
    if window is not None and window >= length - 1:
        raise ValueError(
            f"model.window={window} has no effect with data.seq_length={length}: "
            f"remove it, or give a number below {length - 1}"
        )


def check_loss_chunk(config: RunConfig) -> None:
    """Raises ValueError for chunks of the loss that are no part of a sequence's labels."""
    chunk, labels = config.train.loss_chunk, round(config.target_share * config.data.seq_length)
    own = labels // config.parallel.context
    if chunk is not None and chunk >= own:
        raise ValueError(
            f"train.loss_chunk={chunk} has no effect with the {own} labels of a sample on a rank: "
            "remove it, or give a smaller number"
        )


def check_loss_kernel(config: RunConfig) -> None:
    """Checks what a library's kernel for the projection and the loss combines with.

    Raises ValueError, naming the first setting that it does not combine with.
    """
    name, parallel = config.train.loss_kernel, config.parallel
    kernel = LOSS_KERNELS[name]
    if not kernel.fused:
        return
    if config.model.image is not None:
        raise ValueError(
            f"train.loss_kernel={name} has no effect with model.family={config.model.family}, "
            "which has one label for many tokens: remove it"
        )
    check_whole_projection(name, parallel)
    if config.train.cuda_graph:
        raise ValueError(
            f"train.loss_kernel={name} does not combine with train.cuda_graph=true, "
            f"as it has not been shown to run in a graph: set train.cuda_graph=false, or {INSTEAD}"
        )
    for key in kernel.lacks:
        section, field = key.split(".")
        value = getattr(getattr(config, section), field)
        if value:
            raise ValueError(f"train.loss_kernel={name} has no form for {key}={value:g}: {INSTEAD}")
    if kernel.own_chunks and config.train.loss_chunk is not None:
        raise ValueError(
            f"train.loss_chunk={config.train.loss_chunk} has no effect with train.loss_kernel={name}, "
            "which decides itself how many logits it makes at once: remove one of them"
        )


def check_whole_projection(name: LossKernelName, parallel: ParallelConfig) -> None:
    """Raises ValueError for a layout that hides the output projection from a library's kernel."""
    if not LOSS_KERNELS[name].fused:
        return
    if parallel.tensor > 1:
        raise ValueError(
            f"train.loss_kernel={name} does not combine with parallel.tensor={parallel.tensor}, "
            f"which has only a part of the vocabulary on each rank: {INSTEAD}"
        )
    if parallel.zero == 3:
        raise ValueError(
            f"train.loss_kernel={name} does not combine with parallel.zero=3, which fetches the projection "
            f"in a hook that it goes past: set parallel.zero=2, or {INSTEAD}"
        )


def check_compile(config: RunConfig) -> None:
    """Checks what `train.compile=true` combines with.

    Raises ValueError, naming the first setting that it does not combine with.
    """
    _without_context("train.compile", config.parallel)
    _without_zero_3("train.compile", config.parallel)
    if config.train.kernels == "local":
        check_streams(config)


def check_joined(config: RunConfig) -> None:
    """Checks what kernels for joins together with norms combine with.

    Raises ValueError, naming the first setting that they do not combine with.
    """
    kernels = config.train.kernels
    if not kernels.endswith("_joined"):
        return
    apart = kernels.removesuffix("_joined")
    if config.train.compile:
        raise ValueError(
            f"train.compile=true does not combine with train.kernels={kernels}, which has joins and norms "
            f"compiled already: set train.compile=false or train.kernels={apart}"
        )
    if config.parallel.zero == 3:
        raise ValueError(
            f"train.kernels={kernels} does not combine with parallel.zero=3, which has the norm of the next "
            f"layer elsewhere while a layer ends: set parallel.zero=2 or train.kernels={apart}"
        )


def check_fused_products(config: RunConfig) -> None:
    """Checks what products that add onto something combine with.

    Raises ValueError, naming the first setting that they do not combine with, or without effect.
    """
    train = config.train
    if train.gradient_accumulation_fusion:
        _without_zero_3("train.gradient_accumulation_fusion", config.parallel)
        if train.compile and not train.kernels.startswith("te"):
            raise ValueError(
                "train.gradient_accumulation_fusion=true does not combine with train.compile=true, whose "
                "compiled products add to nothing: set one of them to false, "
                "or train.kernels=te, which has joins compiled only"
            )
    if train.residual_in_product:
        _without_zero_3("train.residual_in_product", config.parallel)
        _check_residual(config)
    if train.activation_in_product:
        _check_activation(config)


def _check_residual(config: RunConfig) -> None:
    """Raises ValueError where something stands between the product and the join in every layer."""
    train, model = config.train, config.model
    _needs(
        "train.residual_in_product",
        ("train.kernels", train.kernels, "local"),
        ("train.compile", train.compile, False),
        ("train.fp32_residual", train.fp32_residual, False),
        ("parallel.tensor", config.parallel.tensor, 1),
        ("model.bias", model.bias, False),
        ("model.hidden_dropout", model.hidden_dropout, 0.0),
    )
    layers = [place.folded for place in model.placed_layers()]
    if not any(layer.attention.adds_product or layer.mlp.adds_product for layer in layers):
        raise ValueError(
            f"train.residual_in_product=true has no effect with model.scheme={model.scheme}, in which no "
            "branch ends in a product: set it to false"
        )


def _check_activation(config: RunConfig) -> None:
    """Raises ValueError where no feed-forward's activation can be inside of its products."""
    option, model = "train.activation_in_product", config.model
    _needs(
        option,
        ("train.kernels", config.train.kernels, "local_joined"),
        ("parallel.tensor", config.parallel.tensor, 1),
    )
    if all(place.plan.mlp.norm_last for place in model.placed_layers()):
        raise ValueError(
            f"{option}=true has no effect with model.scheme={model.scheme}, in which a norm stands between "
            "the activation and the second product: set it to false"
        )


def _needs(option: str, *settings: tuple[str, object, object]) -> None:
    """Raises ValueError where an option would have no effect.

    settings: key, value and the value that the option needs.
    """
    for key, given, needed in settings:
        if given != needed:
            raise ValueError(
                f"{option}=true has no effect with {key}={written(given)}: "
                f"set {key}={written(needed)}, or {option}=false"
            )


def check_streams(config: RunConfig) -> None:
    """Raises ValueError for compiled layers that would have to draw from two random streams.

    Layers of PyTorch's kernels: where each tensor-parallel rank has its own heads and all have the
    whole residual stream, masks of attention differ between ranks and the others do not.
    """
    tensor, model = config.parallel.tensor, config.model
    if tensor > 1 and not config.parallel.sequence_parallel and model.attention_dropout > 0:
        raise ValueError(
            f"train.compile=true with parallel.tensor={tensor} and "
            f"model.attention_dropout={model.attention_dropout:g} would drop alike on all ranks, "
            "for compiled layers draw from one stream: set parallel.sequence_parallel=true, "
            "or model.attention_dropout=0"
        )


def check_cuda_graph(config: RunConfig) -> None:
    """Checks what `train.cuda_graph=true` combines with.

    Raises ValueError, naming the first setting that it does not combine with.
    """
    check_graph(config.model, config.parallel, config.train.fp8.recipe)
    if 0 < config.log.signal_interval < SELDOM:
        raise ValueError(
            f"train.cuda_graph=true with log.signal_interval={config.log.signal_interval}: "
            "measured steps run without the graph and the next one captures again, "
            f"which costs more than it saves: set log.signal_interval={SELDOM} or more, or 0"
        )


def check_graph(model: ModelConfig, parallel: ParallelConfig, recipe: str) -> None:
    """Raises ValueError for a layout whose passes no CUDA graph can launch.

    recipe: `train.fp8.recipe`.
    """
    _without_second_masks(model, parallel, recipe)
    _without_context("train.cuda_graph", parallel)
    _without_zero_3("train.cuda_graph", parallel)


def _without_second_masks(model: ModelConfig, parallel: ParallelConfig, recipe: str) -> None:
    """Raises ValueError for passes in a graph that would have to go back in a random stream.

    Recomputation draws the masks of a pass again. Streams of a graph only go on.
    """
    granularity = parallel.recompute.granularity
    recomputed: dict[str, tuple[str, ...]] = {
        "none": (),
        "selective": ("attention_dropout",),
        "full": ("hidden_dropout", "attention_dropout"),
    }
    for name in recomputed[granularity]:
        if getattr(model, name) > 0:
            raise ValueError(
                f"train.cuda_graph=true with parallel.recompute.granularity={granularity} and "
                f"model.{name}={getattr(model, name):g} would compute again with other masks, "
                "for random streams of a graph do not go back: set parallel.recompute.granularity=none, "
                f"or model.{name}=0"
            )
    if granularity == "full" and recipe != "none":
        raise ValueError(
            "train.cuda_graph=true with parallel.recompute.granularity=full and "
            f"train.fp8.recipe={recipe}: Transformer Engine's recomputation has not been "
            "shown to run in a graph: set parallel.recompute.granularity=none"
        )


def _without_context(option: str, parallel: ParallelConfig) -> None:
    if parallel.context > 1:
        raise ValueError(
            f"{option}=true does not combine with parallel.context={parallel.context}, "
            f"whose keys and values are exchanged inside the layers: set {option}=false"
        )


def _without_zero_3(option: str, parallel: ParallelConfig) -> None:
    if parallel.zero == 3:
        raise ValueError(
            f"{option}=true does not combine with parallel.zero=3, "
            "which fetches weights in hooks of the layers: set parallel.zero=1"
        )


def check_schedule(config: RunConfig) -> None:
    """Raises ValueError for a final decay that would begin before the warm-up has ended."""
    schedule, steps = config.schedule, config.train.steps
    if schedule.decay_steps is None or schedule.warmup_steps + schedule.decay_steps <= steps:
        return
    left = steps - schedule.warmup_steps
    advice = f"set schedule.decay_steps={left} or less" if left > 0 else "set fewer schedule.warmup_steps"
    raise ValueError(
        f"schedule.decay_steps={schedule.decay_steps} and schedule.warmup_steps={schedule.warmup_steps} "
        f"do not fit into train.steps={steps}: {advice}; train.stop_at_step ends a run early"
    )


def check_task(config: RunConfig) -> None:
    """Raises ValueError for a task that the model cannot learn, or settings that it leaves."""
    task = task_of(config.train.task, config.model.family)
    family, source = config.model.family, config.data.source_length
    if config.model.blueprint.crossed and source is None:
        raise ValueError(f"model.family={family} needs data.source_length, the tokens that its encoder reads")
    if not config.model.blueprint.crossed and source is not None:
        raise ValueError(
            f"data.source_length={source} has no effect with model.family={family}, "
            "which has no encoder under a decoder: remove it"
        )
    if config.model.blueprint.crossed and config.schedule.branch.steps is not None:
        raise ValueError(
            f"schedule.branch.steps={config.schedule.branch.steps} has no rule for two stacks and does not "
            f"combine with model.family={family}: set it to null"
        )
    image = config.model.image
    if image is not None and config.data.seq_length != image.tokens:
        raise ValueError(
            f"data.seq_length={config.data.seq_length} is not the {image.tokens} tokens of model.image: "
            f"set data.seq_length={image.tokens}"
        )
    for name in OWN_SECTIONS:
        section = getattr(config, name)
        if name not in task.sections and section != type(section)():
            raise ValueError(f"{name} has no effect with train.task={task.name}: remove the section")


def check_spans(config: RunConfig) -> None:
    """Raises ValueError for sequences in which no span of a text can be hidden."""
    source = config.data.source_length
    if "spans" in config.task.sections and source is not None:
        span_counts(config.spans, source, config.data.seq_length)
