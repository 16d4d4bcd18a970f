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
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.placed import PlacedLayer
from model.depth.scheme import CROSS, LAYER_ROLES, WeightRole
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
from parallel.checkpoint.reader import CheckpointReader
from parallel.topology import Topology
from pretrain.probe.sublayers import Sums, common_share, mean_square, watch
from pretrain.tasks.task import Batch, Task
from pretrain.train.build import build_chunks, seed_everything
from pretrain.train.callbacks.signal import streams
from pretrain.train.callbacks.signal.forgetting import gain_of, implied
from pretrain.train.steps import on_device, shared, training_step


@dataclass(frozen=True)
class LayerProbe:
    """One layer, over all seeds.

    Means of gradients over seeds are geometric.
    Fields in `_theory` hold the prediction, None where there is none.
    """

    layer: int
    """From 1, in its stack."""
    forward_variance: float
    """torch.var of the stream after the layer, mean over seeds."""
    forward_variance_min: float
    """The lowest over seeds."""
    forward_variance_max: float
    """The highest over seeds."""
    token_correlation: float
    """Mean product of two different tokens' vectors of that stream over their mean square."""
    grad_variance: float
    """Mean square of the loss gradient at the stream entering the layer.

    Relative to that of the last layer of its stack, geometric mean over seeds.
    """
    grad_variance_late: float
    """The same of the positions in the second half of the sequence only."""
    grad_variance_late_min: float
    """The lowest over seeds."""
    grad_variance_late_max: float
    """The highest over seeds."""
    log10_grad_variance: float
    """Decimal logarithm of `grad_variance`, which does not underflow."""
    log10_grad_variance_late: float
    """Decimal logarithm of `grad_variance_late`, which does not underflow."""
    weight_grad_norm: float
    """Frobenius norm of the gradients of all matrices of the layer, geometric mean over seeds."""
    weight_grad_norms: dict[str, float]
    """The same by kind of matrix: q, k, v, o, fc1, fc2, and of cross-attention cq, ck, cv, co."""
    common_share: float
    """Part of that stream's power that all tokens of the batch have in common, mean over seeds."""
    branch_ratio_attention: float
    """Root mean square of what attention adds over that of what it is added to, mean over seeds."""
    branch_ratio_mlp: float
    """The same of the feed-forward."""
    forgetting: float
    """ln of the gradient entering the layer over that leaving its stack's last, as norms imply it.

    The law of `model/theory/forgetting.py` for the measured sizes, mean over seeds.
    """
    stack: str
    """The name of its stack."""
    branch_ratio_cross: float | None = None
    """The same of cross-attention; None in a layer without."""
    branch_ratio_cross_theory: float | None = None
    forward_variance_theory: float | None = None
    token_correlation_theory: float | None = None
    grad_variance_late_theory: float | None = None


@dataclass(frozen=True)
class Probe:
    """A measured model."""

    scheme: str
    """Its name."""
    label: str
    """Its name with options."""
    num_layers: int
    """Of all stacks."""
    seeds: int
    layers: tuple[LayerProbe, ...]
    model: ModelConfig
    seq_length: int
    batch: int
    dtype: str
    tokens: str
    """Where the tokens are from, in words."""
    parameters: int
    loss: float
    """Nats per token, mean over seeds."""
    embedding_variance: float
    """Of the stream entering layer 1."""
    smallest_gradient_log10: float
    """Decimal logarithm of the smallest root mean square of the late gradient itself.

    The smallest over layers and seeds.
    """
    smallest_by_stack: dict[str, float] = field(default_factory=dict)
    """The same of each stack."""
    reader_weight_grad: float | None = None
    """`weight_grad_norm` of the decoder's last layer, in a model that has an encoder."""
    gradient_limits: tuple[float, float] | None = None
    """Of an encoder under a decoder: what its gradient is between in theory.

    At its first layer relative to its last, where tokens have independent ones, and all the same.
    """
    source_length: int | None = None
    """Tokens of a sequence of an encoder under a decoder."""
    checkpoint: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def values(self, key: str) -> list[float]:
        """One measurement of all layers, first to last; nan where there is none."""
        found = [getattr(layer, key) for layer in self.layers]
        return [math.nan if value is None else float(value) for value in found]


