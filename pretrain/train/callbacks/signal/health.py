"""Signal health: what happens in every layer while training, and a warning where that changes.

Measured are every layer's stream, branches, gradient, attention logits and updates.
A warning is given when one of them leaves its own history.

There are two sets of measurements.
Cheap, at every logged step: the gradient norm of every layer, from the flat buffers, and the size
of the stream after a few layers. Their ends and extremes become `signal` in the step's own record.
Full, every `interval` steps, at the first and at the last: everything, layer by layer, as a
`signal` event.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import ModelConfig
from model.layers.layer import DepthLayer
from model.parameters.names import NamedParameter
from parallel.checkpoint.format import Fragment
from parallel.checkpoint.fragments import owned_fragments
from parallel.engine.engine import Engine
from pretrain.train.callbacks.base import Callback, RunView, StepRecord
from pretrain.train.callbacks.signal.forgetting import GAINS, ForgettingWatch, gain_of, implied
from pretrain.train.callbacks.signal.history import Departure, History, message
from pretrain.train.callbacks.signal.hooks import MEANS, LayerHooks
from pretrain.train.callbacks.spread import spread

SAMPLED_LAYERS = 8
"""Layers whose stream the cheap set looks at, evenly spread with the first and the last."""
SAMPLED_WEIGHTS = 1024
"""Elements of each matrix that stand for it in the update-to-weight ratio.

Enough for 2 % a layer, and no copy of the weights.
"""
EXACT = 1e-12
"""Norms below this are summed in float64.

Elements under 1e-19, whose squares fp32 does not hold, can be no part of a larger one that would
matter.
"""
GRADIENT, UPDATE, WEIGHT = "grad_square", "update_square", "weight_square"
COLUMNS = (*MEANS, *GAINS, GRADIENT, UPDATE, WEIGHT)
OWN_RULE = ("layer", "common_share", "forgetting")
"""Not compared with their history: a rule of their own speaks for them."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a group's flat partition that belongs to one layer."""

    layer: int
    """From 0."""
    group: int
    start: int
    stop: int


