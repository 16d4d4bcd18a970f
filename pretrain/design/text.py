"""A design as a configuration file: every section once, with the reason over each choice."""

from __future__ import annotations

from textwrap import wrap

from pretrain.config.yaml_reader import Plain, dump
from pretrain.design.wish import Design, put

LINE = 100
Tree = dict[str, "Tree | tuple[Plain, str]"]
"""Sections, and values each with the reason of the choice that it begins; empty inside a choice."""


def configuration(found: Design, command: str) -> str:
    """The text of the file. command: what wrote it."""
    tree: Tree = {}
    for choice in found.choices:
        said: set[str] = set()
        for key, value in choice.values.items():
            top, reason = key.split(".")[0], ""
            if top not in said:
                said.add(top)
                reason = choice.reason
            put(tree, key, (value, reason))
    lines = [f"# {command}", f"name: {found.name}"]
    for section, content in tree.items():
        lines += ["", *_lines(section, content, 0)]
    return "\n".join(lines) + "\n"


def _lines(key: str, content: Tree | tuple[Plain, str], depth: int) -> list[str]:
    indent = "  " * depth
    if isinstance(content, dict):
        inner = [line for name, each in content.items() for line in _lines(name, each, depth + 1)]
        return [f"{indent}{key}:", *inner]
    value, reason = content
    comment = [f"{indent}# {line}" for line in wrap(reason, LINE - len(indent) - 2)]
    text = dump({key: value}).rstrip("\n").splitlines()
    return [*comment, *(indent + line for line in text)]
