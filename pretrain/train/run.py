"""One run from configuration to exit code.

What every process does, and the start of local processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports below take seconds; ctrl-C in them has nothing to save and would only print where
    # each rank was. StopRequest takes over before the first step.
    # Where SIGINT is ignored, in the background of a script, it stays so.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

from model.errors import UserError, debugging, say, told
from parallel.checkpoint.errors import SaveError
from parallel.exchange import PeerError, is_shared, together
from parallel.launch.exit_codes import ENDED_IN_ORDER, ExitCode, as_exit_code, leave
from parallel.launch.gate import StrangerError
from parallel.launch.host import check_processes
from parallel.launch.local import start_local
from parallel.launch.process_group import has_gpu, has_own_store, init_process_group, open_store
from parallel.launch.ranks import ALONE, RankInfo, rank_from_environment
from parallel.launch.secret import run_secret
from parallel.topology import Topology
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.data.token_files import DamagedDataError
from pretrain.rundir.lock import InUseError, UnwritableError, check_free, owned, share_start
from pretrain.rundir.outcome import exit_code_of, going_on, known_line, words_of, write_end
from pretrain.rundir.state import CONTROL, StaleStartError, forget_failures, record_failure
from pretrain.train.callbacks.watchdog import Watchdog, timed_out
from pretrain.train.checks.before_start import FirstStart, check_before_start
from pretrain.train.checks.feasibility import check_passes, fit_machine, fit_processes
from pretrain.train.checks.network import check_network
from pretrain.train.checks.preflight import BadNodeError, check_nodes, share_problem
from pretrain.train.stop_signals import task_exit_code

if TYPE_CHECKING:
    from pretrain.train.loop import Trainer

LOCAL_ARGUMENTS = ("-m", "pretrain.train.run")


def prepared_config(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run with the vocabulary of its data filled in.

    Raises UserError for anything that cannot work.
    """
    config = load_config(path, overrides)
    for corpus in config.data.corpora:
        if not (Path(corpus.path) / "dataset.json").is_file():
            raise UserError(
                f"data.corpora: {corpus.path} is no prepared data set (it has no dataset.json): "
                "run `fathom data prepare` first, or correct the path"
            )
    manifest = load_manifest(config.data.corpora[0].path)
    config.model = complete_model(config, manifest.vocab_size, manifest.patch_correlations, manifest.moments)
    return config


def processes_of(config: RunConfig) -> int:
    """Local processes to start: as configured, else one per GPU, else one.

    Raises UserError for more than this machine can run.
    """
    import torch

    gpus = torch.cuda.device_count() if has_gpu() else 0
    processes = config.parallel.processes or max(1, gpus)
    check_processes(processes, gpus)
    return processes


def pretrain(path: str, overrides: Sequence[str]) -> int:
    """Runs a configuration on the processes that a launcher started, or on local ones.

    Local processes are started here.
    Returns the exit code.
    """
    info = rank_from_environment(os.environ)
    if info is not None:
        return start_rank(path, overrides, info)
    config = prepared_config(path, overrides)
    world = processes_of(config)
    layout = fit_processes(config, world)
    if (
        world == 1 or not has_gpu()
    ):  # beside its ranks this process would only take memory of a GPU: they look
        fit_machine(config, layout)
    check_before_start(config)
    first = FirstStart(Path(config.runs_dir) / config.name)
    if world == 1:
        code = run_rank(config, ALONE)
    else:
        check_free(first.run_dir)
        code = start_local([*LOCAL_ARGUMENTS, path, *overrides], world)
    if code == ExitCode.USER_ERROR:
        first.take_back()
    return code


def start_rank(path: str, overrides: Sequence[str], info: RankInfo) -> int:
    """One of several processes, from the configuration file on.

    What one node lacks and others have is a fault of that node.
    Returns the exit code.
    """
    try:
        return run_rank(prepared_config(path, overrides), info)
    except UserError as error:
        if info.world_size == 1:
            raise
        return run_rank(load_config(path, overrides), info, str(error))


def run_rank(config: RunConfig, info: RankInfo, problem: str = "") -> int:
    """Everything one process does.

    problem: why the run cannot start on this node, if it cannot.
    Returns the exit code of the process.
    """
    run_dir = Path(config.runs_dir) / config.name
    try:
        with owned(run_dir, info.rank):
            return _run_rank(config, info, run_dir, problem)
    except (InUseError, UnwritableError, StaleStartError, OSError) as error:
        code, line = exit_code_of(error), known_line(error)
        if not isinstance(error, (InUseError, UnwritableError)):  # the other process's folder stays as it is
            record_failure(run_dir, info.rank, code, words_of(error))
        if line is None or debugging():
            raise
        say(line)
        return int(code)


def _run_rank(config: RunConfig, info: RankInfo, run_dir: Path, problem: str) -> int:
    try:
        layout = None if problem else fit_processes(config, info.world_size)
    except UserError as error:
        layout, problem = None, str(error)
        if info.world_size == 1:
            raise
    watchdog: Watchdog | None = None
    try:
        if info.rank == 0:
            forget_failures(run_dir)
        store = open_store(info, config.parallel.timeout_minutes, _secret(info, run_dir))
        share_start(store, info.rank)
        verdict = check_nodes(store, info, config, problem) if config.parallel.preflight else None
        if verdict is None:
            share_problem(store, info, problem)
        if layout is None:
            raise UserError(problem)
        hosts = verdict.hosts if verdict else [""] * info.world_size
        watchdog = Watchdog(
            run_dir, info.rank, hosts, config.parallel.step_timeout_minutes, config.parallel.timeout_minutes
        )
        init_process_group(info, config.parallel.timeout_minutes, store)
        if verdict is not None and info.world_size > 1:
            check_network(info, run_dir, verdict)
        code, reason = _train(config, info, Topology(layout), run_dir, watchdog)
    except Exception as error:
        return _failed(error, info, run_dir, watchdog)
    _leave_word(code, reason, info, run_dir)
    with contextlib.suppress(Exception):
        import torch

        torch.distributed.destroy_process_group()
    return task_exit_code(code)


