"""Whether `train.loss_kernel` has a kernel for the projection and the loss on this machine."""

from __future__ import annotations

import importlib

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from model.errors import UserError
from model.loss_kernels import INSTEAD, LOSS_KERNELS, LossKernelName


def check_loss_kernel(name: LossKernelName, dtype: torch.dtype, version: str | None, *, gpu: bool) -> None:
    """Raises UserError for a kernel that cannot compute here, naming the nearest choice that can.

    dtype: of weights. version: of its package, None where that is not installed.
    gpu: whether there is one.
    """
    kernel = LOSS_KERNELS[name]
    if not kernel.fused:
        return
    chosen = f"train.loss_kernel={name}"
    if kernel.gpu_only and not gpu:
        raise UserError(f"{chosen} needs a GPU, and this machine has none: {INSTEAD}")
    if version is None:
        raise UserError(
            f"{chosen} needs {kernel.package}, which is not installed: "
            f"install it (pip install '.[{kernel.extra}]'), or {INSTEAD}"
        )
    # Local suffixes (+cu130) count as what they stand for.
    if not SpecifierSet(kernel.releases).contains(Version(version).public, prereleases=True):
        raise UserError(
            f"{chosen} needs {kernel.package}{kernel.releases}, and {version} is installed: {INSTEAD}"
        )
    if kernel.rounds_losses and dtype != torch.float32:
        raise UserError(
            f"{chosen} gives losses in the format of the weights, and bf16 has three digits: "
            f"set train.precision=fp32, or {INSTEAD}"
        )
    try:
        importlib.import_module(kernel.module)
    except Exception as error:  # a broken installation raises whatever its loader meets
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{chosen}: {kernel.package} {version} cannot be imported ({why}): install it anew, or {INSTEAD}"
        ) from None
