"""The facts about one cluster: everything in a batch script that is not about the run itself."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from model.errors import UserError
from model.sections import Strict
from model.words import printable
from pretrain.cluster.slurm_words import OURS_OF_SBATCH, OURS_OF_SRUN, one_option, parse_time

SITE_VARIABLE = "FATHOM_SITE"
LARGEST_FILE = 1 << 20
OUR_VARIABLES = {
    "CODE",
    "LAST",
    "LIMITS",
    "NODES",
    "PYTHON",
    "PYTHONPATH",
    "RUN",
    "START",
    "SUPERVISE",
    "TASKS",
}
"""Of the batch script."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"{text!r} has a line end, a tab or another character that is not shown")
    return text


Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+:@=,-]+$")]
"""A value that goes into the script as it is: nothing that a shell would read."""
Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./+@=][A-Za-z0-9_./+:@=-]*$")]
Line = Annotated[str, Field(min_length=1), AfterValidator(_printable)]


class ContainerConfig(Strict):
    """A container that the tasks run in, by srun's container options (the pyxis plugin).

    The batch script itself runs outside of it.
    """

    image: Line = Field(
        description="Image as `srun --container-image` takes it: a file, or registry#name:tag."
    )
    mounts: list[Line] = Field(
        default_factory=list,
        description=(
            "Further mounts, SOURCE:TARGET; "
            "the run directory's parent and the data must be visible at the same paths."
        ),
    )
    python: Line = Field("python3", description="Python inside of the container.")


class SiteConfig(Strict):
    """One cluster, or one partition of it. No default would be right on some clusters only."""

    partition: Word | None = Field(None, description="sbatch --partition; null leaves the cluster's default.")
    account: Word | None = Field(None, description="sbatch --account; null leaves your default.")
    qos: Word | None = Field(None, description="sbatch --qos; null leaves your default.")
    time: str | None = Field(
        None, description="Time limit where `fathom submit` gets no --time: minutes, HH:MM:SS or D-HH:MM:SS."
    )
    gpus_per_node: int = Field(
        strict=True,
        ge=0,
        le=256,
        description="GPUs of one node, which is also the number of tasks there; 0 for nodes without.",
    )
    tasks_per_node: int | None = Field(
        None,
        strict=True,
        ge=1,
        le=4096,
        description="Tasks on a node without GPUs; null with GPUs, where there is one task for each.",
    )
    gpu_request: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node",
        description=(
            "How GPUs are asked for: --gpus-per-node=N, --gres=gpu:N, "
            "or not at all where a job always gets whole nodes."
        ),
    )
    gpu_type: Word | None = Field(
        None, description="Type within the request, such as h100 in gpu:h100:8; null asks for any."
    )
    cpus_per_task: int | None = Field(
        None,
        strict=True,
        ge=1,
        le=4096,
        description=(
            "CPU cores of one task: training, data loading and checkpoint writing; "
            "null leaves Slurm's default of one."
        ),
    )
    memory: Word | None = Field(
        None, description="sbatch --mem, per node; 0 means all of it, null leaves the cluster's default."
    )
    exclusive: bool = Field(False, description="sbatch --exclusive: whole nodes.")
    signal_margin: int = Field(
        300,
        strict=True,
        ge=30,
        le=65_535,
        description=(
            "Seconds before the time limit at which the run is told to save and leave. "
            "Slurm may be up to 60 s early or late."
        ),
    )
    modules: list[Module] = Field(
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
        description=(
            "A node that fails its check before the first step, or holds up all others in a run that hangs, "
            "is excluded from the following starts of the job (its ExcNodeList)."
        ),
    )
    container: ContainerConfig | None = Field(
        None, description="Run the tasks in a container; null runs them directly."
    )
    python: Line | None = Field(
        None,
        description=(
            "Python of the batch script, and of the tasks where there is no container; "
            "null means the one that runs `fathom submit`."
        ),
    )
    srun: list[Line] = Field(
        default_factory=list,
        description="Further options of srun, one word each and taken literally, such as --cpu-bind=none.",
    )
    sbatch: list[Line] = Field(
        default_factory=list,
        description="Further #SBATCH options, one word each, such as --constraint=a100 or --mail-type=END.",
    )

    @property
    def tasks(self) -> int:
        """Tasks on one node."""
        return self.tasks_per_node or self.gpus_per_node

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        return {name: _text(item) for name, item in value.items()} if isinstance(value, dict) else value

    @field_validator("time", "memory", "account", "gpu_type", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return _text(value)

    @field_validator("environment")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"environment: {name!r} is no name of an environment variable")
            if name in OUR_VARIABLES:
                raise ValueError(f"environment: {name} is a variable of the batch script: give another name")
            if not text.isprintable():
                raise ValueError(f"environment.{name} must be one line without tabs and control characters")
        return value

    @field_validator("sbatch")
    @classmethod
    def _sbatch(cls, value: list[str]) -> list[str]:
        options = [one_option(option, OURS_OF_SBATCH) for option in value]
        # Slurm has no way to write these two inside of the quotes around a value.
        wrong = next((option for option in options if set(option) & set('"\\')), None)
        if wrong is not None:
            raise ValueError(f'{wrong!r} has a character that cannot stand in a #SBATCH line (" \\)')
        return options

    @field_validator("srun")
    @classmethod
    def _srun(cls, value: list[str]) -> list[str]:
        return [one_option(option, OURS_OF_SRUN) for option in value]

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None:
            parse_time(value, f"time={printable(value)!r}")
        return value

    @model_validator(mode="after")
    def _tasks(self) -> SiteConfig:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node={self.tasks_per_node} with gpus_per_node={self.gpus_per_node}: "
                "there is one task for each GPU; remove tasks_per_node"
            )
        if not self.gpus_per_node and self.tasks_per_node is None:
            raise ValueError(
                "tasks_per_node is needed with gpus_per_node=0: the number of tasks on a node without GPUs"
            )
        request = f"--{self.gpu_request}"
        twice = next((option for option in self.sbatch if option.partition("=")[0] == request), None)
        if self.gpus_per_node and twice is not None:
            raise ValueError(
                f"sbatch: {twice!r} would replace the request for GPUs (gpu_request={self.gpu_request})"
            )
        return self


