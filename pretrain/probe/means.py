"""Of what each layer showed in a pass of every seed: means, extremes, and theory beside them."""

from __future__ import annotations

import math

from model.config import ModelConfig
from model.depth.placed import PlacedLayer
from model.depth.scheme import LAYER_ROLES
from model.theory.propagation import LayerSignal
from pretrain.probe.records import ROLES, LayerProbe, Sample
from pretrain.train.callbacks.signal.forgetting import implied


def means(model: ModelConfig, runs: list[list[Sample]], theory: list[LayerSignal] | None) -> list[LayerProbe]:
    """Every layer over all runs. theory: None where there is no prediction."""
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
