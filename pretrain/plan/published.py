"""Published runs, and what the plan's model predicts for them: the honest size of its error."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.cost.flops import flops_per_token, forward_flops
from parallel.config import ParallelConfig, RecomputeConfig
from parallel.hardware.gpus import planned_gpu
from pretrain.plan.layouts import Work, predict

Sizes = Mapping[str, int | str | bool]
"""Fields of ModelConfig."""


@dataclass(frozen=True)
class Published:
    """A run that others measured. tokens_per_s: per GPU; samples: of a step over all GPUs.

    Data-parallel communication is hidden, as theirs is.
    """

    source: str
    what: str
    model: Sizes
    gpu: str
    gpus: int
    seq_length: int
    micro: int
    samples: int
    tokens_per_s: float
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    recompute: str = "none"
    precision: str = "bf16"

    def config(self) -> ModelConfig:
        """The model; its depth scheme has no influence."""
        return model_config(self.model, self.seq_length)


def model_config(sizes: Sizes, seq_length: int) -> ModelConfig:
    """A pre-norm decoder of these sizes."""
    return ModelConfig.model_validate({"scheme": "pre_ln", "max_position_embeddings": seq_length, **sizes})


def _mpt(layers: int, hidden: int, heads: int) -> Sizes:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "vocab_size": 50368,
        "position": "none",
        "bias": False,
    }


def _gpt(layers: int, hidden: int, heads: int) -> Sizes:
    return {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "vocab_size": 51200}


def _llama(layers: int, hidden: int, heads: int, ffn: int) -> Sizes:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "ffn_hidden_size": ffn,
        "num_query_groups": 8,
        "vocab_size": 128256,
        "position": "rotary",
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "bias": False,
        "tie_embeddings": False,
    }


MPT = {
    "125m": _mpt(12, 768, 12),
    "350m": _mpt(24, 1024, 16),
    "760m": _mpt(24, 1536, 12),
    "1b": _mpt(24, 2048, 16),
    "3b": _mpt(32, 2560, 20),
    "7b": _mpt(32, 4096, 32),
    "13b": _mpt(40, 5120, 40),
    "30b": _mpt(48, 7168, 56),
    "70b": _mpt(80, 8192, 64),
}
FOUNDRY = "llm-foundry"


def _foundry(
    size: str, gpu: str, gpus: int, seq: int, micro: int, samples: int, rate: float, recompute: str = "none"
) -> Published:
    return Published(
        FOUNDRY, f"MPT {size}", MPT[size], gpu, gpus, seq, micro, samples, rate, recompute=recompute
    )


def _megatron(
    what: str,
    sizes: Sizes,
    gpus: int,
    micro: int,
    samples: int,
    mfu: float,
    pipeline: int,
    virtual: int,
) -> Published:
    """Megatron-LM on A100 (Korthikanti et al. 2022, table 5, sequence parallelism and selective
    recomputation): a share of 312 TFLOP/s, attention counted in full, turned back into tokens per
    second.
    """
    config = model_config(sizes, 2048)
    flops = flops_per_token(config, 2048).model + 3 * forward_flops(config, 2048).attention_core
    rate = mfu * 312e12 / flops
    return Published(
        "Megatron-LM",
        what,
        sizes,
        "a100",
        gpus,
        2048,
        micro,
        samples,
        rate,
        tensor=8,
        pipeline=pipeline,
        virtual=virtual,
        recompute="selective",
    )


LLAMA_8B, LLAMA_70B = _llama(32, 4096, 32, 14336), _llama(80, 8192, 64, 28672)


def _titan(how: str, gpu: str, gpus: int, samples: int, rate: float, precision: str = "bf16") -> Published:
    """torchtitan's Llama 3.1 8B, sequences of 8192, two samples at a time."""
    what = f"Llama 3.1 8B, {how}"
    return Published(
        "torchtitan",
        what,
        LLAMA_8B,
        gpu,
        gpus,
        8192,
        2,
        samples,
        rate,
        recompute="selective",
        precision=precision,
    )


def _bridge(
    what: str, sizes: Sizes, gpus: int, rate: float, degrees: tuple[int, int, int] = (1, 1, 1)
) -> Published:
    """Megatron-Bridge's FP8 runs on H100, sequences of 8192, batches of 128.

    degrees: tensor and pipeline parallelism, virtual stages.
    """
    one = Published("Megatron-Bridge", what, sizes, "h100", gpus, 8192, 1, 128, rate, precision="fp8")
    tensor, pipeline, virtual = degrees
    return replace(one, tensor=tensor, pipeline=pipeline, virtual=virtual)


