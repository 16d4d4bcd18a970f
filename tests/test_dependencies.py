"""What the code imports is what pyproject.toml declares."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from model.loss_kernels import LOSS_KERNELS

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("model", "parallel", "pretrain", "tools")
REACHED_INTO = ("deepspeed", "liger-kernel", "megatron-core", "torch", "transformer-engine", "transformers")
"""Packages whose inner parts are used, and which may therefore change under us."""
TRACKERS = ("wandb", "mlflow", "comet", "aim")
"""Extras, one for each tracker of metrics."""
LOADED_BY_OTHERS = {"tensorboard": "torch.utils.tensorboard", "zstandard": "fsspec, for .zst files"}
"""Declared although no import names them."""


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> dict[str, str]:
    """Name and range of the needed packages, and of those of some extras."""
    content = project()
    lines = [
        *content["dependencies"],
        *(line for extra in extras for line in content["optional-dependencies"][extra]),
    ]
    matches = [re.match(r"([\w.-]+)(?:\[[^\]]*\])?(.*)", line) for line in lines]
    return {normal(match[1]): match[2] for match in matches if match}


def imported(folders: Iterable[str]) -> dict[str, str]:
    """Top-level modules of other packages, each with a file that imports it."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    own = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {path.name for path in ROOT.iterdir()}
    other = own | set(sys.stdlib_module_names)
    found: dict[str, str] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top not in other:
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


@functools.cache
def installed_packages() -> Mapping[str, list[str]]:
    """Packages by the modules they bring. Reads the lists of all installed files."""
    return packages_distributions()


def packages_of(module: str) -> set[str]:
    """Packages that bring a module. Many share `google` and `megatron`: theirs are named here."""
    shared = {"google": "protobuf", "megatron": "megatron-core", "transformer_engine": "transformer-engine"}
    shared |= {"mlflow": "mlflow-skinny", "comet_ml": "comet-ml", "liger_kernel": "liger-kernel"}
    return (
        {shared[module]}
        if module in shared
        else {normal(name) for name in installed_packages().get(module, [module])}
    )


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (SHIPPED, ("te", "digits", "kernels", "liger", "speech", *TRACKERS)),
        (("benchmarks", "tests"), ("te", "dev", "kernels", "liger", "clients", *TRACKERS)),
    ],
    ids=["shipped", "benchmarks and tests"],
)
def test_every_import_is_declared(folders: tuple[str, ...], extras: tuple[str, ...]) -> None:
    known = declared(*extras)
    assert {
        module: file for module, file in imported(folders).items() if not packages_of(module) & known.keys()
    } == {}


def test_nothing_is_declared_in_vain() -> None:
    used = {package for module in imported(SHIPPED) for package in packages_of(module)}
    assert declared().keys() - used - LOADED_BY_OTHERS.keys() == set()


def test_what_is_reached_into_has_an_upper_bound() -> None:
    ranges = declared("te", "liger")
    assert {name: ranges[name] for name in REACHED_INTO if "<" not in ranges[name]} == {}


def test_losses_are_checked_for_the_releases_that_are_declared() -> None:
    kernels = [kernel for kernel in LOSS_KERNELS.values() if kernel.extra]
    assert kernels
    for kernel in kernels:
        assert declared(kernel.extra)[kernel.package] == kernel.releases


def test_the_pins_are_in_the_ranges() -> None:
    packaging = pytest.importorskip("packaging.specifiers")
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {normal(name): version for name, version in pins.items()}
    for name, wanted in declared("dev").items():
        assert versions[name] in packaging.SpecifierSet(wanted.partition(";")[0]), name