class SignalHealth(Callback):
    """Measures, and tells the other callbacks what it found.

    It comes before the callbacks that write a step's record, because it adds to it.
    Each of the two sets costs well under 1 % of the time of the steps that it is responsible for
    (docs/probe.md says how that was measured).

    interval: steps between full sets, 0 for none.
    reports: False on ranks whose callbacks write nothing.
    """

    order = -1

    def __init__(self, interval: int, reports: bool = True) -> None:
        self.interval = interval
        self.reports = reports
        self.hooks = LayerHooks()
        self.history = History()
        self.forgetting = ForgettingWatch()
        self.segments: list[Segment] | None = None
        self.before: Tensor | None = None
        self.gains: Tensor | None = None

    def _full(self, trainer: RunView) -> bool:
        return self.interval > 0 and (
            trainer.step == 1 or trainer.step % self.interval == 0 or trainer.step == trainer.last_step
        )

    def _cheap(self, trainer: RunView) -> bool:
        return trainer.step % trainer.config.log.interval == 0

    def before_step(self, trainer: RunView) -> None:
        """Hangs the hooks where this step is measured.

        Under a CUDA graph the cheap set does without hooks: they would take the graph from every
        step.
        """
        full = self.watching = self._full(trainer)
        if not full and not self._cheap(trainer):
            return
        self.hooks = LayerHooks()
        if not full and trainer.engine.graph is not None:
            return
        chosen = set(spread(trainer.config.model.total_layers, SAMPLED_LAYERS))
        late = not trainer.engine.topology.layout.sequence_parallel
        for chunk in trainer.engine.chunks:
            for layer in chunk.get_submodule("decoder.layers").children():
                assert isinstance(layer, DepthLayer)
                if full:
                    self.hooks.watch(layer, late)
                elif layer.layer_number in chosen:
                    self.hooks.watch_stream(layer)

    def on_gradients(self, trainer: RunView) -> None:
        """Takes the hooks away and remembers a sample of the weights before they move."""
        self.hooks.remove()
        if not self._full(trainer) and not self._cheap(trainer):
            return
        if self.segments is None:
            self.segments = segments(trainer)
        self.gradients = squares(trainer, self.segments)
        full = self._full(trainer)
        self.before = weight_sample(trainer)[1] if full else None
        self.gains = gain_squares(trainer) if full else None

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """Gathers the measurements of all ranks, writes them, compares them with their history."""
        full = self._full(trainer)
        if not full and not self._cheap(trainer):
            return
        table, logits = self._gather(trainer, full)
        common = self._common_squares(trainer) if full else []
        if not self.reports:
            return
        sums = [dict(zip(COLUMNS, row, strict=True)) for row in table]
        rows = [
            _row(number, row, logit) for number, (row, logit) in enumerate(zip(sums, logits, strict=True), 1)
        ]
        if full:
            _add_common(trainer.config.model, rows, sums, common)
        record["signal"] = summary(rows)
        trainer.tell("on_signal", record["signal"], rows if full else [])
        self._warn(trainer, rows, record["lr"])

    def _gather(self, trainer: RunView, full: bool) -> tuple[list[list[float]], list[float]]:
        """(One row of COLUMNS for every layer of the model, largest attention logit of each).

        Over all ranks.
        nan-free: what was not measured is 0.
        """
        device = trainer.engine.device
        total = trainer.config.model.total_layers
        table = torch.zeros(total, len(COLUMNS), dtype=torch.float64, device=device)
        logits = torch.full((total,), -math.inf, dtype=torch.float64, device=device)
        scale = _share(trainer)
        if scale:
            for number, sums in self.hooks.sums.items():
                for key, value in sums.items():
                    table[number - 1, MEANS.index(key)] = value.double() * scale
            # A micro-batch's loss is divided by their number, which depends on the layout; that of
            # a rank which has only some pieces of a sequence is the mean of fewer tokens.
            times = trainer.num_microbatches / trainer.engine.topology.layout.context
            table[:, MEANS.index("grad_variance_late")] *= times**2
        for number, value in self.hooks.logits.items():
            logits[number - 1] = value.double()
        column = COLUMNS.index(GRADIENT)
        table[:, column] += self.gradients.to(device)
        if full and self.before is not None and self.gains is not None:
            table[:, column + 1 :] += update_squares(trainer, self.before)
            table[:, column - len(GAINS) : column] += self.gains.to(device)
        self.before = self.gains = None
        dist.all_reduce(table)
        if full:
            dist.all_reduce(logits, op=dist.ReduceOp.MAX)
        return table.tolist(), logits.tolist()

    def _common_squares(self, trainer: RunView) -> list[float]:
        """Mean square of the vector that all tokens of the step share, after every layer.

        The mean of tokens is over all ranks and micro-batches, and so are not the means of each.
        """
        model, scale = trainer.config.model, _share(trainer)
        means = torch.zeros(model.total_layers, model.hidden_size, device=trainer.engine.device)
        if scale:
            for number, vector in self.hooks.vectors.items():
                means[number - 1] = vector * scale
        dist.all_reduce(means)
        squares: list[float] = means.double().square().mean(1).tolist()
        return squares

    def _warn(self, trainer: RunView, rows: list[dict[str, float]], lr: float) -> None:
        """One warning for each kind of value that departed, naming the layer that departed most."""
        found: dict[str, list[Departure]] = {}
        for row in rows:
            for key, value in row.items():
                if key in OWN_RULE:
                    continue
                # Updates follow the schedule, which is no departure.
                departed = self.history.check(
                    int(row["layer"]), key, value / lr if key == "update_ratio" and lr else value
                )
                if departed is not None:
                    found.setdefault(key, []).append(departed)
        for departures in found.values():
            trainer.tell("on_warning", message(departures, len(rows)))
        forgets = self.forgetting.check(trainer.config, rows)
        if forgets is not None:
            trainer.tell("on_warning", forgets)


def _share(trainer: RunView) -> float:
    """What a sum over this rank's micro-batches counts in the mean over all ranks.

    0 on ranks that hold copies of another one's stream.
    """
    topology = trainer.engine.topology
    shares = topology.layout.tensor if topology.layout.sequence_parallel else 1
    if topology.tensor_rank and shares == 1:
        return 0.0
    return 1.0 / (trainer.num_microbatches * topology.layout.replicas * shares)


def segments(trainer: RunView) -> list[Segment]:
    """What this rank counts of every layer in its flat gradient partitions.

    Neighbours of one layer are joined.
    """
    found: list[Segment] = []
    for named, fragment in owned_fragments(trainer.engine):
        layer, start = named.row.layer, fragment.offset
        if layer is None or not trainer.engine.buffers[fragment.group].counted:
            continue
        last = found[-1] if found else None
        if last is not None and (last.layer, last.group, last.stop) == (layer, fragment.group, start):
            found[-1] = Segment(layer, fragment.group, last.start, start + fragment.length)
        else:
            found.append(Segment(layer, fragment.group, start, start + fragment.length))
    return found


def squares(trainer: RunView, parts: list[Segment]) -> Tensor:
    """Squared gradient norm of every layer, this rank's share, [layers] in float64."""
    total = torch.zeros(trainer.config.model.total_layers, dtype=torch.float64, device=trainer.engine.device)
    if parts:
        views = [trainer.engine.buffers[part.group].partition[part.start : part.stop] for part in parts]
        total.index_add_(
            0, torch.tensor([part.layer for part in parts], device=total.device), norms_of(views).square()
        )
    return total


def norms_of(views: list[Tensor]) -> Tensor:
    """Norm of each of some fp32 tensors, [n] in float64.

    Also where squares of their elements are too small for fp32: a vanishing gradient is not zero.
    """
    norms = torch.stack(torch._foreach_norm(views)).double()
    small = (norms < EXACT).nonzero().flatten().tolist()
    if small:
        norms[small] = torch.stack(
            torch._foreach_norm([views[index] for index in small], 2, dtype=torch.float64)
        )
    return norms


