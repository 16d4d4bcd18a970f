"""GPUs: one row each. How fast they compute, and for some what a plan needs to know.

Speeds are dense matrix-unit TFLOP/s with fp32 accumulation at the rated boost clock.
They are from the makers' data sheets, where figures "with sparsity" are halved.
fp32 is the rate of the ordinary cores,
for PyTorch computes fp32 products there unless TF32 is switched on.
Memory and bandwidths are the data sheets' for the SXM form in hosts of eight GPUs
with one network port of 400 Gbit/s per GPU (A100: 200 Gbit/s).
Shares of the peak are fitted to published runs, one number per kind of work: docs/performance.md.
A GPU without a row has no peak and no plan: never a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError

GIB = 2**30
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU. Fields from `memory` on are for plans, and given where `name` is."""

    devices: str
    """The driver's names (`torch.cuda.get_device_name`), a pattern that must match in full.

    Laptop versions, MIG slices and custom parts share a name's beginning but not its speed.
    """
    tflops: Mapping[str, float]
    """Peak in TFLOP/s by precision: bf16, fp16, fp8, fp32."""
    name: str = ""
    """What `fathom plan --gpu` calls it; empty where it cannot be planned for."""
    memory: float = 0.0
    """Bytes."""
    bandwidth: float = 0.0
    """Of its memory, bytes per second."""
    link: float = 0.0
    """Of NVLink in one direction, bytes per second."""
    network: float = 0.0
    """Of its network port, bytes per second."""
    matmul: float = 0.0
    """Share of the peak that matrix products reach."""
    attention: float = 0.0
    """Share of the peak that fused attention reaches."""
    fp8: float = 0.0
    """Share of the FP8 peak that matrix products reach."""
    fitted: bool = True
    """The shares come from published runs on this GPU."""

    def peak(self, precision: str) -> float:
        """Operations per second in bf16, fp32 or fp8.

        Raises UserError for a format that it does not compute.
        """
        if precision not in self.tflops:
            raise UserError(
                f"--gpu {self.name} has no {precision}: plan with train.precision=bf16 and "
                "train.fp8.recipe=none, or for another GPU"
            )
        return self.tflops[precision] * 1e12


GPUS = (
    Gpu(
        devices=r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe|A800-SXM4-80GB|A800 80GB PCIe",
        tflops={"bf16": 312, "fp16": 312, "fp32": 19.5},
        name="a100",
        memory=80 * GIB,
        bandwidth=2.04e12,
        link=300e9,
        network=25e9,
        matmul=0.76,
        attention=0.3,
    ),
    Gpu(devices=r"A30", tflops={"bf16": 165, "fp16": 165, "fp32": 10.3}),
    Gpu(devices=r"A40", tflops={"bf16": 149.7, "fp16": 149.7, "fp32": 37.4}),
    Gpu(devices=r"A10", tflops={"bf16": 125, "fp16": 125, "fp32": 31.2}),
    Gpu(devices=r"RTX A6000", tflops={"bf16": 154.8, "fp16": 154.8, "fp32": 38.7}),
    Gpu(
        devices=r"H100 80GB HBM3|H800",
        tflops={"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67},
        name="h100",
        memory=80 * GIB,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
        matmul=0.54,
        attention=0.25,
        fp8=0.54,
    ),
    Gpu(devices=r"H100 PCIe", tflops={"bf16": 756, "fp16": 756, "fp8": 1513, "fp32": 51}),
    Gpu(devices=r"H100 NVL|H200 NVL", tflops={"bf16": 835, "fp16": 835, "fp8": 1671, "fp32": 60}),
    Gpu(
        devices=r"H200|GH200 (120|144G HBM3e|480)(GB)?",
        tflops={"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67},
        name="h200",
        memory=141e9,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
        matmul=0.54,
        attention=0.25,
        fp8=0.54,
    ),
    Gpu(devices=r"H20", tflops={"bf16": 148, "fp16": 148, "fp8": 296, "fp32": 44}),
    Gpu(
        devices=r"B200",
        tflops={"bf16": 2250, "fp16": 2250, "fp8": 4500, "fp32": 75},
        name="b200",
        memory=180e9,
        bandwidth=7.7e12,
        link=900e9,
        network=50e9,
        matmul=0.54,
        attention=0.25,
        fp8=0.54,
        fitted=False,
    ),
    Gpu(devices=r"GB200", tflops={"bf16": 2500, "fp16": 2500, "fp8": 5000, "fp32": 80}),
    Gpu(devices=r"L40S", tflops={"bf16": 362, "fp16": 362, "fp8": 733, "fp32": 91.6}),
    Gpu(devices=r"L40", tflops={"bf16": 181, "fp16": 181, "fp8": 362, "fp32": 90.5}),
    Gpu(devices=r"L4", tflops={"bf16": 121, "fp16": 121, "fp8": 242, "fp32": 30.3}),
    Gpu(devices=r"RTX 6000 Ada Generation", tflops={"bf16": 364, "fp16": 364, "fp8": 728, "fp32": 91.1}),
    Gpu(devices=r"(GeForce )?RTX 3090", tflops={"bf16": 71, "fp16": 71, "fp32": 35.6}),
    Gpu(devices=r"(GeForce )?RTX 4090", tflops={"bf16": 165, "fp16": 165, "fp8": 330, "fp32": 82.6}),
    Gpu(devices=r"(GeForce )?RTX 5090", tflops={"bf16": 209.5, "fp16": 209.5, "fp8": 419, "fp32": 104.8}),
    Gpu(devices=r"V100-SXM2-(16|32)GB", tflops={"fp16": 125, "fp32": 15.7}),
)
PLANNED = {gpu.name: gpu for gpu in GPUS if gpu.name}


def planned_gpu(name: str) -> Gpu:
    """The GPU of that name, in upper or lower case.

    Raises UserError for another: a plan for a guessed machine would be worth nothing.
    """
    if name.lower() not in PLANNED:
        raise UserError(
            f"--gpu {name} is not known: choose one of {', '.join(PLANNED)}, "
            "or add it to parallel/hardware/gpus.py"
        )
    return PLANNED[name.lower()]


def peak_tflops(gpu: str | None, precision: str = "bf16") -> float | None:
    """Dense peak of one GPU in TFLOP/s; None where the GPU, or that precision on it, has no entry.

    gpu: the driver's name, e.g. "NVIDIA H100 80GB HBM3".
    precision: bf16, fp16, fp8 or fp32, or PyTorch's bfloat16, float16, float32.
    """
    name = re.sub(r"^(NVIDIA|Tesla|\s)+", "", gpu or "").strip()
    for known in GPUS:
        if re.fullmatch(known.devices, name, flags=re.IGNORECASE):
            return known.tflops.get(DTYPES.get(precision, precision))
    return None


def mfu(
    tokens_per_s: float, flops_per_token: float, gpu: str | None, count: int = 1, precision: str = "bf16"
) -> float | None:
    """Model FLOPs utilisation; 1 is the peak (Chowdhery et al. 2022, appendix B).

    That is the model's operations per second over the peak of all GPUs.
    tokens_per_s: over all `count` GPUs.
    flops_per_token: forward and backward, `FlopCount.model`.
    None where the peak is unknown.
    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} GPUs: must be at least 1")
    peak = peak_tflops(gpu, precision)
    return None if peak is None else tokens_per_s * flops_per_token / (count * peak * 1e12)
