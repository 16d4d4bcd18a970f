"""Peak speed of GPUs, for the share of it that a run uses. A GPU that is not in the table has no peak: never a default.

Numbers are dense matrix-unit TFLOP/s with fp32 accumulation at the rated boost clock, from the makers' data sheets, where "with sparsity" figures are
halved; fp32 is the rate of the ordinary cores, for PyTorch computes fp32 products there unless TF32 is switched on. Names are as the driver
reports them (`torch.cuda.get_device_name`) and must match in full: laptop versions, MIG slices and custom parts share a name's beginning but not its speed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

TABLE: tuple[tuple[str, Mapping[str, float]], ...] = (
    (
        r"A100-SXM4-(40|80)GB|A100-PCIE-40GB|A100 80GB PCIe|A800-SXM4-80GB|A800 80GB PCIe",
        {"bf16": 312, "fp16": 312, "fp32": 19.5},
    ),
    (r"A30", {"bf16": 165, "fp16": 165, "fp32": 10.3}),
    (r"A40", {"bf16": 149.7, "fp16": 149.7, "fp32": 37.4}),
    (r"A10", {"bf16": 125, "fp16": 125, "fp32": 31.2}),
    (r"RTX A6000", {"bf16": 154.8, "fp16": 154.8, "fp32": 38.7}),
    (r"H100 80GB HBM3|H800", {"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67}),
    (r"H100 PCIe", {"bf16": 756, "fp16": 756, "fp8": 1513, "fp32": 51}),
    (r"H100 NVL|H200 NVL", {"bf16": 835, "fp16": 835, "fp8": 1671, "fp32": 60}),
    (r"H200|GH200 (120|144G HBM3e|480)(GB)?", {"bf16": 989, "fp16": 989, "fp8": 1979, "fp32": 67}),
    (r"H20", {"bf16": 148, "fp16": 148, "fp8": 296, "fp32": 44}),
    (r"B200", {"bf16": 2250, "fp16": 2250, "fp8": 4500, "fp32": 75}),
    (r"GB200", {"bf16": 2500, "fp16": 2500, "fp8": 5000, "fp32": 80}),
    (r"L40S", {"bf16": 362, "fp16": 362, "fp8": 733, "fp32": 91.6}),
    (r"L40", {"bf16": 181, "fp16": 181, "fp8": 362, "fp32": 90.5}),
    (r"L4", {"bf16": 121, "fp16": 121, "fp8": 242, "fp32": 30.3}),
    (r"RTX 6000 Ada Generation", {"bf16": 364, "fp16": 364, "fp8": 728, "fp32": 91.1}),
    (r"(GeForce )?RTX 3090", {"bf16": 71, "fp16": 71, "fp32": 35.6}),
    (r"(GeForce )?RTX 4090", {"bf16": 165, "fp16": 165, "fp8": 330, "fp32": 82.6}),
    (r"(GeForce )?RTX 5090", {"bf16": 209.5, "fp16": 209.5, "fp8": 419, "fp32": 104.8}),
    (r"V100-SXM2-(16|32)GB", {"fp16": 125, "fp32": 15.7}),
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def peak_tflops(gpu: str | None, precision: str = "bf16") -> float | None:
    """Dense peak of one GPU in TFLOP/s; None where the GPU, or that precision on it, is not in the table.

    gpu: the driver's name, e.g. "NVIDIA H100 80GB HBM3". precision: bf16, fp16, fp8 or fp32, or PyTorch's bfloat16, float16, float32.
    """
    name = re.sub(r"^(NVIDIA|Tesla|\s)+", "", gpu or "").strip()
    for pattern, speeds in TABLE:
        if re.fullmatch(pattern, name, flags=re.IGNORECASE):
            return speeds.get(DTYPES.get(precision, precision))
    return None


def mfu(
    tokens_per_s: float, flops_per_token: float, gpu: str | None, count: int = 1, precision: str = "bf16"
) -> float | None:
    """Model FLOPs utilisation: the model's operations per second over the peak of all GPUs (Chowdhery et al. 2022, appendix B); 1 is the peak.

    tokens_per_s: over all `count` GPUs. flops_per_token: forward and backward, `FlopCount.model`. None where the peak is unknown.
    Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count={count} GPUs: must be at least 1")
    peak = peak_tflops(gpu, precision)
    return None if peak is None else tokens_per_s * flops_per_token / (count * peak * 1e12)
