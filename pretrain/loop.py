"""The training loop: batches -> engine -> schedule, evaluation and checkpoints. Everything optional is a callback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.errors import UserError
from parallel.checkpoint.format import steps_in
from parallel.checkpoint.loader import load
from parallel.checkpoint.reader import CheckpointReader, open_checkpoint
from parallel.checkpoint.writer import prune, save
from parallel.engine import Engine
from parallel.exit_codes import ExitCode
from pretrain.callbacks import Callback
from pretrain.config import RunConfig
from pretrain.data import Prefetcher, TokenBlend, micro_batch_indices
from pretrain.environment import environment
from pretrain.schedule import learning_rate
from pretrain.stop import StopRequest

BY_USER = 1e6  # outweighs any number of ranks that ask for a stop and a restart


def forward_step(iterator: Iterator[Tensor], chunk: nn.Module) -> tuple[Tensor, Any]:
    """Megatron-core's forward step: tokens [b, s + 1] -> output of a chunk and the function that makes it a loss in nats per token."""
    tokens = next(iterator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=tokens.device).expand_as(inputs)

    def loss_of(per_token_bs: Tensor) -> tuple[Tensor, Tensor]:
        loss = per_token_bs.float().mean()
        return loss, loss.detach().clone()

    return chunk(inputs, positions, None, labels=labels), loss_of


