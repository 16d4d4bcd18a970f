"""The training loop: batches -> engine -> schedule, evaluation and checkpoints.

Everything optional is a callback.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from pathlib import Path

import torch

from model.errors import UserError
from parallel.checkpoint.background import Saved
from parallel.checkpoint.errors import SaveError
from parallel.engine.engine import Engine
from parallel.exchange import agree
from parallel.launch.exit_codes import ExitCode
from pretrain.config.schema import SKIP_LIMIT, RunConfig
from pretrain.data.samples import Samples
from pretrain.rundir.outcome import exit_code_of, going_on, words_of
from pretrain.rundir.state import StaleStartError
from pretrain.tasks.task import Batch
from pretrain.train.batches import StepBatches
from pretrain.train.branch_warmup import branch_shares
from pretrain.train.callbacks.base import Callback, EvalRecord, SaveRecord, StartRecord, StepRecord
from pretrain.train.learning_rate import learning_rate
from pretrain.train.run_checkpoints import Checkpoints, way_back
from pretrain.train.spikes import SpikeGuard
from pretrain.train.steps import training_step
from pretrain.train.stop_signals import BEGAN
from pretrain.train.validation import Validation
from pretrain.train.votes import Requests, Verdict, decision


class Trainer:
    """One process of a run."""

    step: int
    """Finished optimizer steps, those that were left out included."""
    applied_steps: int
    """Steps that Adam has counted; those of the run that was loaded included."""
    skipped_in_row: int
    """Steps left out since the last one that was applied."""
    last_step: int
    """Where this start of the run ends."""
    exit_code: ExitCode | None
    """Known at the end."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        engine: Engine,
        train: Samples,
        validation: Samples | None,
        callbacks: list[Callback],
    ) -> None:
        self.config, self.run_dir, self.engine = config, run_dir, engine
        self.train_data, self.callbacks = train, callbacks
        self.task = config.task
        self.forward_step = training_step(self.task)
        self.saving = Checkpoints(config, run_dir, engine, train.blend)
        self.batches = StepBatches(config, train, engine.topology, engine.device)
        self.validation = Validation(config, engine, validation)
        self.branch_shares = branch_shares(config, engine.chunks)
        self.step = self.applied_steps = self.skipped_in_row = 0
        self.last_step = min(config.train.steps, config.train.stop_at_step or config.train.steps)
        self.saved_step = -1
        self.spikes = SpikeGuard(config.train.spikes)
        engine.accepts = self.spikes.accepts  # type: ignore[method-assign]
        self.requests = Requests(run_dir, config.checkpoint, torch.distributed.get_rank(), BEGAN)
        self.exit_code = None
        self._begun: list[Callback] = []
        self._unwritten: OSError | UserError | None = None

    # -- what a run is made of

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return self.saving.folder

    @property
    def tokens(self) -> int:
        """Training tokens consumed so far: of encoder-decoders those of the targets, without
        padding; of other models all positions.
        """
        return self._tokens_before(self.step)

    def _tokens_before(self, step: int) -> int:
        return self.train_data.blend.tokens_before(self.batches.sizes.before(step))

    @property
    def num_microbatches(self) -> int:
        """Of one rank in the step that is taken, or was the last one."""
        return self.batches.number(max(self.step - 1, 0))

    def start_record(self) -> StartRecord:
        """The start event."""
        from model.parameters.size import parameter_count

        weights = str(self.engine.parameters[0].parameter.dtype).removeprefix("torch.")
        device = self.engine.device
        return {
            "step": self.step,
            "parameters": parameter_count(self.config.model)["total"],
            "world_size": self.engine.topology.layout.world,
            "layout": self.engine.topology.layout.summary(),
            "precision": weights if self.config.train.fp8.recipe == "none" else "fp8",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "unigram_entropy": self.train_data.entropy,
            "padding": self.train_data.blend.padding_share,
        }

    def tell(self, moment: str, *args: object) -> None:
        """Calls all callbacks.

        What one of them cannot write ends the run on all ranks at once, with the next vote.
        """
        for callback in self.callbacks:
            try:
                getattr(callback, moment)(self, *args)
            except (OSError, UserError, StaleStartError) as error:
                self._met(error)

    def _met(self, error: OSError | UserError | StaleStartError) -> None:
        """Keeps what a callback met for the next vote."""
        if isinstance(error, StaleStartError):
            self.requests.replaced(error)
        elif exit_code_of(error) is ExitCode.USER_ERROR and self._unwritten is None:
            # As one that all ranks can raise, with the same exit code.
            self._unwritten = UserError(words_of(error) + going_on(self.run_dir))
        else:
            self._keep(error)

    def _keep(self, error: OSError | UserError) -> None:
        """Keeps what ends the run with the next vote, unless there is such a thing already."""
        self._unwritten = self._unwritten or error

    # -- what all ranks agree on

    @property
    def _failed(self) -> bool:
        return self._unwritten is not None or self.saving.saver.failed

    def _ask(self) -> Verdict:
        """A vote between steps. Raises as `_heard` does."""
        return self._heard(self.engine.total(self.requests.vote(self._failed)))

    def _heard(self, votes: float) -> Verdict:
        """What the ranks decided. Takes the outcome of a save in the background, if it is there.

        Raises on all ranks what ends the run: StaleStartError, or what one of them could not write.
        """
        decided = decision(votes)
        if decided.fenced:
            raise self.requests.stale()
        if decided.failed:
            self._settle()
            agree(self._unwritten)
            raise SaveError("checkpoint not saved: another rank has lost the connection")
        if self.saving.saver.done:
            self._settle()
        return decided

    # -- checkpoints

    def resume(self) -> str | None:
        """Loads the newest checkpoint of the run, or `checkpoint.load` where the run has none.

        Returns what was loaded, or None.

        Raises UserError for a damaged checkpoint or one of another model.
        """
        found = self.saving.continue_run()
        if found is None:
            return None
        reader, own = found
        # Adam's own count came with the moments, and the next save has to write it down.
        self.applied_steps = reader.progress.optimizer_step
        if own:
            self.step = self.saved_step = reader.step
            self.skipped_in_row = reader.progress.skipped_in_row or 0
            self.spikes.restore(reader.progress.recent_steps)
        return str(reader.folder)

    def save(self, *, asynchronous: bool = False, prune: bool = True) -> None:
        """Saves a checkpoint of the present step, unless there is one.

        Waits for the save before, where that still goes on.

        asynchronous: returns when the step's state is copied.
        The loop reports the rest when it is done.
        prune: removes old ones; never where the last step was left out, as the newest weights may
        be the broken ones.
        """
        if self.saved_step != self.step:
            self._settle()
            self.requests.save_begins()
            self.saved_step = self.step
            self.saving.pruning = prune and not self.skipped_in_row
            counts: dict[str, object] = {
                "optimizer_step": self.applied_steps,
                "skipped_in_row": self.skipped_in_row,
                **self.spikes.state(),
            }
            saved = self.saving.save(self.step, counts, asynchronous=asynchronous)
            if saved is not None:
                self._report(saved)
        if not asynchronous:
            self._settle()

    def _settle(self) -> None:
        """Waits for the save in the background, if any, and reports it.

        Raises what made it fail.
        """
        saved = self.saving.saver.wait()
        if saved is not None:
            self._report(saved)

    def _report(self, saved: Saved) -> None:
        self.requests.honoured(save=True, leave=False)
        record: SaveRecord = {
            "step": saved.step,
            "seconds": saved.seconds,
            "stall_seconds": saved.stall_seconds,
            "bytes": saved.bytes,
        }
        self.tell("on_checkpoint", record)

    # -- evaluation

    def evaluate(self) -> float:
        """Mean loss in nats per target on the validation samples.

        In a warm-up of the branches, of the model as the next step has it.
        """
        if self.branch_shares is not None:
            self.branch_shares.fill(self.step)
        found = self.validation.measure()
        record: EvalRecord = {
            "step": self.step,
            "split": "validation",
            "loss": found.loss,
            "samples": self.validation.samples,
            "tokens": found.labels,
        }
        if found.accuracy is not None:
            record["accuracy"] = found.accuracy
        if found.top5 is not None:
            record["top5"] = found.top5
        self.tell("on_eval", record)
        return found.loss

    # -- the loop

    def run(self) -> tuple[ExitCode, str]:
        """Trains to the end of this start. Returns the exit code and the reason in words.

        Saves before it returns, except after a value that was not finite.
        """
        self.callbacks.sort(key=lambda callback: callback.order)
        self.requests.install()
        try:
            self._begin()
            code, reason = self._work()
        except StaleStartError:
            raise  # the directory is another start's: not even the end of this one is written there
        except BaseException as error:
            if isinstance(error, Exception):
                with contextlib.suppress(Exception):
                    self._settle()  # a checkpoint that is being written is not given up
            self._end_callbacks(exit_code_of(error), words_of(error))
            raise
        finally:
            self.requests.close()
            if self.engine.graph is not None:
                self.engine.graph.release()
        self.exit_code = code
        problem = self._end_callbacks(code, reason)
        if isinstance(problem, StaleStartError):
            raise problem
        if problem is not None:
            print(
                f"fathom: the end of the run is not written everywhere: {words_of(problem)}", file=sys.stderr
            )
        self.saving.saver.close()
        return code, reason

    def _end_callbacks(self, code: ExitCode, reason: str) -> Exception | None:
        """Ends every callback that has begun, whatever the others meet.

        Returns what one of them met.
        """
        met: Exception | None = None
        for callback in self._begun:
            try:
                callback.on_end(self, code, reason)
            except (OSError, UserError, StaleStartError) as error:
                met = error if isinstance(error, StaleStartError) else met or error
        return met

    def _begin(self) -> None:
        """The first moment of all callbacks. Where one cannot begin, all ranks end."""
        try:
            for callback in self.callbacks:
                callback.on_start(self)
                self._begun.append(callback)
        except (OSError, UserError, StaleStartError) as error:
            self._met(error)
        self._ask()

    def _work(self) -> tuple[ExitCode, str]:
        """Everything between the first and the last moment.

        What was trained is saved before anything else is done with it.
        """
        begun = self.step
        code, reason = self._loop()
        if code is ExitCode.DIVERGED:
            return code, self._settled(reason) + self._way_back()
        self.save(prune=False)
        decided = self._ask()
        if code is ExitCode.FINISHED and self.validation.samples:
            code, reason = self._last_evaluation(reason, decided)
        elif (
            self._evaluation_is_due()
            and self.step > begun
            and not (code is ExitCode.STOPPED or decided.ends or decided.lost)
        ):
            self.evaluate()  # of train.stop_at_step
        self._ask()
        if code is not ExitCode.DIVERGED and not self.skipped_in_row:
            self.saving.prune()
        self.requests.honoured(save=True, leave=True)
        return code, reason

    def _last_evaluation(self, reason: str, decided: Verdict) -> tuple[ExitCode, str]:
        """How the run ends once all steps are done.

        Told to leave, it leaves: the next start evaluates.
        """
        if decided.ends:
            code, asked = self._asked_to_leave(decided)
            return code, f"{asked}; all steps are done, and the last evaluation is left to the next start"
        if math.isfinite(self.evaluate()):
            return ExitCode.FINISHED, reason
        reason = f"the validation loss is not finite after step {self.step}"
        return ExitCode.DIVERGED, reason + self._way_back()

    def _loop(self) -> tuple[ExitCode, str]:
        if self.step >= self.last_step:
            return self._end()
        with self.batches.ahead(self.step, self.last_step - self.step) as prefetcher:
            while self.step < self.last_step:
                begin = time.perf_counter()
                batches = self.batches.next(prefetcher, self.step, self._keep)
                applied, votes = self._train_step(batches, begin, prefetcher.last_wait_s)
                decided = self._heard(votes)
                moved = self._follow_folder() if decided.lost else ""
                diverged = self._divergence(applied)
                if diverged:
                    return ExitCode.DIVERGED, diverged
                if moved:
                    return ExitCode.STOPPED_BY_USER, moved
                if self.step == self.last_step:
                    break  # `_work` saves and evaluates
                if decided.ends:
                    return self._asked_to_leave(decided)
                self._save_if_due(decided)
                if self._evaluation_is_due():
                    self.evaluate()
        return self._end()

    def _end(self) -> tuple[ExitCode, str]:
        if self.step >= self.config.train.steps:
            return ExitCode.FINISHED, "all steps are done"
        return ExitCode.STOPPED_BY_USER, f"train.stop_at_step={self.last_step} is reached"

    def _asked_to_leave(self, decided: Verdict) -> tuple[ExitCode, str]:
        reason = self.requests.stop.reason() or "another rank was asked to stop"
        return ExitCode.STOPPED_BY_USER if decided.leave else ExitCode.STOPPED, reason

    def _follow_folder(self) -> str:
        """Has `_work` save where the run's folder was moved to, and says so.

        Where it is gone, the fence of that save ends the run on all ranks.
        """
        old, new = self.run_dir, self.requests.whereabouts()
        if new is not None:
            self.run_dir = new
            self.saving.move(new)
        with contextlib.suppress(SaveError, StaleStartError):
            self._settle()  # it was to be written at the old place
        self.saved_step = -1
        return (
            f"{old} was moved while it trained, and is saved in {new}: "
            "start it from there, under its new name"
        )

    def _divergence(self, applied: bool) -> str:
        """Why the run ends after a step that was left out; empty where it goes on."""
        config = self.config.train
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1
        if applied:
            return ""
        if self.spikes.reason:
            if self.skipped_in_row < config.spikes.limit:
                return ""
            return (
                f"{self.skipped_in_row} steps in a row were left out (train.spikes.limit), the last of them "
                f"step {self.step}: {self.spikes.reason}"
            )
        if config.nan_guard == "stop":
            return f"loss or gradient is not finite at step {self.step}"
        limit = min(config.skip_limit or SKIP_LIMIT, config.steps)
        if self.skipped_in_row < limit:
            return ""
        return f"loss or gradient is not finite in {limit} steps in a row, the last of them step {self.step}"

    def _settled(self, reason: str) -> str:
        """The reason of an end, when the save in the background is over, with what made it fail."""
        try:
            self._settle()
        except SaveError as error:
            return f"{reason}; {error}"
        return reason

    def _way_back(self) -> str:
        """What can be done after a divergence."""
        # Weights are known to work where the step after them was taken.
        return way_back(self.checkpoints, self.step - self.skipped_in_row - 1)

    def _evaluation_is_due(self) -> bool:
        """Whether an evaluation follows the present step, which is not the run's last."""
        interval = self.config.train.eval_interval
        return (
            self.validation.samples > 0
            and interval > 0
            and self.step % interval == 0
            and self.step < self.config.train.steps
        )

    def _save_if_due(self, decided: Verdict) -> None:
        interval = self.config.checkpoint.interval
        if decided.save or (interval and self.step % interval == 0):
            self.save(asynchronous=self.config.checkpoint.asynchronous)

    def _train_step(self, batches: list[Batch], begin: float, wait: float) -> tuple[bool, float]:
        """Whether the step was applied, and the sum of all votes."""
        if self.branch_shares is not None:
            self.branch_shares.fill(self.step)
        self.step += 1
        self.tell("before_step")
        lr = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step, self.config.train.steps)
        self.engine.set_lr(lr)
        self.engine.step_length = self.batches.lengths.at(self.step - 1)
        vote, self.spikes.reason = self.requests.vote(self._failed), ""
        watched = any(callback.watching for callback in self.callbacks)
        result = self.engine.train_step(
            self.forward_step,
            lambda: iter(batches),
            len(batches),
            vote,
            lambda: self.tell("on_gradients"),
            watched,
        )
        self.applied_steps += result.applied
        seconds = time.perf_counter() - begin
        tokens = self.tokens
        own_tokens = tokens - self._tokens_before(self.step - 1)
        record: StepRecord = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_s": own_tokens / seconds,
            "step_time_s": seconds,
            "data_wait_share": wait / seconds,
            "skipped": not result.applied,
        }
        if self.batches.sizes.grows:
            record["batch_size"] = self.batches.sizes.at(self.step - 1)
        if self.batches.lengths.grows:
            record["seq_length"] = self.batches.lengths.at(self.step - 1)
        graph = self.engine.graph
        if graph is not None and graph.capture_s is not None:
            record["graph_capture_s"] = graph.capture_s
        self.tell("on_step", record)
        if self.spikes.reason:
            self.tell("on_warning", self.spikes.reason)
        return result.applied, result.votes