@dataclass
class _Sample:
    """One layer in one pass."""

    variance: float = math.nan
    correlation: float = math.nan
    log_gradient: float = -math.inf
    """Natural logarithm of the mean square gradient of the stream entering the layer."""
    log_late: float = -math.inf
    """The same over the second half of the positions."""
    squares: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ROLES, 0.0))
    common: float = math.nan
    """Share of the stream's power that all tokens have in common."""
    sums: Sums = field(default_factory=dict)
    """Mean squares at the sublayers, and of the gains of the norms in the stream."""

    def branch_ratio(self, part: str) -> float:
        """Size of a branch over that of what it is added to; nan where that is 0."""
        base = self.sums[f"{part}_residual"]
        return math.sqrt(self.sums[f"{part}_branch"] / base) if base > 0 else math.nan


ROLES: tuple[WeightRole, ...] = (*LAYER_ROLES, *CROSS.values())


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


def coincidence(tokens: Tensor) -> float:
    """Chance that two different places of a sequence hold the same token.

    It is the word table's token correlation on these tokens.

    tokens: [batch, length].
    """
    length = tokens.shape[1]
    same = sum(float((torch.bincount(row).double() ** 2).sum()) - length for row in tokens)
    return same / (tokens.shape[0] * length * (length - 1))


