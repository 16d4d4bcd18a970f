"""What this machine can do for training, and what to do about what is missing."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.errors import UserError
from parallel.hardware.gpus import peak_tflops
from parallel.hardware.precision import RECIPES, this_machine
from parallel.hardware.versions import in_range, installed, needed, supported
from pretrain.rundir.environment import cpu, gpus

State = Literal["ok", "note", "warning", "failure"]
GIB = 2**30
PROBE = (
    "import torch, megatron.core.models.gpt, deepspeed; "
    "import torch.distributed as d; assert d.is_available()"
)
PROBE_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """One finding.

    state: ok; note: worth knowing; warning: training works, but worse than it could; failure:
    training does not work.
    found: what is there. advice: what to do about it, empty where nothing is to be done.
    """

    name: str
    state: State
    found: str
    advice: str = ""


def python() -> Iterator[Check]:
    """The interpreter."""
    here = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 10) <= sys.version_info[:2] <= (3, 12)
    yield Check(
        "Python",
        "ok" if fits else "failure",
        here,
        "" if fits else "make the environment with Python 3.10, 3.11 or 3.12: make install PYTHON=python3.12",
    )


def packages() -> Iterator[Check]:
    """Needed packages and their supported ranges, and whether those that training cannot do without
    can be imported together.
    """
    present = []
    for name in sorted(needed()):
        version = installed(name)
        if version is None:
            yield Check(
                name, "failure", "not installed", f"make install, or pip install '{name}{supported()[name]}'"
            )
        elif not in_range(name, version):
            yield Check(
                name,
                "failure",
                version,
                f"outside the supported range: pip install '{name}{supported()[name]}'",
            )
        else:
            present.append(f"{name} {version}")
    if present:
        yield Check("packages", "ok", ", ".join(present))
    else:
        yield Check(
            "packages",
            "warning",
            "their supported ranges are not known: Fathom is not installed",
            "pip install -e .",
        )
    yield _imports()


def _imports() -> Check:
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env=_probe_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        # Slowness is no defect: nothing is broken that a new installation would mend.
        advice = (
            "is this machine busy, or the environment on a "
            "slow network file system? Training starts as slowly"
        )
        return Check("imports", "warning", f"not done after {PROBE_SECONDS} s", advice)
    if done.returncode:
        return Check(
            "imports",
            "failure",
            (done.stderr.strip().splitlines() or ["no message"])[-1],
            "repair the environment: make clean install",
        )
    return Check("imports", "ok", "torch, Megatron-core and DeepSpeed import together")


def _probe_environment() -> dict[str, str]:
    return dict(os.environ, DS_ACCELERATOR="cuda" if this_machine().gpu else "cpu", PYTHONWARNINGS="ignore")


def devices() -> Iterator[Check]:
    """GPUs as the driver and as PyTorch see them."""
    import torch

    seen = gpus()
    machine = this_machine()
    if machine.gpu is None:
        if seen:
            why = (
                "this PyTorch is built without CUDA"
                if torch.version.cuda is None
                else f"PyTorch is built for CUDA {torch.version.cuda}, the driver is {seen[0]['driver']}"
            )
            yield Check(
                "GPUs",
                "warning",
                f"{len(seen)} x {seen[0]['name']}, not usable: {why}",
                "install a PyTorch for this driver (pytorch.org/get-started), or update the driver",
            )
        else:
            yield Check(
                "GPUs", "note", "none: training runs on the CPU, for small models and for trying things out"
            )
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    driver = f", driver {seen[0]['driver']}" if seen else ""
    what = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    yield Check(
        "GPUs",
        "ok",
        (
            f"{what}, {memory:.0f} GiB each, compute capability "
            f"{'.'.join(map(str, machine.capability))}, CUDA {torch.version.cuda}{driver}"
        ),
    )
    if not machine.fast_bf16:
        yield Check(
            "bf16",
            "warning",
            f"{machine.gpu} has no bf16 matrix units: precision `auto` trains in fp32",
            "use a GPU of compute capability 8.0 or higher",
        )
    if peak_tflops(machine.gpu) is None:
        yield Check(
            "peak speed", "note", f"{machine.gpu} is not in parallel/hardware/gpus.py: runs report no MFU"
        )


def transformer_engine() -> Iterator[Check]:
    """Transformer Engine, and the FP8 recipes it can run here."""
    machine = this_machine()
    if machine.gpu is None:
        yield Check(
            "Transformer Engine",
            "note",
            "needs a GPU, and FP8 needs Transformer Engine: layers run in plain PyTorch here",
        )
        return
    if machine.te is None:
        advice = (
            "for fused kernels and FP8, with nvcc and cuDNN at hand: "
            "pip install --no-build-isolation '.[te]'; without it, layers run in plain PyTorch"
        )
        yield Check("Transformer Engine", "warning", machine.te_problem, advice)
        return
    yield Check("Transformer Engine", "ok", machine.te)
    recipes = machine.recipes()
    missing = ", ".join(name for name in RECIPES if name not in recipes)
    yield Check(
        "FP8",
        "ok" if recipes else "note",
        ", ".join(recipes) or f"{machine.gpu} has none",
        f"not here: {missing}" if recipes and missing else "",
    )


def communication() -> Iterator[Check]:
    """Collective communication: NCCL for GPUs, gloo for CPUs, and the network below."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Check(
            "communication",
            "failure",
            "this PyTorch is built without torch.distributed",
            "install an official build of PyTorch",
        )
        return
    if this_machine().gpu is not None:
        fits = dist.is_nccl_available()
        version = ".".join(map(str, torch.cuda.nccl.version())) if fits else "missing"
        yield Check(
            "NCCL",
            "ok" if fits else "failure",
            version,
            "" if fits else "install a PyTorch with CUDA from pytorch.org: it carries NCCL",
        )
    elif not dist.is_gloo_available():
        yield Check("gloo", "failure", "missing", "install an official build of PyTorch")
    else:
        yield Check("gloo", "ok", "available, for CPU processes")
    fabrics = Path("/sys/class/infiniband")
    found = sorted(entry.name for entry in fabrics.iterdir()) if fabrics.is_dir() else []
    if found:
        yield Check("InfiniBand", "ok", ", ".join(found))
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY:
            yield Check(
                "locked memory",
                "warning",
                f"limited to {soft // 1024} KiB",
                "RDMA needs to lock memory: ulimit -l unlimited (in a container: --ulimit memlock=-1)",
            )