class Trainer:
    """One process of a run.

    step: finished optimizer steps; last_step: where this start of the run ends; records go to callbacks.
    """

    def __init__(self, config: RunConfig, run_dir: Path, engine: Engine, train: TokenBlend, validation: TokenBlend | None, callbacks: list[Callback]) -> None:
        self.config, self.run_dir, self.engine = config, run_dir, engine
        self.train_data, self.validation_data, self.callbacks = train, validation, callbacks
        self.checkpoints = run_dir / "checkpoints"
        layout = engine.topology.layout
        self.batch, self.micro = config.train.global_batch_size, config.train.micro_batch_size
        self.num_microbatches = self.batch // (self.micro * layout.data)
        self.step = self.applied_steps = 0
        self.last_step = min(config.train.steps, config.train.stop_at_step or config.train.steps)
        self.saved_step = -1
        self.stop = StopRequest(run_dir)

    # -- what a run is made of

    @property
    def tokens(self) -> int:
        """Training tokens consumed so far."""
        return self.step * self.batch * self.config.data.seq_length

    def start_record(self) -> dict[str, Any]:
        """The start event."""
        from model.size import parameter_count

        return {
            "step": self.step,
            "parameters": parameter_count(self.config.model)["total"],
            "world_size": self.engine.topology.layout.world,
            "layout": self.engine.topology.layout.summary(),
            "precision": str(self.engine.parameters[0].parameter.dtype).removeprefix("torch."),
            "unigram_entropy": self.train_data.manifests[0].get("unigram_entropy_nats"),
        }

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *args)

    # -- checkpoints

    def resume(self) -> str | None:
        """Loads the newest checkpoint of the run, or `checkpoint.load` where the run has none. Returns what was loaded, or None.

        Raises UserError for a damaged checkpoint or one of another model.
        """
        source: Path | str | None = self.checkpoints if steps_in(self.checkpoints) else self.config.checkpoint.load
        if source is None:
            return None
        reader = open_checkpoint(source)
        check_same_model(reader, self.config)
        load(self.engine, reader)
        if source == self.checkpoints:
            self.step = self.saved_step = reader.step
            self.applied_steps = int(reader.progress["optimizer_step"])
        return str(reader.folder)

    def save(self) -> None:
        """Saves a checkpoint of the present step, unless there is one, and removes old ones."""
        if self.saved_step == self.step:
            return
        tokenizer = Path(self.config.data.corpora[0].path) / "tokenizer.model"
        seconds = save(
            self.engine,
            self.checkpoints,
            self.step,
            progress={
                "optimizer_step": self.applied_steps,
                "consumed_samples": self.step * self.batch,
                "consumed_tokens": self.tokens,
                "seed": self.config.train.seed,
            },
            config=self.config.model_dump(mode="json"),
            versions=environment()["packages"],
            extra={"tokenizer.model": tokenizer.read_bytes()} if tokenizer.is_file() else {},
        )
        self.saved_step = self.step
        if torch.distributed.get_rank() == 0:
            prune(self.checkpoints, keep_last=self.config.checkpoint.keep_last, keep_every=self.config.checkpoint.keep_every)
        self._call("on_checkpoint", {"step": self.step, "seconds": seconds})

    # -- batches

    def _fetch(self, step: int) -> list[Tensor]:
        topology = self.engine.topology
        rank, size = topology.data_rank, topology.layout.data
        return [self.train_data.batch(micro_batch_indices(step, k, rank, size, self.micro, self.batch)) for k in range(self.num_microbatches)]

    def _to_device(self, batches: list[Tensor]) -> list[Tensor]:
        return [batch.to(self.engine.device, non_blocking=True) for batch in batches]

    def evaluate(self) -> None:
        """Mean loss over the first `eval_samples` samples of the validation split."""
        if self.validation_data is None:
            return
        topology = self.engine.topology
        per_round = self.micro * topology.layout.data
        rounds = max(1, self.config.train.eval_samples // per_round)
        batches = self._to_device(
            [
                self.validation_data.batch(micro_batch_indices(0, k, topology.data_rank, topology.layout.data, self.micro, rounds * per_round))
                for k in range(rounds)
            ]
        )
        loss = self.engine.evaluate(forward_step, lambda: iter(batches), rounds)
        samples = rounds * per_round
        self._call("on_eval", {"step": self.step, "split": "validation", "loss": loss, "samples": samples, "tokens": samples * self.config.data.seq_length})

    # -- the loop

    def run(self) -> tuple[ExitCode, str]:
        """Trains to the end of this start. Returns the exit code and the reason in words.

        Saves before it returns, except after a value that was not finite.
        """
        self.stop.install()
        code, reason = ExitCode.CRASH, "ended by an error"
        self._call("on_start")
        try:
            code, reason = self._loop()
            if code is not ExitCode.DIVERGED:
                if code is ExitCode.FINISHED:
                    self.evaluate()
                self.save()
        finally:
            self._call("on_end", reason)
        return code, reason

    def _loop(self) -> tuple[ExitCode, str]:
        config = self.config.train
        if self.step >= self.last_step:
            return self._end()
        with Prefetcher(self._fetch, self.step, self.last_step - self.step) as prefetcher:
            while self.step < self.last_step:
                begin = time.perf_counter()
                batches = self._to_device(prefetcher.get())
                applied, votes = self._train_step(batches, begin, prefetcher.last_wait_s)
                if not applied and config.nan_guard == "stop":
                    return ExitCode.DIVERGED, f"loss or gradient is not finite at step {self.step}"
                if config.eval_interval and self.step % config.eval_interval == 0 and self.step < config.steps:
                    self.evaluate()
                if self.config.checkpoint.interval and self.step % self.config.checkpoint.interval == 0:
                    self.save()
                if votes and self.step < config.steps:
                    return ExitCode.STOPPED_BY_USER if votes >= BY_USER else ExitCode.STOPPED, self.stop.reason() or "another rank was asked to stop"
        return self._end()

    def _end(self) -> tuple[ExitCode, str]:
        if self.step >= self.config.train.steps:
            return ExitCode.FINISHED, "all steps are done"
        return ExitCode.STOPPED_BY_USER, f"train.stop_at_step={self.last_step} is reached"

    def _vote(self) -> float:
        code = self.stop.code()
        return BY_USER if code == ExitCode.STOPPED_BY_USER else float(code > 0)

    def _train_step(self, batches: list[Tensor], begin: float, wait: float) -> tuple[bool, float]:
        self.step += 1
        self._call("before_step")
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.config.train.steps)
        self.engine.set_lr(lr)
        result = self.engine.train_step(forward_step, lambda: iter(batches), len(batches), self._vote(), inspect=lambda: self._call("on_gradients"))
        self.applied_steps += result.applied
        seconds = time.perf_counter() - begin
        record = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "tokens_per_s": self.batch * self.config.data.seq_length / seconds,
            "step_time_s": seconds,
            "data_wait_share": wait / seconds,
            "skipped": not result.applied,
        }
        self._call("on_step", record)
        return result.applied, result.votes


def check_same_model(reader: CheckpointReader, config: RunConfig) -> None:
    """Raises UserError naming the first model setting that differs from the checkpoint's."""
    ours, theirs = config.model.model_dump(mode="json"), reader.config["model"]
    for key in sorted(set(ours) | set(theirs)):
        # Initial values and dropout do not change what a loaded model computes.
        if key not in ("init", "hidden_dropout", "attention_dropout") and ours.get(key) != theirs.get(key):
            raise UserError(
                f"{reader.folder} was trained with model.{key}={theirs.get(key)!r}, the configuration has {ours.get(key)!r}: "
                "change it back, or start a run with another name"
            )