def weight_sample(trainer: RunView) -> tuple[list[int], Tensor]:
    """Evenly spaced elements of this rank's fp32 master matrices.

    Returns (layer of each part, a copy of the elements, end to end with equal length [parts, n]).
    """
    engine = trainer.engine
    owners: list[int] = []
    parts: list[Tensor] = []
    for named, fragment in owned_fragments(engine):
        layer = named.row.layer
        if layer is None or len(fragment.shape) < 2 or not engine.buffers[fragment.group].counted:
            continue
        flat = _master(engine, named, fragment)
        step = max(1, fragment.length // SAMPLED_WEIGHTS)
        piece = flat.detach()[::step][:SAMPLED_WEIGHTS].to(engine.device)
        # A short piece is filled up with zeros, which add nothing to either square.
        parts.append(
            torch.nn.functional.pad(piece, (0, SAMPLED_WEIGHTS - piece.numel()))
            * math.sqrt(fragment.length / piece.numel())
        )
        owners.append(layer)
    return owners, torch.stack(parts) if parts else torch.zeros(0, SAMPLED_WEIGHTS, device=engine.device)


def _master(engine: Engine, named: NamedParameter, fragment: Fragment) -> Tensor:
    """A piece of a parameter in fp32, [n]."""
    if engine.zero:
        return engine.masters[fragment.group][fragment.offset : fragment.offset + fragment.length]
    return named.parameter.view(-1)[fragment.start : fragment.start + fragment.length]


def gain_squares(trainer: RunView) -> Tensor:
    """Mean squares of the gains of every layer's norms in the stream.

    This rank's share, [layers, len(GAINS)] in float64.
    """
    engine, model = trainer.engine, trainer.config.model
    total = torch.zeros(model.total_layers, len(GAINS), dtype=torch.float64, device=engine.device)
    for named, fragment in owned_fragments(engine):
        gain = gain_of(named.row)
        if gain is None or named.row.layer is None or not engine.buffers[fragment.group].counted:
            continue
        piece = _master(engine, named, fragment).detach().double().to(engine.device)
        total[named.row.layer, GAINS.index(gain)] += piece.square().sum() / model.hidden_size
    return total


def update_squares(trainer: RunView, before: Tensor) -> Tensor:
    """Estimated squared norms of every layer's last update and of its weights.

    This rank's share, [layers, 2] in float64.
    """
    owners, after = weight_sample(trainer)
    total = torch.zeros(trainer.config.model.total_layers, 2, dtype=torch.float64, device=after.device)
    if owners:
        both = torch.stack([(after - before).double().square().sum(1), after.double().square().sum(1)], dim=1)
        total.index_add_(0, torch.tensor(owners, device=after.device), both)
    return total


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Ends and extremes over layers of what was measured.

    For each KEY: KEY_first, _last, _min, _max.
    The layers of the extremes: KEY_min_layer, _max_layer.
    """
    short: dict[str, float] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != "layer"):
        values = [(row[key], int(row["layer"])) for row in rows if math.isfinite(row.get(key, math.nan))]
        if not values:
            continue
        (low, low_layer), (high, high_layer) = min(values), max(values)
        short |= {
            f"{key}_first": values[0][0],
            f"{key}_last": values[-1][0],
            f"{key}_min": low,
            f"{key}_min_layer": low_layer,
            f"{key}_max": high,
            f"{key}_max_layer": high_layer,
        }
    return short


def _add_common(
    model: ModelConfig, rows: list[dict[str, float]], sums: list[dict[str, float]], common: list[float]
) -> None:
    """Adds to each layer's row its common share, and what the stack forgets above it."""
    for row, own, square, log in zip(rows, sums, common, implied(model, sums), strict=True):
        if own["stream_square"]:
            row["common_share"] = square / own["stream_square"]
            row["forgetting"] = log


def _row(number: int, sums: dict[str, float], logit: float) -> dict[str, float]:
    """One layer of a `signal` event, with what was measured."""
    row: dict[str, float] = {"layer": number, "grad_norm": math.sqrt(sums[GRADIENT])}
    if sums["stream_square"]:
        row["residual_rms"] = math.sqrt(sums["stream_square"])
    if sums["forward_variance"]:
        row["forward_variance"] = sums["forward_variance"]
    for part in ("attention", "cross", "mlp"):
        if sums[f"{part}_residual"]:
            row[f"branch_ratio_{part}"] = math.sqrt(sums[f"{part}_branch"] / sums[f"{part}_residual"])
    if sums["grad_variance_late"]:
        row["grad_variance_late"] = sums["grad_variance_late"]
    if math.isfinite(logit):
        row["attention_logit_max"] = logit
    if sums[WEIGHT]:
        row["weight_norm"] = math.sqrt(sums[WEIGHT])
        row["update_ratio"] = math.sqrt(sums[UPDATE] / sums[WEIGHT])
    return row
