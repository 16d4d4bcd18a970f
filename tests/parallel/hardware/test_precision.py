"""What a run's precision comes to on imagined machines.

Also the one line that says why it cannot be.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.errors import UserError
from parallel.config import Fp8Config, ParallelConfig
from parallel.hardware import precision
from parallel.hardware.precision import RECIPES, Machine, check_sizes, fallback, numerics_for, this_machine
from parallel.topology import check_layout
from pretrain.config.schema import TrainConfig

CPU = Machine(te_problem="is not used without a GPU")
V100 = Machine("Tesla V100-SXM2-16GB", (7, 0), (12, 6), "2.11.0", "")
A100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), (13, 0), "2.11.0", "")
H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), "2.11.0", "", "3.6.0")
H100_OLD_CUDA = Machine("NVIDIA H100 80GB HBM3", (9, 0), (12, 6), "2.11.0", "")
H100_BARE = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0))
B200 = Machine("NVIDIA B200", (10, 0), (13, 0), "2.11.0", "")
RTX_5090 = Machine("NVIDIA GeForce RTX 5090", (12, 0), (13, 0), "2.11.0", "")


def resolved(
    machine: Machine, precision: str = "auto", kernels: str = "auto", recipe: str = "none", **fp8: Any
) -> tuple[torch.dtype, str, str | None]:
    numerics = numerics_for(precision, kernels, Fp8Config(recipe=recipe, **fp8), machine)
    return numerics.dtype, numerics.kernels, numerics.recipe


@pytest.mark.parametrize(
    ("machine", "wishes", "expected"),
    [
        (CPU, {}, (torch.float32, "local", None)),
        (CPU, {"precision": "bf16"}, (torch.bfloat16, "local", None)),
        (V100, {}, (torch.float32, "local", None)),
        (A100, {}, (torch.bfloat16, "te", None)),
        (A100, {"kernels": "local"}, (torch.bfloat16, "local", None)),
        (A100, {"precision": "fp32"}, (torch.float32, "local", None)),
        (A100, {"precision": "fp32", "kernels": "te"}, (torch.float32, "te", None)),
        (H100_BARE, {}, (torch.bfloat16, "local", None)),
        (H100, {"recipe": "blockwise"}, (torch.bfloat16, "te", "blockwise")),
        (H100, {"recipe": "tensorwise", "first_last_bf16": True}, (torch.bfloat16, "te", "tensorwise")),
        (B200, {"recipe": "mxfp8", "precision": "bf16"}, (torch.bfloat16, "te", "mxfp8")),
        (CPU, {"kernels": "local_joined"}, (torch.float32, "local", None)),
        (H100, {"kernels": "te_joined", "recipe": "delayed"}, (torch.bfloat16, "te_apart", "delayed")),
    ],
)
def test_what_wishes_come_to(machine: Machine, wishes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert resolved(machine, **wishes) == expected


def test_what_computes_joins_with_norms() -> None:
    wishes = (("local_joined", CPU, "compile"), ("te_joined", H100, "triton"), ("local", H100, None))
    for kernels, machine, joins in wishes:
        assert numerics_for("auto", kernels, Fp8Config(), machine).joins == joins


@pytest.mark.parametrize(
    ("machine", "recipes"),
    [
        (CPU, []),
        (A100, []),
        (H100_BARE, []),
        (H100_OLD_CUDA, ["tensorwise", "delayed"]),
        (H100, ["blockwise", "tensorwise", "delayed"]),
        (B200, ["mxfp8", "blockwise", "tensorwise", "delayed"]),
        (RTX_5090, ["blockwise", "tensorwise", "delayed"]),
    ],
)
def test_recipes_of_machines(machine: Machine, recipes: list[str]) -> None:
    assert machine.recipes() == recipes


@pytest.mark.parametrize(
    ("machine", "wishes", "message"),
    [
        (
            CPU,
            {"kernels": "te"},
            r"^train.kernels=te needs a GPU, and this machine has none; without it, set train.kernels=local$",
        ),
        (
            H100_BARE,
            {"kernels": "te"},
            r"^train.kernels=te needs Transformer Engine, which is not installed: install it .*; "
            r"without it, set train.kernels=local$",
        ),
        (
            CPU,
            {"kernels": "te_joined"},
            r"^train.kernels=te_joined needs a GPU, .*; without it, set train.kernels=local_joined$",
        ),
        (
            H100_BARE,
            {"kernels": "local_joined"},
            r"^train.kernels=local_joined needs Triton, which is not installed: install it .*, "
            r"or set train.kernels=local$",
        ),
        (
            CPU,
            {"recipe": "delayed"},
            r"^train.fp8.recipe=delayed needs a GPU, and this machine has none: set train.fp8.recipe=none$",
        ),
        (
            H100_BARE,
            {"recipe": "delayed"},
            r"needs Transformer Engine, which is not installed; without it the run would silently compute "
            r"in bf16: install it .*recipe=none$",
        ),
        (
            A100,
            {"recipe": "delayed"},
            r"needs compute capability 8.9, and NVIDIA A100-SXM4-80GB has 8.0: "
            r"set train.fp8.recipe=none and train.precision=bf16$",
        ),
        (
            H100,
            {"recipe": "mxfp8"},
            r"needs compute capability 10.0 and below 12.0, and NVIDIA H100 80GB HBM3 has 9.0: "
            r"set train.fp8.recipe=blockwise$",
        ),
        (
            RTX_5090,
            {"recipe": "mxfp8"},
            r"below 12.0, and NVIDIA GeForce RTX 5090 has 12.0: set train.fp8.recipe=blockwise$",
        ),
        (
            H100_OLD_CUDA,
            {"recipe": "blockwise"},
            r"needs CUDA 12.9, and torch was built with 12.6: set train.fp8.recipe=tensorwise$",
        ),
    ],
)
def test_refusals_name_the_nearest_choice(machine: Machine, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(machine, **wishes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kernels": "local", "fp8": {"recipe": "delayed"}},
            "needs Transformer Engine's kernels: set train.kernels=te",
        ),
        (
            {"precision": "fp32", "fp8": {"recipe": "delayed"}},
            "needs weights in bf16: set train.precision=bf16",
        ),
        (
            {"fp8": {"recipe": "delayed", "first_last_bf16": True}},
            "does not combine with train.fp8.recipe=delayed: .*set train.fp8.recipe=tensorwise",
        ),
        ({"fp8": {"first_last_bf16": True}}, "has no effect with train.fp8.recipe=none"),
    ],
)
def test_contradictions_in_a_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, global_batch_size=1, micro_batch_size=1, **fields)


SIZES = {"num_layers": 2, "hidden_size": 1536, "num_attention_heads": 24, "vocab_size": 512}


@pytest.mark.parametrize(
    ("recipe", "model", "parallel", "seq_length", "message"),
    [
        ("delayed", {}, {}, 128, None),
        ("mxfp8", {}, {"tensor": 2, "sequence_parallel": True}, 128, None),
        (
            "delayed",
            {"hidden_size": 1500, "num_attention_heads": 25},
            {},
            128,
            r"model.hidden_size = 1500 is not a multiple of 16",
        ),
        (
            "mxfp8",
            {"ffn_hidden_size": 1552},
            {},
            128,
            r"model.ffn_hidden_size per tensor-parallel rank = 1552 is not a multiple of 32",
        ),
        (
            "delayed",
            {"ffn_hidden_size": 1520},
            {"tensor": 2},
            128,
            r"model.ffn_hidden_size per tensor-parallel rank = 760 is not a multiple of 16",
        ),
        ("tensorwise", {}, {}, 25, r"tokens of a micro-batch per rank .* = 50 is not a multiple of 16"),
        (
            "blockwise",
            {},
            {"tensor": 2, "sequence_parallel": True},
            96,
            r"tokens of a micro-batch per rank \(96\).*set train.fp8.recipe=tensorwise",
        ),
    ],
)
def test_sizes_that_fp8_kernels_do_not_take(
    recipe: str, model: dict[str, int], parallel: dict[str, Any], seq_length: int, message: str | None
) -> None:
    config, layout_config = ModelConfig(**SIZES | model), ParallelConfig(**parallel)
    layout = check_layout(layout_config, config, layout_config.tensor)
    numerics = numerics_for("bf16", "te", Fp8Config(recipe=recipe), B200)
    if message is None:
        check_sizes(numerics, config, layout, seq_length=seq_length, micro_batch_size=2)
        return
    with pytest.raises(UserError, match=message):
        check_sizes(numerics, config, layout, seq_length=seq_length, micro_batch_size=2)


def test_sizes_do_not_matter_without_fp8() -> None:
    config = ModelConfig(num_layers=1, hidden_size=6, num_attention_heads=2, vocab_size=10)
    check_sizes(
        numerics_for("auto", "auto", Fp8Config(), CPU),
        config,
        check_layout(ParallelConfig(), config, 1),
        seq_length=7,
        micro_batch_size=1,
    )


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_fields_for_megatron_core(recipe: str) -> None:
    """Megatron-core takes the fields as they are."""
    from model.layers.transformer_config import transformer_config

    numerics = numerics_for(
        "bf16", "auto", Fp8Config(recipe=recipe, first_last_bf16=recipe != "delayed"), B200
    )
    assert numerics.label == "fp8"
    config = transformer_config(
        ModelConfig(**SIZES), dtype=numerics.dtype, on_cpu=True, **numerics.core_fields()
    )
    assert config.fp8_recipe == recipe
    assert config.fp8 == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert config.first_last_layers_bf16 is (recipe != "delayed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_this_machine_without_a_gpu() -> None:
    machine = this_machine()
    assert (machine.gpu, machine.te, machine.recipes()) == (None, None, [])


def test_a_broken_installation_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Machine(H100.gpu, H100.capability, H100.cuda, None, "2.11.0 cannot be imported (no libcudnn)")
    numerics = numerics_for("auto", "auto", Fp8Config(), broken)
    monkeypatch.setattr(precision, "installed", lambda package: "2.11.0")
    note = fallback("auto", numerics, broken)
    assert note is not None
    assert note.startswith("Transformer Engine 2.11.0 cannot be imported (no libcudnn)")
    assert fallback("local", numerics, broken) is None
    assert fallback("auto", numerics_for("auto", "auto", Fp8Config(), H100), H100) is None
    monkeypatch.setattr(precision, "installed", lambda package: None)
    assert fallback("auto", numerics, broken) is None
