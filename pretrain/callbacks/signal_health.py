"""Per-layer signal: how the stream and the branches grow with depth, and each layer's gradient norm, every n steps.

Hooks are on the residual joins and exist only during a measured step, so that other steps pay nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.layer import DepthLayer
from parallel.checkpoint.fragments import owned_fragments
from pretrain.callbacks import Callback

if TYPE_CHECKING:
    from pretrain.loop import Trainer

FORWARD = ("residual_rms", "forward_variance", "branch_ratio_attention", "branch_ratio_mlp")


def _mean_square(x: Tensor) -> Tensor:
    return x.detach().float().square().mean()


class SignalHealth(Callback):
    """Writes a `signal` event every `interval` steps, at the first step, and at the last. write: takes (event, record); None on other ranks."""

    def __init__(self, interval: int, write: Any = None) -> None:
        self.interval = interval
        self.write = write
        self.handles: list[Any] = []
        self.forward: dict[int, list[Tensor]] = {}

    def _due(self, trainer: Trainer) -> bool:
        return self.interval > 0 and (trainer.step == 1 or trainer.step % self.interval == 0 or trainer.step == trainer.last_step)

    def before_step(self, trainer: Trainer) -> None:
        """Hangs the hooks where this step is measured."""
        if not self._due(trainer):
            return
        self.forward = {}
        for chunk in trainer.engine.chunks:
            for layer in chunk.decoder.layers:  # type: ignore[union-attr]
                self._watch(layer)  # type: ignore[arg-type]

    def _watch(self, layer: DepthLayer) -> None:
        number = layer.layer_number
        values = self.forward.setdefault(number, [torch.zeros(()) for _ in range(6)])

        def joined(offset: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                residual, branch, bias = args[:3]
                branch = branch if bias is None else branch + bias
                # (mean squares of branch and residual, then of the stream after the layer's last join)
                values[offset] = values[offset] + _mean_square(branch) * module.branch_scale**2  # type: ignore[operator]
                values[offset + 1] = values[offset + 1] + _mean_square(residual) * max(module.residual_scale, module.skip_scale) ** 2  # type: ignore[operator, type-var]

            return hook

        def left(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
            stream = output[0].detach().float()
            values[4] = values[4] + stream.square().mean()
            values[5] = values[5] + stream.var()

        self.handles += [
            layer.self_attention_join.register_forward_hook(joined(0)),
            layer.mlp_join.register_forward_hook(joined(2)),
            layer.register_forward_hook(left),
        ]

    def on_gradients(self, trainer: Trainer) -> None:
        """Gathers what the hooks saw and each layer's share of the gradient norm; takes the hooks away."""
        if not self._due(trainer):
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        total = trainer.config.model.num_layers
        table = torch.zeros(total, 7, dtype=torch.float64)
        topology = trainer.engine.topology
        if topology.tensor_rank == 0 and topology.layout.data:
            scale = 1.0 / (trainer.num_microbatches * topology.layout.data)
            for number, values in self.forward.items():
                table[number - 1, :6] = torch.stack([value.double().cpu() for value in values]) * scale
        for _, fragment in owned_fragments(trainer.engine):
            buffer = trainer.engine.buffers[fragment.group]
            if buffer.counted and fragment.name.startswith("decoder.layers."):
                piece = buffer.partition[fragment.offset : fragment.offset + fragment.length]
                table[int(fragment.name.split(".")[2]), 6] += float(torch.linalg.vector_norm(piece)) ** 2
        table = table.to(trainer.engine.device)
        dist.all_reduce(table)
        self.layers = [_row(index + 1, row) for index, row in enumerate(table.tolist())]

    def on_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Writes the event."""
        if self._due(trainer) and self.write is not None:
            self.write("signal", {"step": trainer.step, "layers": self.layers})


def _row(number: int, values: list[float]) -> dict[str, float]:
    attention, attention_residual, mlp, mlp_residual, square, variance, gradient = values
    ratio = lambda branch, residual: math.sqrt(branch / residual) if residual > 0 else 0.0  # noqa: E731
    return {
        "layer": number,
        "residual_rms": math.sqrt(square),
        "forward_variance": variance,
        "branch_ratio_attention": ratio(attention, attention_residual),
        "branch_ratio_mlp": ratio(mlp, mlp_residual),
        "grad_norm": math.sqrt(gradient),
    }