def _text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class _Loader(yaml.SafeLoader):
    """YAML of plain values, without the old forms in which 24:00:00 is 86400 and 010 is 8."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused by what follows
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands here twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _tag(name: str) -> str:
    return f"tag:yaml.org,2002:{name}"


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (_tag("null"), _tag("merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_tag("bool"), re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver(_tag("int"), re.compile(r"^(?:0|[1-9][0-9]{0,18})$"), list("0123456789"))
_Loader.yaml_constructors = {
    tag: construct
    for tag, construct in yaml.SafeLoader.yaml_constructors.items()
    if tag in {None, *map(_tag, ("null", "bool", "int", "str", "seq", "map"))}
}


def load_site(path: Path | str | None) -> SiteConfig:
    """Reads a site file, or the one that FATHOM_SITE names.

    Raises UserError naming the file and the first wrong key.
    """
    path = path or os.environ.get(SITE_VARIABLE) or None
    if path is None:
        raise UserError(
            f"no site file: give --site FILE or set {SITE_VARIABLE}; "
            "`fathom init FOLDER` writes one with every key"
        )
    content = _read(Path(path))
    if not isinstance(content, dict):
        raise UserError(
            f"site file {printable(path)} must be a mapping of keys such as partition and gpus_per_node"
        )
    try:
        return SiteConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(f"site file {printable(path)}: {_first(error)}") from None


def _read(path: Path) -> object:
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_FILE):
            raise UserError(
                f"site file {printable(path)} is no regular file of at most {LARGEST_FILE >> 20} MiB"
            )
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"site file {printable(path)}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise UserError(
            f"site file {printable(path)} is no YAML: {place}{printable(error.problem)}"
        ) from None
    except RecursionError:
        raise UserError(
            f"site file {printable(path)} is no YAML that can be read: it is nested too deeply"
        ) from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # bytes that are no text, !!int abc, !!bool abc
        raise UserError(f"site file {printable(path)} is no YAML: {printable(error)}") from None


def _first(error: ValidationError) -> str:
    """The first of several problems: key, value, what is wrong with it."""
    first = error.errors()[0]
    key = ".".join(printable(part) for part in first["loc"])
    known = first["type"] in ("missing", "value_error") or not isinstance(first["input"], str | int | float)
    value = "" if known else f"={printable(repr(first['input']), 80)}"
    hint = f" (known: {', '.join(SiteConfig.model_fields)})" if first["type"] == "extra_forbidden" else ""
    return (
        f"{key}{value}{': ' if key else ''}{printable(first['msg'].removeprefix('Value error, '), 300)}{hint}"
    )