def slurm() -> Iterator[Check]:
    """Slurm's commands and the site file."""
    from pretrain.cluster.site_file import SITE_VARIABLE, load_site

    found = shutil.which("sbatch")
    if found is None:
        yield Check(
            "Slurm",
            "note",
            "sbatch is not on the path: `fathom submit` does not work here, `fathom pretrain` does",
        )
        return
    version = _output("sbatch", "--version")
    if version is None:
        yield Check(
            "Slurm",
            "note",
            "sbatch is installed, but finds no cluster",
            "go to a login node, or ask for the cluster's slurm.conf, before `fathom submit`",
        )
        return
    yield Check("Slurm", "ok", version)
    if not os.environ.get(SITE_VARIABLE):
        yield Check(
            "site file",
            "note",
            f"{SITE_VARIABLE} names none",
            (
                "`fathom init FOLDER` writes one with every key: fill it in and set "
                f"{SITE_VARIABLE}, or give --site to `fathom submit`"
            ),
        )
        return
    try:
        load_site(None)
    except UserError as error:
        yield Check("site file", "warning", str(error), "`fathom submit` refuses it: correct it")
    else:
        yield Check("site file", "ok", os.environ[SITE_VARIABLE])


def limits() -> Iterator[Check]:
    """Limits that end long runs: shared memory, open files, processes' CPUs, main memory, disk."""
    ranks = max(1, len(gpus()))
    try:
        shared = shutil.disk_usage("/dev/shm")
        small = shared.free < ranks * GIB
        advice = (
            f"NCCL and gloo between {ranks} local ranks want 1 GiB each: "
            f"mount it larger (in a container: --shm-size={ranks * 2}g or --ipc=host)"
        )
        yield Check(
            "/dev/shm",
            "warning" if small else "ok",
            f"{shared.free / GIB:.1f} of {shared.total / GIB:.1f} GiB free",
            advice if small else "",
        )
    except OSError:
        yield Check(
            "/dev/shm", "warning", "missing", "mount a tmpfs there: NCCL and gloo use it between local ranks"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = soft != resource.RLIM_INFINITY and soft < 4096
    yield Check(
        "open files",
        "warning" if low else "ok",
        f"limit {_limit(soft)}, at most {_limit(hard)}",
        "many ranks and data files need more: ulimit -n 65536" if low else "",
    )
    facts = cpu()
    few = facts["usable_cores"] < 2 * len(gpus())
    advice = (
        "less than 2 cores a GPU: launching kernels and loading data will wait; "
        "ask for more (Slurm: --cpus-per-task)"
    )
    yield Check(
        "CPU",
        "warning" if few else "ok",
        f"{facts['model']}, {facts['usable_cores']} of {facts['cores']} cores usable",
        advice if few else "",
    )
    load = os.getloadavg()[0]
    if load > 2 * facts["usable_cores"]:
        yield Check(
            "load",
            "warning",
            f"{load:.0f} processes want {facts['usable_cores']} cores",
            "other work runs here: speeds measured now mean little",
        )
    if facts["memory_bytes"]:
        yield Check("memory", "ok", f"{facts['memory_bytes'] / GIB:.0f} GiB")
    free = shutil.disk_usage(".").free
    yield Check(
        "disk",
        "warning" if free < 20 * GIB else "ok",
        f"{free / GIB:.0f} GiB free here",
        "a checkpoint takes 12 bytes a parameter" if free < 20 * GIB else "",
    )


def compilers() -> Iterator[Check]:
    """What kernels that compile on first use need."""
    compiler = shutil.which("g++") or shutil.which("c++")
    version = (_output(compiler, "--version") or "").splitlines()[:1] if compiler else []
    if version:
        yield Check("C++ compiler", "ok", version[0])
    else:
        yield Check(
            "C++ compiler",
            "warning",
            "none",
            (
                "kernels that compile on first use (optimizer offload) fail: "
                "apt-get install g++, or load a compiler module"
            ),
        )
    if this_machine().gpu is not None and not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        yield Check(
            "nvcc",
            "note",
            "none",
            "needed to build Transformer Engine only: load the cluster's CUDA module, or set CUDA_HOME",
        )


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    python,
    packages,
    devices,
    transformer_engine,
    communication,
    slurm,
    limits,
    compilers,
)


def examine() -> list[Check]:
    """All findings, in order. A check that itself fails becomes a warning that says so."""
    found: list[Check] = []
    for check in CHECKS:
        try:
            found += check()
        except Exception as error:  # one odd machine must not take the whole report away
            found.append(
                Check(
                    check.__name__.replace("_", " "),
                    "warning",
                    f"could not be checked: {type(error).__name__}: {error}",
                )
            )
    return found


def training_possible(found: list[Check]) -> bool:
    """Whether nothing found rules training out."""
    return all(check.state != "failure" for check in found)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
