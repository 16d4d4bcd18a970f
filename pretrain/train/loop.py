"""The training loop: batches -> engine -> schedule, evaluation and checkpoints. Everything optional is a callback."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parallel.checkpoint.background import Saved
from parallel.checkpoint.errors import SaveError
from parallel.engine.engine import Engine
from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import RunConfig
from pretrain.data.blend import Prefetcher, TokenBlend, micro_batch_indices
from pretrain.rundir.state import StaleStartError
from pretrain.train.callbacks.base import Callback
from pretrain.train.learning_rate import learning_rate
from pretrain.train.run_checkpoints import Checkpoints
from pretrain.train.stop_signals import BEGAN
from pretrain.train.votes import Decision, Requests, decision


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

    step: finished optimizer steps; last_step: where this start of the run ends; exit_code: known at its end; records go to callbacks.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: Engine,
        train: TokenBlend,
        validation: TokenBlend | None,
        callbacks: list[Callback],
    ) -> None:
        self.config, self.run_dir, self.engine = config, run_dir, engine
        self.train_data, self.validation_data, self.callbacks = train, validation, callbacks
        self.saving = Checkpoints(config, run_dir, engine, train)
        self.checkpoints = self.saving.folder
        layout = engine.topology.layout
        self.batch, self.micro = config.train.global_batch_size, config.train.micro_batch_size
        self.num_microbatches = layout.num_microbatches(self.batch, self.micro)
        self.step = self.applied_steps = 0
        self.last_step = min(config.train.steps, config.train.stop_at_step or config.train.steps)
        self.saved_step = -1
        self.requests = Requests(run_dir, config.checkpoint, torch.distributed.get_rank(), BEGAN)
        self.exit_code: ExitCode | None = None

    # -- what a run is made of

    @property
    def tokens(self) -> int:
        """Training tokens consumed so far."""
        return self.step * self.batch * self.config.data.seq_length

    def start_record(self) -> dict[str, Any]:
        """The start event."""
        from model.parameters.size import parameter_count

        return {
            "step": self.step,
            "parameters": parameter_count(self.config.model)["total"],
            "world_size": self.engine.topology.layout.world,
            "layout": self.engine.topology.layout.summary(),
            "precision": "fp8"
            if self.config.train.fp8.recipe != "none"
            else str(self.engine.parameters[0].parameter.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.engine.device)
            if self.engine.device.type == "cuda"
            else self.engine.device.type,
            "unigram_entropy": self.train_data.manifests[0].unigram_entropy_nats,
        }

    def _call(self, moment: str, *args: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self, *args)

    # -- checkpoints

    def resume(self) -> str | None:
        """Loads the newest checkpoint of the run, or `checkpoint.load` where the run has none. Returns what was loaded, or None.

        Raises UserError for a damaged checkpoint or one of another model.
        """
        found = self.saving.continue_run()
        if found is None:
            return None
        reader, own = found
        if own:
            self.step = self.saved_step = reader.step
            self.applied_steps = int(reader.progress["optimizer_step"])
        return str(reader.folder)

    def save(self, *, asynchronous: bool = False) -> None:
        """Saves a checkpoint of the present step, unless there is one, and removes old ones. Waits for the save before, where that still goes on.

        asynchronous: returns when the step's state is copied; the loop reports the rest when it is done.
        """
        if self.saved_step != self.step:
            self._settle()
            self.requests.save_begins()
            self.saved_step = self.step
            saved = self.saving.save(self.step, self.applied_steps, asynchronous=asynchronous)
            if saved is not None:
                self._report(saved)
        if not asynchronous:
            self._settle()

    def _settle(self) -> None:
        """Waits for the save in the background, if any, and reports it. Raises what made it fail."""
        saved = self.saving.saver.wait()
        if saved is not None:
            self._report(saved)

    def _look_at_save(self, decided: Decision) -> None:
        """Takes the outcome of the save in the background, if it is there. A failure ends the run on all ranks at the same step, so it waits for the vote."""
        saver = self.saving.saver
        if decided.failed:
            self._settle()
            raise SaveError("checkpoint not saved: another rank has lost the connection")
        if saver.done and not saver.failed:
            self._settle()

    def _report(self, saved: Saved) -> None:
        self.requests.honoured(save=True, leave=False)
        self._call(
            "on_checkpoint",
            {
                "step": saved.step,
                "seconds": saved.seconds,
                "stall_seconds": saved.stall_seconds,
                "bytes": saved.bytes,
            },
        )

    # -- batches

    def _fetch(self, step: int) -> list[Tensor]:
        topology = self.engine.topology
        rank, size = topology.data_rank, topology.layout.data
        return [
            self.train_data.batch(micro_batch_indices(step, k, rank, size, self.micro, self.batch))
            for k in range(self.num_microbatches)
        ]

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
                self.validation_data.batch(
                    micro_batch_indices(
                        0, k, topology.data_rank, topology.layout.data, self.micro, rounds * per_round
                    )
                )
                for k in range(rounds)
            ]
        )
        loss = self.engine.evaluate(forward_step, lambda: iter(batches), rounds)
        samples = rounds * per_round
        self._call(
            "on_eval",
            {
                "step": self.step,
                "split": "validation",
                "loss": loss,
                "samples": samples,
                "tokens": samples * self.config.data.seq_length,
            },
        )

    # -- the loop

    def run(self) -> tuple[ExitCode, str]:
        """Trains to the end of this start. Returns the exit code and the reason in words.

        Saves before it returns, except after a value that was not finite.
        """
        self.requests.install()
        self._call("on_start")
        try:
            code, reason = self._work()
        except StaleStartError:
            raise  # the directory is another start's: not even the end of this one is written there
        except BaseException:
            self._call("on_end", "ended by an error")
            raise
        finally:
            if self.engine.graph is not None:
                self.engine.graph.release()
        self.exit_code = code
        self._call("on_end", reason)
        self.saving.saver.close()
        return code, reason

    def _work(self) -> tuple[ExitCode, str]:
        code, reason = self._loop()
        if code is ExitCode.DIVERGED:
            self._settle()
            return code, reason
        if code is ExitCode.FINISHED:
            self.evaluate()
        self.save()
        self.requests.honoured(save=True, leave=True)
        return code, reason

    def _loop(self) -> tuple[ExitCode, str]:
        config = self.config.train
        if self.step >= self.last_step:
            return self._end()
        with Prefetcher(self._fetch, self.step, self.last_step - self.step) as prefetcher:
            while self.step < self.last_step:
                begin = time.perf_counter()
                batches = self._to_device(prefetcher.get())
                applied, decided = self._train_step(batches, begin, prefetcher.last_wait_s)
                if decided.fenced:
                    raise self.requests.stale()
                self._look_at_save(decided)
                if not applied and config.nan_guard == "stop":
                    return ExitCode.DIVERGED, f"loss or gradient is not finite at step {self.step}"
                if (
                    config.eval_interval
                    and self.step % config.eval_interval == 0
                    and self.step < config.steps
                ):
                    self.evaluate()
                self._save_if_due(decided)
                if (decided.restart or decided.leave) and self.step < config.steps:
                    reason = self.requests.stop.reason() or "another rank was asked to stop"
                    return ExitCode.STOPPED_BY_USER if decided.leave else ExitCode.STOPPED, reason
        return self._end()

    def _end(self) -> tuple[ExitCode, str]:
        if self.step >= self.config.train.steps:
            return ExitCode.FINISHED, "all steps are done"
        return ExitCode.STOPPED_BY_USER, f"train.stop_at_step={self.last_step} is reached"

    def _save_if_due(self, decided: Decision) -> None:
        interval = self.config.checkpoint.interval
        if decided.save or (interval and self.step % interval == 0):
            # A save that is the last thing this start does would only be waited for.
            leaving = decided.restart or decided.leave or self.step >= self.last_step
            self.save(asynchronous=self.config.checkpoint.asynchronous and not leaving)

    def _train_step(self, batches: list[Tensor], begin: float, wait: float) -> tuple[bool, Decision]:
        self.step += 1
        self._call("before_step")
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.config.train.steps)
        self.engine.set_lr(lr)
        vote = self.requests.vote(self.saving.saver.failed)
        watched = any(callback.watching for callback in self.callbacks)
        result = self.engine.train_step(
            forward_step,
            lambda: iter(batches),
            len(batches),
            vote,
            lambda: self._call("on_gradients"),
            watched,
        )
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
        graph = self.engine.graph
        if graph is not None and graph.capture_s is not None:
            record["graph_capture_s"] = graph.capture_s
        self._call("on_step", record)
        return result.applied, decision(result.votes)
