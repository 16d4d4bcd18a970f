"""What would fail once a run has waited in the queue, found before it is put there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from model.config import ModelConfig
from model.errors import UserError
from parallel.checkpoint.folders import newest_in
from pretrain.cluster.site_file import SiteConfig
from pretrain.cluster.slurm_words import MOST_NODES, parse_nodes
from pretrain.config.load import complete_model
from pretrain.config.schema import RunConfig
from pretrain.data.manifest import MANIFEST, Manifest, load_manifest
from pretrain.train.checks.before_start import check_source
from pretrain.train.same_run import check_goes_on

T = TypeVar("T")

OVERRIDING = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_EXCLUSIVE": "exclusive",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GRES": "gres",
    "SBATCH_JOB_NAME": "job-name",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_NO_REQUEUE": "requeue",
    "SBATCH_OPEN_MODE": "open-mode",
    "SBATCH_OUTPUT": "output",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}
"""Variables that sbatch takes over the script, each with the option in the script."""


class Problems:
    """Mistakes found so far, so that a dry run can name them all."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        """One mistake each."""

    def attempt(self, action: Callable[..., T], *arguments: object) -> T | None:
        """What an action returns, or None where it finds a mistake, of which note is taken."""
        try:
            return action(*arguments)
        except UserError as error:
            self.add(*getattr(error, "problems", [str(error)]))
            return None

    def add(self, *lines: str) -> None:
        """Takes note of mistakes, each once: the elements of an array share most of theirs."""
        self.lines += [line for line in lines if line not in self.lines]


def one_error(problems: list[str]) -> UserError:
    """Several mistakes as the one to raise."""
    rest = len(problems) - 1
    more = f" (and {rest} more problem{'s' if rest > 1 else ''}: --dry-run names them all)" if rest else ""
    return UserError(problems[0] + more)


def check_run(run_dir: Path, config: RunConfig, problems: Problems) -> None:
    """What a run needs when it starts: its data, and the checkpoint that it begins from or goes on
    from.
    """
    for corpus in config.data.corpora:
        if (Path(corpus.path) / MANIFEST).is_file():
            problems.attempt(load_manifest, corpus.path)
        else:
            problems.add(
                f"data.corpora: {corpus.path} holds no {MANIFEST}: "
                "prepare it with `fathom data prepare`, or correct the path"
            )
    first = config.data.corpora[0].path
    newest = newest_in(run_dir / "checkpoints")
    if (Path(first) / MANIFEST).is_file():
        model = problems.attempt(lambda: _complete(config, load_manifest(first)))
        if model is not None and newest is not None:
            problems.attempt(check_goes_on, newest, config.model_copy(update={"model": model}))
    problems.attempt(check_source, config, run_dir)


def _complete(config: RunConfig, manifest: Manifest) -> ModelConfig:
    return complete_model(config, manifest.vocab_size, manifest.patch_correlations, manifest.moments)


def allowed_nodes(config: RunConfig, site: SiteConfig, nodes: str) -> list[int]:
    """The numbers of nodes of a range on which layout and batch sizes come out even.

    Raises UserError where that is none, or not the smallest.
    """
    low, high = parse_nodes(nodes)
    # No data-parallel rank can do less than one sample of a step.
    degrees = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
    most = min(config.train.global_batch_size * degrees // site.tasks, MOST_NODES)
    problem = misfit(config, low * site.tasks)
    if problem is None:
        return [
            low,
            *(
                number
                for number in range(low + 1, min(high, most) + 1)
                if misfit(config, number * site.tasks) is None
            ),
        ]
    near = range(low + 1, min(8 * high, most) + 1)
    fitting = next((number for number in near if misfit(config, number * site.tasks) is None), None)
    hint = f"; {fitting} nodes would fit" if fitting else ""
    raise UserError(f"--nodes {nodes} ({low * site.tasks} processes): {problem}{hint}")


def misfit(config: RunConfig, world: int) -> str | None:
    """Why a run does not fit a number of processes; None where it does."""
    from pretrain.train.checks.feasibility import fit_processes

    try:
        fit_processes(config, world)
    except UserError as error:
        return str(error)
    return None


def overriding(script: str, env: Mapping[str, str]) -> Iterator[str]:
    """Variables of the environment by which sbatch would do something else than the script says, a
    line each.
    """
    for name, option in OVERRIDING.items():
        if name in env and re.search(rf"^#SBATCH --{option}\b(?!-)", script, re.MULTILINE):
            yield (
                f"{name} in your environment would win over `#SBATCH --{option}` of the script: unset {name}"
            )
    if "SBATCH_WAIT" in env:
        yield "SBATCH_WAIT in your environment would keep sbatch until the job has ended: unset SBATCH_WAIT"
