"""Site files: read as they look, and refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import UserError
from pretrain.cluster.site_file import load_site


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus_per_node: 8\npartitoin: x", r"partitoin='x': .*known: partition, account"),
        ("partition: gpu", "gpus_per_node: Field required"),
        ("gpus_per_node: 0", "tasks_per_node is needed with gpus_per_node=0"),
        ("{gpus_per_node: 8, tasks_per_node: 4}", "there is one task for each GPU; remove tasks_per_node"),
        ("gpus_per_node: 8\nsbatch: [--time=3]", r"sbatch: '--time=3' is set by the batch script itself"),
        ("gpus_per_node: 8\nsrun: [label]", r"srun: 'label' must be a long option"),
        (
            "gpus_per_node: 8\nsbatch: ['--gpus-per-node=1']",
            "sbatch: '--gpus-per-node=1' would replace the request for GPUs",
        ),
        ("gpus_per_node: 8\nsbatch: ['--comment=a\"b']", "quote that is not closed"),
        ("gpus_per_node: 8\nsbatch: ['--comment=\\\"b']", r"character that cannot stand in a #SBATCH line"),
        ("gpus_per_node: 8\ntime: 99:99:99", "is no time limit"),
        ("gpus_per_node: true", "gpus_per_node=True"),
        ("gpus_per_node: ８", "gpus_per_node='８'"),
        ("gpus_per_node: 1000000", "gpus_per_node=1000000"),
        ("gpus_per_node: 8\nmemory: １6G", "memory='１6G'"),
        ("gpus_per_node: 8\nmodules: ['a(b)']", r"modules\.0='a\(b\)'"),
        ("gpus_per_node: 8\nmodules: ['-gcc']", r"modules\.0='-gcc'"),
        ("gpus_per_node: 8\nmodules: ['a#b']", r"modules\.0='a#b'"),
        (
            'gpus_per_node: 8\nsetup: ["a\\tb"]',
            r"setup\.0: 'a\\tb' has a line end, a tab or another character",
        ),
        ('gpus_per_node: 8\npython: "/x\\e[2J"', r"python: '/x\\x1b\[2J' has a line end"),
        ('gpus_per_node: 8\nenvironment: {A: "a\\rb"}', r"environment\.A must be one line"),
        ("gpus_per_node: 8\nenvironment: {PYTHONPATH: /x}", "PYTHONPATH is a variable of the batch script"),
        ("gpus_per_node: 8\npartition: a b", "partition='a b'"),
        ("gpus_per_node: 8\ntime: 0", "is no time limit: Slurm would take it as unlimited"),
        ("gpus_per_node: 8\nenvironment: {A-B: x}", "'A-B' is no name of an environment variable"),
        ("gpus_per_node: 8\nenvironment: {A: true}", r"environment\.A=True"),
        ("- 1", "must be a mapping"),
        ("a: [", "is no YAML"),
    ],
)
def test_site_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "site.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_site(tmp_path / "site.yaml")


def test_site_file_is_read_as_it_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number forms of YAML 1.1.

    There 24:00:00 would be 86400 (minutes, to Slurm), and 0x10 and 010 other numbers.
    """
    (tmp_path / "site.yaml").write_text(
        "{gpus_per_node: 8, time: 24:00:00, memory: 0, exclusive: true, "
        "environment: {A: 1, B: 010, C: on, D: 1.50}}"
    )
    monkeypatch.setenv("FATHOM_SITE", str(tmp_path / "site.yaml"))
    site = load_site(None)
    assert (site.time, site.memory, site.exclusive, site.environment) == (
        "24:00:00",
        "0",
        True,
        {"A": "1", "B": "010", "C": "on", "D": "1.50"},
    )


def test_no_site_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FATHOM_SITE", raising=False)
    with pytest.raises(
        UserError, match="no site file: give --site FILE or set FATHOM_SITE; `fathom init FOLDER` writes one"
    ):
        load_site(None)
    with pytest.raises(UserError, match="nowhere: No such file"):
        load_site(tmp_path / "nowhere")


BOMB = b"a0: &a0 [1]\n" + b"".join(
    b"a%d: &a%d [%s]\n" % (n, n, b",".join([b"*a%d" % (n - 1)] * 9)) for n in range(1, 10)
)
DAMAGED = {
    "no text": b"gpus_per_node: 8\npartition: \xff\xfe",
    "nested": b"a: " + b"[" * 400,
    "tag of a number": b"gpus_per_node: !!int abc",
    "tag of a time": b"time: !!timestamp 2024-13-45",
    "tag of a truth": b"exclusive: !!bool abc",
    "tag of bytes": b"setup: !!binary abc",
    "tag of pairs": b"modules: !!omap [a: 1]",
    "tag of Python": b"setup: !!python/object/apply:os.system [id]",
    "large number": b"gpus_per_node: " + b"9" * 5000,
    "tagged large number": b"gpus_per_node: !!int " + b"9" * 5000,
    "list as a key": b"gpus_per_node: 8\n? [a]\n: 1",
    "key twice": b"gpus_per_node: 8\ntime: 01:00:00\ntime: 09:00:00",
    "key twice inside": b"gpus_per_node: 8\nenvironment: {A: 1, A: 2}",
    "number as a key": b"gpus_per_node: 8\n1: 2",
    "aliases of aliases": BOMB,
    "itself": b"gpus_per_node: &a [*a]",
    "escape code": b'gpus_per_node: 8\n"\\e]0;x\\a": 1',
    "empty": b"",
    "too large": b"#" * (1 << 20) + b"#",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_site_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(UserError) as refusal:
        load_site(path)
    message = str(refusal.value)
    assert message.startswith(f"site file {path}")
    assert message.isprintable()
    assert len(message.replace(str(path), "")) < 700


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "."])
def test_what_is_no_file(name: str) -> None:
    with pytest.raises(UserError, match="is no regular file"):
        load_site(name)