def _secret(info: RankInfo, run_dir: Path) -> str:
    """What the ranks of the run know each other by.

    Raises StrangerError where this node cannot have it.
    """
    if info.world_size == 1 or has_own_store():
        return ""
    try:
        return run_secret(run_dir / CONTROL)
    except OSError as error:
        raise StrangerError(
            f"the secret of the run cannot be read or made here ({error.filename}: {error.strerror}): "
            "runs_dir must be on a file system that all nodes share and may write"
        ) from None


def _leave_word(code: ExitCode, reason: str, info: RankInfo, run_dir: Path) -> None:
    """Says how the run ended. state.json has it already: a task of srun that leaves in order has to
    end with 0.
    """
    if info.rank == 0:
        print(f"{run_dir.name}: {reason}", file=sys.stderr)
    if code is ExitCode.DIVERGED and info.rank == 0:
        record_failure(run_dir, info.rank, code, reason)


def _failed(error: Exception, info: RankInfo, run_dir: Path, watchdog: Watchdog | None) -> int:
    """Says why this process ends, in one line where that is all there is to know.

    Leaves it for whatever started the run.
    Returns the exit code.
    """
    if watchdog is not None and info.world_size > 1 and timed_out(error):
        watchdog.end(f"a collective did not end in time ({' '.join(str(error).split())[:200]})")
    code, text = exit_code_of(error), words_of(error)
    if known_line(error) is None:
        traceback.print_exc()
    if isinstance(error, OSError):
        text += going_on(run_dir)
    if not isinstance(error, BadNodeError | PeerError):  # of which word was left already
        record_failure(run_dir, info.rank, code, text)
    if debugging():
        raise error
    usual = isinstance(error, UserError | BadNodeError | StaleStartError | SaveError)  # on all ranks
    alone = isinstance(error, DamagedDataError) or not usual
    if info.rank == 0 or (alone and not is_shared(error)):
        say(text)
    if info.rank == 0 and not isinstance(error, UserError | StaleStartError):
        with contextlib.suppress(StaleStartError, UserError, OSError):
            write_end(run_dir, code, text)
    return int(code)


def _train(
    config: RunConfig, info: RankInfo, topology: Topology, run_dir: Path, watchdog: Watchdog | None = None
) -> tuple[ExitCode, str]:
    from parallel.launch.startup import collector_at_rest

    try:
        with collector_at_rest():
            trainer = _trainer(config, info, topology, run_dir, watchdog)
        return trainer.run()
    finally:
        gc.unfreeze()  # this process may train another model


def _trainer(
    config: RunConfig, info: RankInfo, topology: Topology, run_dir: Path, watchdog: Watchdog | None
) -> Trainer:
    from pretrain.data.samples import open_samples
    from pretrain.train import branch_warmup, learning_rate
    from pretrain.train.build import build_engine
    from pretrain.train.callbacks.base import Callback
    from pretrain.train.callbacks.description import Description, describe
    from pretrain.train.callbacks.display import Display
    from pretrain.train.callbacks.metrics_log import LOGGERS, MetricsFile
    from pretrain.train.callbacks.run_state import RunState
    from pretrain.train.callbacks.signal.health import SignalHealth
    from pretrain.train.loop import Trainer

    for unusual in (learning_rate.remark(config.schedule, config.train.steps), branch_warmup.remark(config)):
        if unusual and info.rank == 0:
            print(f"fathom: {unusual}", file=sys.stderr)
    with together():
        known = info.rank == 0 and (run_dir / "config.yaml").exists()
        if info.rank == 0 and not known:
            describe(config, run_dir)
        kind = config.task.samples
        data = {
            split: open_samples(config, kind, split)
            for split in (("train", "validation") if config.train.eval_samples else ("train",))
        }
        check_passes(config, data["train"].blend)
        log_p_v = data["train"].blend.log_frequencies() if config.model.init.unigram else None
    engine = build_engine(config, topology, log_p_v)
    callbacks: list[Callback] = [watchdog] if watchdog is not None else []
    trainer = Trainer(config, run_dir, engine, data["train"], data.get("validation"), callbacks)
    resumed = trainer.resume()
    if known:
        callbacks.append(Description())
    metrics = MetricsFile(config.log.interval)
    if info.rank == 0:
        callbacks += [RunState(), metrics, Display(config.log.progress, resumed)]
        callbacks += [logger() for name, logger in LOGGERS.items() if getattr(config.log, name)]
    if config.log.signal_interval:
        callbacks.append(SignalHealth(config.log.signal_interval, reports=info.rank == 0))
    return trainer


if __name__ == "__main__":
    rank = rank_from_environment(os.environ)
    if rank is None:
        sys.exit("fathom: error: pretrain.train.run is started by `fathom pretrain`")
    try:
        code = start_rank(sys.argv[1], sys.argv[2:], rank)
    except Exception as problem:
        if not told(problem):
            traceback.print_exc()
        code = int(exit_code_of(problem))
    if as_exit_code(code) in ENDED_IN_ORDER:
        sys.exit(code)
    leave(code)
