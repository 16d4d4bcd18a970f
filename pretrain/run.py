"""One run from configuration to exit code: what every process does, and the start of local processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from model.errors import UserError
from model.files import atomic_write_text
from parallel.exit_codes import ExitCode
from parallel.launch import RankInfo, free_port, has_gpu, init_process_group, rank_from_environment, start_local
from parallel.topology import Layout, Topology, check_layout
from pretrain.config import RunConfig
from pretrain.load_config import complete_model, dump_config, load_config
from pretrain.sampling import micro_batch_indices

LOCAL_ARGUMENTS = ("-m", "pretrain.run")


def prepare(path: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run with the vocabulary of its data filled in. Raises UserError for anything that cannot work."""
    config = load_config(path, overrides)
    for corpus in config.data.corpora:
        if not (Path(corpus.path) / "dataset.json").is_file():
            raise UserError(
                f"data.corpora: {corpus.path} is no prepared data set (it has no dataset.json): run `fathom data prepare` first, or correct the path"
            )
    vocab = int(json.loads((Path(config.data.corpora[0].path) / "dataset.json").read_text())["vocab_size"])
    config.model = complete_model(config, vocab)
    return config


def check_sizes(config: RunConfig, world: int) -> Layout:
    """The layout of a run over `world` processes. Raises UserError where degrees or batch sizes do not fit."""
    layout = check_layout(config.parallel, config.model, world)
    micro_batch_indices(0, 0, 0, layout.data, config.train.micro_batch_size, config.train.global_batch_size)
    return layout


def processes_of(config: RunConfig) -> int:
    """Local processes to start: as configured, else one per GPU, else one."""
    import torch

    if config.parallel.processes is not None:
        return config.parallel.processes
    return max(1, torch.cuda.device_count()) if has_gpu() else 1


def pretrain(path: str, overrides: Sequence[str]) -> int:
    """Runs a configuration on the processes that a launcher started, or on local ones that this starts. Returns the exit code."""
    info = rank_from_environment(os.environ)
    if info is not None:
        return run_rank(prepare(path, overrides), info)
    config = prepare(path, overrides)
    world = processes_of(config)
    check_sizes(config, world)
    if world == 1:
        return run_rank(config, RankInfo(0, 1, 0, "127.0.0.1", free_port()))
    return start_local([*LOCAL_ARGUMENTS, path, *overrides], world)


def run_rank(config: RunConfig, info: RankInfo) -> int:
    """Everything one process does. Returns the exit code of the process."""
    import torch

    from pretrain.state import record_failure
    from pretrain.stop import task_exit_code

    layout = check_sizes(config, info.world_size)
    run_dir = Path(config.runs_dir) / config.name
    init_process_group(info, config.parallel.timeout_minutes)
    try:
        code, reason = _train(config, info, Topology(layout), run_dir)
    except (UserError, OSError) as error:
        record_failure(run_dir, info.rank, ExitCode.USER_ERROR if isinstance(error, UserError) else ExitCode.CRASH, str(error))
        if os.environ.get("FATHOM_DEBUG") == "1":
            raise
        if info.rank == 0 or not isinstance(error, UserError):
            print(f"fathom: error: {error}", file=sys.stderr)
        return int(ExitCode.USER_ERROR if isinstance(error, UserError) else ExitCode.CRASH)
    if info.rank == 0:
        print(f"{config.name}: {reason}", file=sys.stderr)
    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
    return task_exit_code(code)


def _train(config: RunConfig, info: RankInfo, topology: Topology, run_dir: Path) -> tuple[ExitCode, str]:
    from pretrain.build import build_engine
    from pretrain.callbacks import Callback
    from pretrain.callbacks.display import Display
    from pretrain.callbacks.logging import MetricsFile, TensorBoard
    from pretrain.callbacks.run_state import RunState
    from pretrain.callbacks.signal_health import SignalHealth
    from pretrain.data import open_blend
    from pretrain.environment import environment
    from pretrain.loop import Trainer

    if info.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        atomic_write_text(run_dir / "config.yaml", dump_config(config))
        atomic_write_text(run_dir / "environment.json", json.dumps(environment(), indent=1))
    cache = Path(config.data.cache) if config.data.cache else None
    blends = {
        split: open_blend(config.data.corpora, split, config.data.seq_length, config.train.seed, cache)
        for split in (("train", "validation") if config.train.eval_samples else ("train",))
    }
    engine = build_engine(config, topology)
    callbacks: list[Callback] = []
    trainer = Trainer(config, run_dir, engine, blends["train"], blends.get("validation"), callbacks)
    resumed = trainer.resume()
    metrics = MetricsFile(config.log.interval)
    if info.rank == 0:
        callbacks += [RunState(), metrics, Display(config.log.progress, resumed)]
        callbacks += [TensorBoard()] if config.log.tensorboard else []
    if config.log.signal_interval:
        callbacks.append(SignalHealth(config.log.signal_interval, metrics.write if info.rank == 0 else None))
    return trainer.run()


if __name__ == "__main__":
    rank = rank_from_environment(os.environ)
    if rank is None:
        sys.exit("fathom: error: pretrain.run is started by `fathom pretrain`")
    sys.exit(run_rank(prepare(sys.argv[1], sys.argv[2:]), rank))
