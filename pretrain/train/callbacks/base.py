"""What is optional about a run, one file each.

The loop calls them; they never change what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

from parallel.engine.engine import Engine
from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import RunConfig


class StartRecord(TypedDict):
    """The first line of a start."""

    step: int
    parameters: int
    world_size: int
    layout: dict[str, int]
    precision: str
    device: str
    unigram_entropy: float | None
    padding: float | None
    """Share of the places of training samples that hold no token, where it is known."""


class _Step(TypedDict):
    step: int
    loss: float
    """Nats per token."""
    grad_norm: float
    lr: float
    tokens: int
    """Consumed in total; of an encoder-decoder, those of the targets."""
    tokens_per_s: float
    step_time_s: float
    data_wait_share: float
    skipped: bool


class StepRecord(_Step, total=False):
    """The metrics line of a step."""

    graph_capture_s: float
    batch_size: int
    """Samples of the step, where that grows."""
    seq_length: int
    """Tokens of its sequences, where that grows."""
    signal: dict[str, float]
    """Ends and extremes of the signal, where they were measured."""


class _Eval(TypedDict):
    step: int
    split: str
    loss: float
    """Nats per token."""
    samples: int
    tokens: int


class EvalRecord(_Eval, total=False):
    """The metrics line of an evaluation."""

    accuracy: float
    """Share of the tokens that are the model's likeliest, where the task asks for it."""
    top5: float
    """Share of the labels that are among the five likeliest, where the task asks for it."""


class SaveRecord(TypedDict):
    """The metrics line of a checkpoint; as in `Saved`."""

    step: int
    seconds: float
    stall_seconds: float
    bytes: int


class RunView(Protocol):
    """What a callback may see of a run."""

    config: RunConfig
    run_dir: Path
    engine: Engine
    step: int
    """Steps done; in `before_step` the one about to be taken."""
    last_step: int
    """Where this start of the run ends."""

    @property
    def num_microbatches(self) -> int:
        """Of one rank in the step that is taken."""
        ...

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        ...

    def start_record(self) -> StartRecord:
        """What the run is, for its first line."""
        ...

    def tell(self, moment: str, *args: object) -> None:
        """Calls this moment of all callbacks."""
        ...


class Callback:
    """Base of all callbacks: every moment of a run, doing nothing.

    A callback that cannot write raises OSError; the run then ends on all ranks at once.
    """

    watching = False
    """Whether hooks of modules must run in the step about to be taken; set in `before_step`."""
    order = 0
    """Callbacks are called by rising order, and equal ones as they were added."""

    def on_start(self, trainer: RunView) -> None:
        """After everything is built and loaded, before the first step."""

    def before_step(self, trainer: RunView) -> None:
        """Before each optimizer step; `trainer.step` is the step about to be taken."""

    def on_gradients(self, trainer: RunView) -> None:
        """Inside a step, when gradients are reduced and not yet clipped."""

    def on_step(self, trainer: RunView, record: StepRecord) -> None:
        """After each step, with its metrics line."""

    def on_signal(
        self, trainer: RunView, short: dict[str, float], layers: Sequence[dict[str, float]]
    ) -> None:
        """When the signal through the layers was measured, before the `on_step` of what writes.

        short: its ends and extremes.
        layers: every layer's values, empty where only `short` was measured.
        """

    def on_warning(self, trainer: RunView, text: str) -> None:
        """When something departs from its history; one line."""

    def on_eval(self, trainer: RunView, record: EvalRecord) -> None:
        """After each evaluation."""

    def on_checkpoint(self, trainer: RunView, record: SaveRecord) -> None:
        """After each save."""

    def on_end(self, trainer: RunView, code: ExitCode, reason: str) -> None:
        """When the loop is left, finished or not."""
