"""Signal propagation of a real model, measured layer by layer, beside what theory predicts.

Each seed takes one forward and one backward pass of the loss of the run's task.
The theory's prediction is made for the same tokens, as the model sees them.

Statistics are taken while the passes run: hooks look at the stream and at its gradient.
Each layer's weight gradients are dropped as soon as their norms are known.
Layers compute in units of their own (`model/depth/folded.py`).
What is reported is the stream of the scheme's equation.
Sums are in float64 and gradient variances are kept as logarithms: a gradient that float32 still
holds is reported although its square would underflow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.scheme import CROSS
from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.layers.layer import DepthLayer
from model.network.language_model import LanguageModel
from model.parameters.names import named_parameters
from model.parameters.shards import take
from model.parameters.size import parameter_count
from model.parameters.table import Role, Row
from model.theory.propagation import LayerSignal
from model.weights.prediction import predict
from model.weights.unigram import last_bias_moments
from parallel.checkpoint.reader import CheckpointReader
from parallel.topology import Topology
from pretrain.data.images.statistics import patch_correlations
from pretrain.probe.means import means
from pretrain.probe.places import Places, places_of
from pretrain.probe.records import Probe, Sample
from pretrain.probe.sublayers import common_share, mean_square, watch
from pretrain.tasks.task import Batch, Task
from pretrain.train.build import build_chunks, seed_everything
from pretrain.train.callbacks.signal import streams
from pretrain.train.callbacks.signal.forgetting import gain_of
from pretrain.train.steps import on_device, shared, training_step


def zipf_tokens(vocab: int, batch: int, length: int, seed: int) -> Tensor:
    """Independent tokens with p_i ~ 1/i, [batch, length], int64."""
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, vocab + 1, dtype=torch.float64)
    return torch.multinomial(weights, batch * length, replacement=True, generator=generator).view(
        batch, length
    )


def zipf_log_frequencies(vocab: int) -> Tensor:
    """log p of the tokens that `zipf_tokens` draws, float64 [v]."""
    return torch.log_softmax(-torch.arange(1, vocab + 1, dtype=torch.float64).log(), 0)


def log_mean_square(x: Tensor) -> float:
    """Natural logarithm of the mean square, without underflow of squares.

    -inf for zeros, nan where a value is not finite.
    """
    peak = float(x.detach().abs().max())
    if peak == 0.0:
        return -math.inf
    return (
        2 * math.log(peak) + math.log(float((x.detach().double() / peak).square().mean()))
        if math.isfinite(peak)
        else math.nan
    )


class Meter:
    """Hooks on a model that fill `samples`, one a layer, during one forward and backward pass.

    A context manager.
    The model keeps no layer gradients.
    """

    def __init__(self, chunk: LanguageModel, model: ModelConfig, places: Sequence[Places]) -> None:
        """places: of each stack."""
        self.chunk, self.model = chunk, model
        own = dict(zip(model.blueprint.stacks, places, strict=True))
        self.places = [own[place.stack] for place in model.placed_layers()]
        self.samples = [Sample() for _ in range(model.total_layers)]
        self.embedding_variance = math.nan
        self.handles: list[Any] = []

    def __enter__(self) -> Meter:
        layers = self.chunk.decoder.layers
        for sample, layer, places in zip(self.samples, layers, self.places, strict=True):
            entering = self._entering(sample, layer, places)
            self.handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(_leaving(sample, layer, places)))
            self.handles += watch(layer, sample.sums, places.of)
        for named in named_parameters(self.chunk, 0, 1):
            gain = gain_of(named.row)
            if gain is not None and named.row.layer is not None:
                self.samples[named.row.layer].sums[gain] = mean_square(named.parameter)
            self.handles.append(named.parameter.register_post_accumulate_grad_hook(self._weight(named.row)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def _entering(self, sample: Sample, layer: DepthLayer, places: Places) -> Callable[..., None]:
        log_square = 2 * math.log(layer.plan.entering)

        def on_gradient(gradient_sbh: Tensor) -> None:
            sample.log_gradient = log_mean_square(places.of(gradient_sbh)) - log_square
            # The loss reaches early positions through many later ones.
            # In a causal stack they hide how the others fade.
            sample.log_late = log_mean_square(places.late(gradient_sbh)) - log_square

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, rows = streams.entering(layer, args, kwargs)
            if sample is self.samples[0]:
                self.embedding_variance = float(places.of(stream[rows]).detach().double().var())
            stream.register_hook(lambda gradient: on_gradient(gradient[rows]))

        return hook

    def _weight(self, row: Row) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or row.layer is None or row.blocks is None or row.role is Role.LINEAR_BIAS:
                return
            squares = self.samples[row.layer].squares
            for role, part in row.blocks.by_role(gradient).items():
                own = CROSS[role] if row.sublayer == "cross" else role
                squares[own] += float(part.double().square().sum())

        return hook


def _leaving(sample: Sample, layer: DepthLayer, places: Places) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
        stream = streams.leaving(layer, output)
        tokens = places.of(stream)
        sample.variance = float(tokens.detach().double().var()) * layer.plan.leaving**2
        sample.correlation = places.correlation(stream)
        sample.common = common_share(tokens)

    return hook


def measure(chunk: LanguageModel, model: ModelConfig, task: Task, batch: Batch) -> tuple[Meter, float]:
    """One training pass over a micro-batch of a task.

    Returns the filled meter and the loss in nats per label.
    """
    weights = batch.get("weights")
    labels = None if weights is None else round(float(weights.sum()))  # shares of mixtures add up to 1
    with Meter(chunk, model, places_of(model, batch)) as meter:
        output, loss_of = training_step(task)(iter(shared([batch], labels, 1)), chunk)
        loss, _ = loss_of(output)
        loss.backward()
    return meter, float(loss.detach())


def probe(
    model: ModelConfig,
    topology: Topology,
    *,
    seq_length: int,
    source_length: int | None = None,
    task: Task,
    batches: Callable[[int], Batch],
    seeds: Sequence[int],
    dtype: torch.dtype = torch.float32,
    fp32_residual: bool = False,
    source: str = "",
    label: str = "",
    checkpoint: CheckpointReader | None = None,
    log_p_v: Tensor | None = None,
) -> Probe:
    """Measures a model, freshly initialised once a seed, or with a checkpoint's weights.

    Dropout acts as in training.
    Theory is left out for a checkpoint: it speaks of initialisation.

    model: with vocab_size and max_position_embeddings.
    source_length: tokens that an encoder under a decoder reads.
    task: whose loss is taken; batches: from a seed to a micro-batch of it.
    dtype: of weights and activations, as in training.
    fp32_residual: `train.fp32_residual`.
    source: the tokens' origin in words.
    log_p_v: log frequencies of the tokens, for `model.init.unigram`.

    Raises UserError for a checkpoint of another model.
    """
    build = partial(
        _initial,
        model,
        topology,
        dtype,
        seq_length=seq_length,
        source_length=source_length,
        log_p_v=log_p_v,
        fp32_residual_connection=fp32_residual,
    )
    passes = _passes(build, model, task, batches, seeds, checkpoint)
    theory, limits, start = None, None, 0.0
    if checkpoint is None:
        # Those of the tokens, which need not be what the weights were planned for.
        equal = [mean(values) for values in zip(*passes.coincidences, strict=True)]
        seen = [_length(places) for places in zip(*passes.places, strict=True)]
        theory, limits = _predicted(model, (seq_length, source_length), equal, seen, log_p_v)
        start, _ = last_bias_moments(model, log_p_v)
    layers = tuple(means(model, passes.runs, theory))
    smallest = _smallest(model, passes.runs)
    return Probe(
        scheme=model.scheme,
        label=label or model.scheme,
        num_layers=model.total_layers,
        seeds=len(seeds),
        layers=layers,
        model=model,
        seq_length=seq_length,
        batch=passes.batch,
        dtype=str(dtype).removeprefix("torch.") + (", fp32 residual" if fp32_residual else ""),
        tokens=source,
        parameters=parameter_count(model)["total"],
        loss=mean(passes.losses),
        embedding_variance=mean(passes.entering),
        smallest_gradient_log10=min(smallest.values()),
        smallest_by_stack=smallest,
        reader_weight_grad=layers[-1].weight_grad_norm if model.blueprint.crossed else None,
        gradient_limits=limits,
        source_length=source_length,
        documents=mean(places[-1].texts_in_a_row for places in passes.places),
        checkpoint=None if checkpoint is None else str(checkpoint.folder),
        start_variance=start,
        options={**SCHEMES[model.scheme].options, **model.scheme_options},
    )


@dataclass
class _Passes:
    """What was measured, an entry a seed."""

    runs: list[list[Sample]]
    losses: list[float]
    entering: list[float]
    """Variance of the stream entering layer 1."""
    coincidences: list[list[float]]
    """Of the tokens of each stack."""
    places: list[list[Places]]
    """Where texts stand, of each stack."""
    batch: int = 0


def _passes(
    build: Callable[[int], LanguageModel],
    model: ModelConfig,
    task: Task,
    batches: Callable[[int], Batch],
    seeds: Sequence[int],
    checkpoint: CheckpointReader | None,
) -> _Passes:
    """A pass of every seed, or of a checkpoint's weights on every seed's tokens."""
    found = _Passes([], [], [], [], [])
    for seed in seeds:
        chunk = build(seed)
        if checkpoint is not None:
            load_weights(chunk, checkpoint)
        chunk.train()
        given = batches(seed)
        meter, loss = measure(chunk, model, task, on_device(given, next(chunk.parameters()).device))
        del chunk
        found.runs.append(meter.samples)
        found.losses.append(loss)
        found.entering.append(meter.embedding_variance)
        found.places.append(places_of(model, given))
        found.coincidences.append(coincidences(model, given, found.places[-1]))
        found.batch = len(given["labels"])
    return found


def coincidences(model: ModelConfig, batch: Batch, places: Sequence[Places]) -> list[float]:
    """Token correlation of what each stack's words, or patches, are made of, in a micro-batch.

    places: of each stack.
    """
    if model.image is not None:
        found = patch_correlations(batch["images"].double().numpy())
        return [model.image.both_patches * found.get(model.image.patch, 0.0)]
    *below, last = places
    own = [last.coincidence(batch["tokens"])]
    if model.speech is not None:
        return [model.speech.known_moments.correlation, *own]
    return [one.coincidence(batch["source"]) for one in below] + own


def _length(places: Sequence[Places]) -> int | None:
    """Tokens of a text of a stack, mean over seeds; None where a row is one."""
    lengths = [one.mean_length for one in places if one.mean_length is not None]
    return round(mean(lengths)) if lengths else None


def _initial(
    model: ModelConfig, topology: Topology, dtype: torch.dtype, seed: int, **given: Any
) -> LanguageModel:
    """A model as it starts from a seed. given: as `build_chunks`."""
    seed_everything(seed, topology)
    (chunk,) = build_chunks(model, topology, dtype=dtype, seed=seed, **given)
    return chunk.to(dtype)  # as DeepSpeed does in training: Megatron-core makes a table in fp32


def _predicted(
    model: ModelConfig,
    lengths: tuple[int, int | None],
    coincidences: list[float],
    seen: list[int | None],
    log_p_v: Tensor | None,
) -> tuple[list[LayerSignal], tuple[float, float] | None]:
    """What theory says of every layer, and `Probe.gradient_limits`.

    lengths: of a sequence and of its source. seen: tokens of a text, of each stack.
    """
    signals = partial(
        predict,
        model,
        lengths[0],
        source_length=lengths[1],
        coincidence=coincidences,
        seen=seen,
        log_p_v=log_p_v,
    )
    theory = signals()
    if lengths[1] is None:
        return theory, None
    same = signals(one_gradient=True)
    return theory, (theory[0].grad_variance_late, same[0].grad_variance_late)


def _smallest(model: ModelConfig, runs: list[list[Sample]]) -> dict[str, float]:
    """`Probe.smallest_gradient_log10` of each stack."""
    smallest: dict[str, float] = {}
    for index, place in enumerate(model.placed_layers()):
        least = min(run[index].log_late for run in runs) / 2 / math.log(10)
        smallest[place.stack.name] = min(least, smallest.get(place.stack.name, math.inf))
    return smallest


def load_weights(chunk: LanguageModel, reader: CheckpointReader) -> None:
    """Puts a checkpoint's master weights into a model.

    Raises UserError where a tensor is missing or has another shape.
    """
    with torch.no_grad():
        for named in named_parameters(chunk, 0, 1):
            value = take(reader.tensor(named.name), named.shard)
            if value.shape != named.parameter.shape:
                raise UserError(
                    f"{reader.folder}: {named.name} has shape {list(value.shape)}, "
                    f"the configured model needs {list(named.parameter.shape)}"
                )
            named.parameter.copy_(value)
