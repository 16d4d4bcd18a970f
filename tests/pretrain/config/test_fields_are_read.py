"""Every field of a configuration is read by code that acts on it: none is accepted and ignored.

Found in the source: an attribute of that name, of something that is called as its section is.
What checks a configuration does not count as reading it.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from model.sections import Strict
from pretrain.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGURATION = (
    "pretrain/config/",
    "model/config.py",
    "model/fields.py",
    "model/sections.py",
    "parallel/config.py",
)
NAMES = {
    "RunConfig": ("config", "run"),
    "Corpus": ("corpus",),
    "RoleFactors": ("role",),
    "BatchRampup": ("ramp",),
    "LengthWarmup": ("warmup",),
    "FrameMoments": ("told",),
}
"""Class -> what its objects are called, beside `config`, `settings` and the field they are in."""
BY_NAME = {
    **dict.fromkeys(
        ("embedding", "stream_norm", "norm", "bias", "hidden", "output"),
        "FactorsConfig: `factors_of` goes over all of them",
    ),
    **dict.fromkeys(("tensorboard", "wandb", "mlflow", "comet", "aim"), "LogConfig: `LOGGERS` has its name"),
}
"""Fields that no attribute reads -> who does."""


def sections(kind: type[Strict], name: str) -> Iterator[tuple[str, type[Strict]]]:
    """All sections with the name of the field that each is in."""
    yield name, kind
    for field, info in kind.model_fields.items():
        for part in parts(info.annotation):
            if isinstance(part, type) and issubclass(part, Strict):
                yield from sections(part, field)


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from parts(inner)


class Reads(ast.NodeVisitor):
    """Attribute -> what it was an attribute of; `self` is the class that the code is in."""

    def __init__(self) -> None:
        self.found: dict[str, set[str]] = defaultdict(set)
        self.configuration = False
        self.owner = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.owner = self.owner, node.name
        self.generic_visit(node)
        self.owner = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        checks = node.name.lstrip("_").startswith("check") or "validator" in "".join(
            map(ast.unparse, node.decorator_list)
        )
        if not (self.configuration and checks):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        of = node.value
        if isinstance(of, (ast.Attribute, ast.Name)):
            name = of.attr if isinstance(of, ast.Attribute) else of.id
            self.found[node.attr].add(self.owner if name == "self" else name)
        self.generic_visit(node)


def unread(reads: Reads) -> list[str]:
    """Fields that nobody reads, as `section.field`."""
    return [
        f"{name}.{field}"
        for name, kind in dict.fromkeys(sections(RunConfig, "run"))
        for field in kind.model_fields
        if field not in BY_NAME
        and not {name, "config", "settings", kind.__name__, *NAMES.get(kind.__name__, ())}
        & reads.found[field]
    ]


def reads_of(folders: tuple[str, ...]) -> Reads:
    reads = Reads()
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            reads.configuration = path.relative_to(ROOT).as_posix().startswith(CONFIGURATION)
            reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    return reads


def test_every_field_is_read_where_something_is_done_with_it() -> None:
    reads = reads_of(("model", "parallel", "pretrain", "tools"))
    assert not unread(reads), "read them, or remove them; read by name: an entry in BY_NAME"
    everything = {field for _, kind in sections(RunConfig, "run") for field in kind.model_fields}
    assert set(BY_NAME) <= everything


def test_checks_alone_are_no_readers() -> None:
    reads = reads_of(("pretrain/config",))
    assert "train.cuda_graph" in unread(reads)  # conflicts.py and schema.py check it