def token_correlation(x_sbh: Tensor) -> float:
    """Mean product of different tokens' vectors over the mean square of one's, within sequences.

    x: [s, b, h].
    0 for a stream of zeros.
    """
    x = x_sbh.detach().double()
    own = float(x.square().sum())
    pairs = float(x.sum(0).square().sum()) - own
    return pairs / (x.shape[0] - 1) / own if own and x.shape[0] > 1 else 0.0


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

    def __init__(self, chunk: LanguageModel, model: ModelConfig) -> None:
        self.chunk, self.model = chunk, model
        self.samples = [_Sample() for _ in range(model.total_layers)]
        self.embedding_variance = math.nan
        self.handles: list[Any] = []

    def __enter__(self) -> Meter:
        for sample, layer in zip(self.samples, self.chunk.decoder.layers, strict=True):
            entering = self._entering(sample, layer)
            self.handles.append(layer.register_forward_pre_hook(entering, with_kwargs=True))
            self.handles.append(layer.register_forward_hook(self._leaving(sample, layer)))
            self.handles += watch(layer, sample.sums)
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

    def _entering(self, sample: _Sample, layer: DepthLayer) -> Callable[..., None]:
        log_square = 2 * math.log(layer.plan.entering)

        def on_gradient(gradient_sbh: Tensor) -> None:
            sample.log_gradient = log_mean_square(gradient_sbh) - log_square
            # The loss reaches early positions through many later ones.
            # In a causal stack they hide how the others fade.
            sample.log_late = log_mean_square(gradient_sbh[gradient_sbh.shape[0] // 2 :]) - log_square

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream, rows = streams.entering(layer, args, kwargs)
            if sample is self.samples[0]:
                self.embedding_variance = float(stream[rows].detach().double().var())
            stream.register_hook(lambda gradient: on_gradient(gradient[rows]))

        return hook

    def _leaving(self, sample: _Sample, layer: DepthLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, Any]) -> None:
            stream = streams.leaving(layer, output)
            sample.variance = float(stream.detach().double().var()) * layer.plan.leaving**2
            sample.correlation = token_correlation(stream)
            sample.common = common_share(stream)

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


def measure(chunk: LanguageModel, model: ModelConfig, task: Task, batch: Batch) -> tuple[Meter, float]:
    """One training pass over a micro-batch of a task.

    Returns the filled meter and the loss in nats per label.
    """
    weights = batch.get("weights")
    labels = None if weights is None else int(weights.sum())
    with Meter(chunk, model) as meter:
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
    runs: list[list[_Sample]] = []
    losses, entering, coincidences, batch = [], [], [], 0
    for seed in seeds:
        seed_everything(seed, topology)
        (chunk,) = build_chunks(
            model,
            topology,
            seq_length=seq_length,
            source_length=source_length,
            dtype=dtype,
            seed=seed,
            log_p_v=log_p_v,
            fp32_residual_connection=fp32_residual,
        )
        chunk.to(dtype)  # as DeepSpeed does in training: Megatron-core makes a table in fp32
        if checkpoint is not None:
            load_weights(chunk, checkpoint)
        chunk.train()
        given = batches(seed)
        meter, loss = measure(chunk, model, task, on_device(given, next(chunk.parameters()).device))
        del chunk
        runs.append(meter.samples)
        losses.append(loss)
        entering.append(meter.embedding_variance)
        coincidences.append([coincidence(given[key]) for key in ("source", "tokens") if key in given])
        batch = len(given["tokens"])
    # Those of the tokens, which need not be what the weights were planned for.
    equal = [sum(values) / len(values) for values in zip(*coincidences, strict=True)]
    theory, limits = None, None
    if checkpoint is None:
        predicted = partial(
            predict,
            model,
            seq_length,
            source_length=source_length,
            coincidence=equal,
            log_p_v=log_p_v,
        )
        theory = predicted()
        if source_length is not None:
            limits = (theory[0].grad_variance_late, predicted(one_gradient=True)[0].grad_variance_late)
    layers = tuple(_layers(model, runs, theory))
    smallest: dict[str, float] = {}
    for index, place in enumerate(model.placed_layers()):
        least = min(run[index].log_late for run in runs) / 2 / math.log(10)
        smallest[place.stack.name] = min(least, smallest.get(place.stack.name, math.inf))
    return Probe(
        scheme=model.scheme,
        label=label or model.scheme,
        num_layers=model.total_layers,
        seeds=len(seeds),
        layers=layers,
        model=model,
        seq_length=seq_length,
        batch=batch,
        dtype=str(dtype).removeprefix("torch.") + (", fp32 residual" if fp32_residual else ""),
        tokens=source,
        parameters=parameter_count(model)["total"],
        loss=sum(losses) / len(losses),
        embedding_variance=sum(entering) / len(entering),
        smallest_gradient_log10=min(smallest.values()),
        smallest_by_stack=smallest,
        reader_weight_grad=layers[-1].weight_grad_norm if model.blueprint.crossed else None,
        gradient_limits=limits,
        source_length=source_length,
        checkpoint=None if checkpoint is None else str(checkpoint.folder),
        options={**SCHEMES[model.scheme].options, **model.scheme_options},
    )


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


def _layers(
    model: ModelConfig, runs: list[list[_Sample]], theory: list[LayerSignal] | None
) -> list[LayerProbe]:
    layers = []
    forgotten = [implied(model, [sample.sums for sample in run]) for run in runs]
    for index, place in enumerate(model.placed_layers()):
        samples = [run[index] for run in runs]
        top = index - place.index + place.depth - 1
        variances = [sample.variance for sample in samples]
        lates = [_difference(run[index].log_late, run[top].log_late) for run in runs]
        late, everywhere = (
            _mean(lates),
            _mean([_difference(run[index].log_gradient, run[top].log_gradient) for run in runs]),
        )
        predicted = None if theory is None else theory[index]
        layers.append(
            LayerProbe(
                layer=place.index + 1,
                stack=place.stack.name,
                forward_variance=_mean(variances),
                forward_variance_min=min(variances),
                forward_variance_max=max(variances),
                token_correlation=_mean([sample.correlation for sample in samples]),
                grad_variance=_exp(everywhere),
                grad_variance_late=_exp(late),
                grad_variance_late_min=_exp(min(lates)),
                grad_variance_late_max=_exp(max(lates)),
                log10_grad_variance=everywhere / math.log(10),
                log10_grad_variance_late=late / math.log(10),
                weight_grad_norm=_exp(_mean([_log(sum(sample.squares.values())) / 2 for sample in samples])),
                weight_grad_norms={
                    kind: _exp(_mean([_log(sample.squares[kind]) / 2 for sample in samples]))
                    for kind in (ROLES if place.stack.cross else LAYER_ROLES)
                },
                common_share=_mean([sample.common for sample in samples]),
                branch_ratio_attention=_mean([sample.branch_ratio("attention") for sample in samples]),
                branch_ratio_mlp=_mean([sample.branch_ratio("mlp") for sample in samples]),
                branch_ratio_cross=_mean([sample.branch_ratio("cross") for sample in samples])
                if place.stack.cross
                else None,
                branch_ratio_cross_theory=None if predicted is None else predicted.cross_ratio,
                forgetting=_mean([logs[index] for logs in forgotten]),
                forward_variance_theory=None if predicted is None else predicted.forward_variance,
                token_correlation_theory=None if predicted is None else predicted.token_correlation,
                grad_variance_late_theory=_own_gradient(model, place, predicted),
            )
        )
    return layers


def _own_gradient(model: ModelConfig, place: PlacedLayer, predicted: LayerSignal | None) -> float | None:
    """The gradient predicted; None where a decoder's tokens send an encoder nearly the same."""
    if predicted is None or place.stack is not model.blueprint.stacks[-1]:
        return None
    return predicted.grad_variance_late


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _difference(a: float, b: float) -> float:
    return math.nan if math.isinf(b) else a - b


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan


def _exp(value: float) -> float:
    return math.nan if math.isnan(value) else math.exp(value) if value < 700 else math.inf
