"""The facts about one cluster: everything in a batch script that is not about the run itself."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from model.config import Strict
from model.errors import UserError

SITE_VARIABLE = "FATHOM_SITE"

Word = Annotated[str, Field(pattern=r"^[^\s'\"`$\\;&|<>]+$")]
"""A value that goes into the script as it is: no blank, no quote, nothing a shell would read."""
Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]+$")]

OURS = {
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "time",
    "signal",
    "requeue",
    "no-requeue",
    "open-mode",
    "output",
    "error",
    "chdir",
    "array",
    "dependency",
    "partition",
    "account",
    "qos",
    "cpus-per-task",
    "mem",
    "exclusive",
}
"""sbatch options that the script sets itself, from the call or from another key of the site file."""


class ContainerConfig(Strict):
    """A container that the tasks run in, through srun's container options (the pyxis plugin). The batch script itself runs outside of it."""

    image: Line = Field(
        description="Image as `srun --container-image` takes it: a file, or registry#name:tag."
    )
    mounts: list[Line] = Field(
        default_factory=list,
        description="Further mounts, SOURCE:TARGET; the run directory's parent and the data must be visible at the same paths.",
    )
    python: Line = Field("python3", description="Python inside of the container.")


class SiteConfig(Strict):
    """One cluster, or one partition of it. Nothing here has a default that would be right on some clusters only."""

    partition: Word | None = Field(None, description="sbatch --partition; null leaves the cluster's default.")
    account: Word | None = Field(None, description="sbatch --account; null leaves your default.")
    qos: Word | None = Field(None, description="sbatch --qos; null leaves your default.")
    time: str | None = Field(
        None, description="Time limit where `fathom submit` gets no --time: minutes, HH:MM:SS or D-HH:MM:SS."
    )
    gpus_per_node: int = Field(
        ge=0, description="GPUs of one node, which is also the number of tasks there; 0 for nodes without."
    )
    tasks_per_node: int | None = Field(
        None,
        ge=1,
        description="Tasks on a node without GPUs; null with GPUs, where there is one task for each.",
    )
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node",
        description="How GPUs are asked for: --gpus-per-node=N, --gres=gpu:N, or not at all where a job always gets whole nodes.",
    )
    gpu_type: Word | None = Field(
        None, description="Type within the request, such as h100 in gpu:h100:8; null asks for any."
    )
    cpus_per_task: int | None = Field(
        None,
        ge=1,
        description="CPU cores of one task: training, data loading and checkpoint writing; null leaves Slurm's default of one.",
    )
    memory: Word | None = Field(
        None, description="sbatch --mem, per node; 0 means all of it, null leaves the cluster's default."
    )
    exclusive: bool = Field(False, description="sbatch --exclusive: whole nodes.")
    signal_margin: int = Field(
        300,
        ge=30,
        description="Seconds before the time limit at which the run is told to save and leave. Slurm may be up to 60 s early or late.",
    )
    modules: list[Word] = Field(
        default_factory=list, description="Environment modules to load, after `module purge`."
    )
    setup: list[Line] = Field(
        default_factory=list, description="Shell lines that run on the first node before the tasks start."
    )
    environment: dict[str, str] = Field(
        default_factory=dict,
        description="Environment variables of the tasks, taken literally: network interfaces, NCCL settings.",
    )
    exclude_bad_nodes: bool = Field(
        False,
        description="A node that fails its check before the first step is excluded from the following starts of the job (its ExcNodeList).",
    )
    container: ContainerConfig | None = Field(
        None, description="Run the tasks in a container; null runs them directly."
    )
    python: Line | None = Field(
        None,
        description="Python of the batch script, and of the tasks where there is no container; null means the one that runs `fathom submit`.",
    )
    srun: list[Line] = Field(
        default_factory=list, description="Further options of srun, such as --cpu-bind=none."
    )
    sbatch: list[Line] = Field(
        default_factory=list,
        description="Further #SBATCH options, such as --constraint=a100 or --mail-type=END.",
    )

    @property
    def tasks(self) -> int:
        """Tasks on one node."""
        return self.tasks_per_node or self.gpus_per_node

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        return (
            {
                name: str(text) if isinstance(text, int) and not isinstance(text, bool) else text
                for name, text in value.items()
            }
            if isinstance(value, dict)
            else value
        )

    @field_validator("time", "memory", "account", "gpu_type", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is no name of an environment variable")
            if "\n" in text or "\0" in text:
                raise ValueError(f"environment.{name} must be one line")
        return value

    @field_validator("sbatch", "srun")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for option in value:
            match = re.match(r"--([a-z0-9-]+)(?:[= ]|$)", option)
            if match is None:
                raise ValueError(f"{option!r} must be a long option such as --constraint=a100")
            if match[1] in OURS:
                raise ValueError(
                    f"{option!r} is set by the batch script itself: use the key of the site file or the option of `fathom submit` for it"
                )
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_time(value)
        return value

    @model_validator(mode="after")
    def _tasks(self) -> SiteConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} with gpus_per_node={self.gpus_per_node}: there is one task for each GPU; remove tasks_per_node"
            )
        if not self.gpus_per_node and self.tasks_per_node is None:
            raise ValueError(
                "tasks_per_node is needed with gpus_per_node=0: the number of tasks on a node without GPUs"
            )
        return self


class _Loader(yaml.SafeLoader):
    """YAML without the old number forms, in which 24:00:00 is 86400 and 010 is 8."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag in ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^(?:0|[1-9][0-9]*)$"), list("0123456789"))


def parse_time(text: str) -> int:
    """Seconds of a Slurm time: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError for anything else, and for 0, which Slurm takes as no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        raise UserError(f"time={text!r} is no time limit: give minutes, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (int(part) if part is not None else None for part in match.groups())
    assert first is not None
    if days is not None:
        seconds = days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        seconds = first * 3600 + (second or 0) * 60 + third
    else:
        seconds = first * 60 + (second or 0)
    if seconds == 0:
        raise UserError(
            f"time={text!r} is no time limit: Slurm would take it as unlimited; give minutes, HH:MM:SS or D-HH:MM:SS"
        )
    return seconds


def load_site(path: Path | str | None) -> SiteConfig:
    """Reads a site file, or the one that FATHOM_SITE names. Raises UserError naming the file and the first wrong key."""
    path = path or os.environ.get(SITE_VARIABLE) or None
    if path is None:
        raise UserError(
            f"no site file: give --site FILE or set {SITE_VARIABLE}; slurm/site.example.yaml is one to copy"
        )
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"site file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"site file {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"site file {path} must be a mapping of keys such as partition and gpus_per_node")
    try:
        return SiteConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        words = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("missing", "value_error") else f"={first['input']!r}"
        hint = f" (known: {', '.join(SiteConfig.model_fields)})" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"site file {path}: {key}{value}{': ' if key else ''}{words}{hint}") from None