@functools.cache
def runs() -> tuple[Published, ...]:
    """All published runs.

    Batches: those of the sources; where a source gives none, the usual one of its recipe.
    """
    return (
        _foundry("125m", "a100", 8, 2048, 40, 640, 142830),
        _foundry("350m", "a100", 8, 2048, 32, 512, 58782),
        _foundry("760m", "a100", 8, 2048, 24, 384, 32434),
        _foundry("1b", "a100", 8, 2048, 14, 448, 20513),
        _foundry("3b", "a100", 8, 2048, 10, 160, 10811),
        _foundry("7b", "a100", 8, 2048, 6, 96, 4641),
        _foundry("13b", "a100", 8, 2048, 2, 48, 2262),
        _foundry("30b", "a100", 8, 2048, 3, 504, 916, "full"),
        _foundry("70b", "a100", 64, 2048, 8, 2048, 410, "full"),
        _foundry("1b", "a100", 8, 16384, 2, 64, 9956),
        _megatron("GPT 22B", _gpt(48, 6144, 64), 8, 4, 4, 0.415, 1, 1),
        _megatron("GPT 175B", _gpt(96, 12288, 96), 64, 1, 64, 0.514, 8, 3),
        _megatron("GPT 530B", _gpt(105, 20480, 128), 280, 1, 280, 0.560, 35, 3),
        _megatron("GPT 1T", _gpt(128, 25600, 160), 512, 1, 512, 0.563, 64, 1),
        _foundry("760m", "h100", 8, 2048, 24, 384, 63147),
        _foundry("1b", "h100", 8, 2048, 14, 112, 45455),
        _foundry("3b", "h100", 16, 2048, 10, 480, 24142),
        _foundry("7b", "h100", 8, 2048, 6, 48, 10643),
        _foundry("13b", "h100", 8, 2048, 2, 16, 4792),
        _foundry("30b", "h100", 32, 2048, 14, 1344, 2308, "full"),
        _foundry("70b", "h100", 64, 2048, 8, 2048, 1039, "full"),
        _titan("eager", "h100", 8, 16, 5762),
        _titan("compiled", "h100", 8, 16, 6667),
        _titan("compiled, FP8", "h100", 8, 16, 8532, "fp8"),
        _titan("compiled, FP8", "h200", 32, 64, 10938, "fp8"),
        _bridge("Llama 3 8B, FP8", LLAMA_8B, 8, 14451),
        _bridge("Llama 3 70B, FP8", LLAMA_70B, 64, 1602, (4, 8, 5)),
    )


def predicted(run: Published) -> float:
    """Tokens per second and GPU that the model predicts for a published run."""
    layout = ParallelConfig(
        tensor=run.tensor,
        pipeline=run.pipeline,
        virtual_stages=run.virtual,
        sequence_parallel=run.tensor > 1,
        recompute=RecomputeConfig(granularity=run.recompute),  # type: ignore[arg-type]
    )
    work = Work(run.config(), run.seq_length, run.samples, run.precision)
    return (
        predict(work, planned_gpu(run.gpu), layout, run.gpus, run.micro, overlap=True).tokens_per_s / run.gpus
    )


def errors(chosen: Sequence[Published] | None = None) -> list[float]:
    """Relative errors, predicted over published minus 1."""
    return [predicted(run) / run.tokens_per_s - 1 for run in (runs() if chosen is None else chosen)]


def table() -> str:
    """Markdown: published and predicted tokens per second and GPU, and the error."""
    lines = [
        "| source | run | GPUs | sequence | layout | published | predicted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run, error in zip(runs(), errors(), strict=True):
        degrees = (
            [f"TP{run.tensor}"] * (run.tensor > 1)
            + [f"PP{run.pipeline}"] * (run.pipeline > 1)
            + [f"VP{run.virtual}"] * (run.virtual > 1)
        )
        layout = ", ".join(
            [" ".join(degrees) or "data parallel"]
            + ([f"{run.recompute} recompute"] if run.recompute != "none" else [])
        )
        cells = (
            run.source,
            run.what,
            f"{run.gpus} x {run.gpu.upper()}",
            run.seq_length,
            layout,
            f"{run.tokens_per_s:,.0f}",
        )
        lines.append(
            "| "
            + " | ".join(map(str, (*cells, f"{(1 + error) * run.tokens_per_s:,.0f}", f"{error:+.0%}")))
            + " |"
        )
    return "\n".join(lines)
