"""Engines over both kinds of layers, in a process of its own beside the stand-in.

For training, checkpoints from one read by the other, FP8 state.

python -m tests.te.engine_worker FOLDER_OF_TRANSFORMER_ENGINE OUTPUT.json
"""

from __future__ import annotations

import copy
import functools
import json
import sys
import tempfile
import unittest.mock
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.te import context, kernels, standin
from tests.te.worker import SEQ, VOCAB, build, model_config

STEPS = 2
HISTORY = 4


def engine_of(model: Any, kinds: str, *, zero: int = 1, cuda_graph: bool = False, **core: Any) -> Any:
    """An engine on the CPU, with initial weights. core: as `tests.te.worker.build`."""
    import torch

    from model.parameters.names import named_parameters
    from model.weights.init import initialize_
    from parallel.engine.engine import Engine, EngineOptions
    from parallel.launch.one_process import single_process
    from pretrain.config.schema import OptimizerConfig
    from pretrain.train.build import adamw

    topology = copy.copy(single_process())
    topology.layout = replace(topology.layout, zero=zero)
    dtype = core.get("dtype", torch.float32)
    chunk = build(model, topology, kinds, "cpu", **core)
    initialize_(
        ((one.name, one.parameter, one.shard) for one in named_parameters(chunk, 0, 1)), model, SEQ, 1
    )
    optimizer = OptimizerConfig(lr=1e-2)
    return Engine(
        [chunk],
        topology,
        make_optimizer=functools.partial(adamw, optimizer),
        options=EngineOptions(
            dtype=dtype,
            micro_batch_size=2,
            seq_length=SEQ,
            clip=1.0,
            tied=True,
            decay_embeddings=False,
            cuda_graph=cuda_graph,
        ),
    )


def train(engine: Any, first: int, steps: int = STEPS) -> list[float]:
    """Losses of steps from step `first` on, of two micro-batches each."""
    import torch

    from pretrain.data.samples import next_tokens
    from pretrain.tasks.causal_lm import CAUSAL_LM
    from pretrain.train.steps import training_step

    engine.set_lr(1e-2)
    losses = []
    for step in range(first, first + steps):
        batches = [
            next_tokens(
                torch.randint(
                    0, VOCAB, (2, SEQ + 1), generator=torch.Generator().manual_seed(10 * step + part)
                )
            )
            for part in range(2)
        ]
        losses.append(
            engine.train_step(
                training_step(CAUSAL_LM), lambda batches=batches: iter(batches), len(batches)
            ).loss
        )
    return losses


def exchange(writer: str, reader: str, scheme: str) -> dict[str, list[float]]:
    """Losses after a checkpoint: of the engine that wrote it, and of one that read it.

    The reader is over the other kind of layers.
    """
    from parallel.checkpoint.loader import load
    from parallel.checkpoint.reader import open_checkpoint
    from parallel.checkpoint.writer import save

    model = model_config(scheme=scheme)
    one = engine_of(model, writer)
    before = train(one, 0)
    with tempfile.TemporaryDirectory() as folder:
        save(one, Path(folder), STEPS, progress={"optimizer_step": STEPS}, config={}, versions={}, extra={})
        other = engine_of(model, reader)
        load(other, open_checkpoint(Path(folder)))
    return {"before": before, "writer": train(one, STEPS), "reader": train(other, STEPS)}


def fp8_model(model: Any, topology: Any, recipe: str | None) -> Any:
    """A model in bf16 with FP8 products by a recipe, None for none."""
    import torch

    from model.layers.transformer_config import transformer_config
    from model.network.language_model import LanguageModel
    from parallel.hardware.precision import Numerics

    fields = Numerics(torch.bfloat16, "te", recipe).core_fields()
    config = transformer_config(
        model,
        dtype=torch.bfloat16,
        on_cpu=False,
        **topology.core_fields(),
        **fields | ({"fp8_amax_history_len": HISTORY} if recipe else {}),
    )
    with standin.pretend_cuda("cpu"):
        return LanguageModel(model, config, seq_length=SEQ, kernels="te")


def made_up_state(num_layers: int) -> dict[str, Any]:
    """A state of delayed scaling for two products of every layer, by name."""
    import torch

    generator = torch.Generator().manual_seed(0)
    layers = [
        f"decoder.layers.{index}.{part}"
        for index in range(num_layers)
        for part in ("self_attention.linear_qkv", "mlp.linear_fc2")
    ]
    made_up = {}
    for name in layers:
        for part, shape in {
            "scale_fwd": (3,),
            "amax_history_fwd": (HISTORY, 3),
            "scale_bwd": (2,),
            "amax_history_bwd": (HISTORY, 2),
        }.items():
            made_up[f"{name}.{part}"] = torch.rand(shape, generator=generator)
    return made_up


def fp8_state(te: Any) -> dict[str, Any]:
    """A made-up state of delayed scaling through a checkpoint file into another model."""
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe
    from transformer_engine.pytorch import quantization

    from parallel.hardware.fp8_state import checkpoint_file, fp8_state, has_state, restore, set_fp8_state
    from parallel.launch.one_process import single_process

    model, topology = model_config(scheme="b2t"), single_process()
    states = quantization.DelayedScalingRecipeState
    real = states.__init__

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs | {"device": torch.device("cpu")})

    able = unittest.mock.patch.object(quantization, "get_device_compute_capability", return_value=(9, 0))
    hopper = unittest.mock.patch.object(quantization, "get_default_fp8_recipe", quantization.DelayedScaling)
    with hopper, unittest.mock.patch.object(states, "__init__", on_cpu):
        one, other, stateless = (
            fp8_model(model, topology, recipe) for recipe in ("delayed", "delayed", "tensorwise")
        )
        made_up = made_up_state(model.num_layers)
        set_fp8_state([one], made_up)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in checkpoint_file([one], topology).items():
                (Path(folder) / name).write_bytes(content)
            restored = restore([other], Path(folder))
            ignored = restore([stateless], Path(folder))
        module = other.decoder.layers[1].mlp.linear_fc2
        # What a forward pass begins with could make another state.
        with able, quantization.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(other.config)):
            module.init_fp8_metadata()
        found = fp8_state([other])
    quantizer = module.quantizers["scaling_fwd"][0]
    return {
        "restored": restored,
        "ignored": not ignored
        and not has_state([stateless])
        and checkpoint_file([stateless], topology) == {},
        "equal": found.keys() == made_up.keys()
        and all(torch.equal(found[name], tensor) for name, tensor in made_up.items()),
        "in force": bool(quantizer.scale == made_up["decoder.layers.1.mlp.linear_fc2.scale_fwd"][0]),
        "tensors": len(found),
    }


def fp8_contexts(te: Any) -> dict[str, list[str | None]]:
    """For every recipe, without and with the first and last layer spared.

    The recipe in force at each fused norm of a forward pass, None for none.
    """
    import torch
    from transformer_engine.pytorch import quantization

    from model.layers.transformer_config import transformer_config
    from model.network.language_model import LanguageModel
    from parallel.hardware.precision import RECIPES, Numerics
    from parallel.launch.one_process import single_process

    manager, forward = quantization.FP8GlobalStateManager, te.LayerNormLinear.forward
    seen: list[str | None] = []

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(manager.get_fp8_recipe()).__name__ if manager.is_fp8_enabled() else None)
        return forward(self, *args, **kwargs)

    model, topology, found = model_config(scheme="pre_ln"), single_process(), {}
    blackwell = unittest.mock.patch.object(
        quantization, "get_device_compute_capability", return_value=(10, 0)
    )
    toolkit = unittest.mock.patch.object(torch.version, "cuda", "13.0")
    for recipe, spare in [
        (recipe, spare)
        for recipe in RECIPES
        for spare in (False, True)
        if not (spare and recipe == "delayed")
    ]:
        fields = Numerics(torch.bfloat16, "te", recipe, spare).core_fields()
        config = transformer_config(
            model, dtype=torch.bfloat16, on_cpu=False, **topology.core_fields(), **fields
        )
        with (
            blackwell,
            toolkit,
            unittest.mock.patch.object(te.LayerNormLinear, "forward", spy),
            standin.pretend_cuda("cpu"),
            torch.no_grad(),
        ):
            chunk = LanguageModel(model, config, seq_length=SEQ, kernels="te").bfloat16()
            tokens = torch.zeros(1, SEQ, dtype=torch.long)
            chunk({"tokens": tokens, "labels": tokens})
        found[f"{recipe}{' spared' if spare else ''}"] = list(seen)
        seen.clear()
    return found


def weight_casts(te: Any, zero: int) -> list[bool | None]:
    """For every pass of one FP8 layer through two steps of two micro-batches.

    Whether its weights were to be cast, or the cast of before used.
    """
    import torch
    from transformer_engine.pytorch import quantization

    from parallel.hardware.precision import Numerics

    forward = te.LayerNormLinear.forward
    seen: list[bool | None] = []

    def spy(self: Any, inp: Any, is_first_microbatch: bool | None = None, **more: Any) -> Any:
        if self is watched:
            seen.append(is_first_microbatch)
        return forward(self, inp, is_first_microbatch=is_first_microbatch, **more)

    fields: dict[str, Any] = Numerics(torch.bfloat16, "te", "tensorwise").core_fields()
    hopper = unittest.mock.patch.object(quantization, "get_device_compute_capability", return_value=(9, 0))
    toolkit = unittest.mock.patch.object(torch.version, "cuda", "13.0")
    with hopper, toolkit, unittest.mock.patch.object(te.LayerNormLinear, "forward", spy):
        engine = engine_of(model_config(scheme="pre_ln"), "te", zero=zero, dtype=torch.bfloat16, **fields)
        watched = engine.chunks[0].decoder.layers[1].mlp.linear_fc1
        train(engine, 0)
    return seen


def random_states() -> dict[str, list[bool]]:
    """By attention dropout: whether each back end of attention exchanges random states.

    That is at every call.
    """
    import contextlib

    from parallel.launch.one_process import single_process

    found = {}
    for dropout in (0.0, 0.1):
        core = (
            build(model_config(scheme="pre_ln", attention_dropout=dropout), single_process(), "te", "cpu")
            .decoder.layers[0]
            .self_attention.core_attention
        )
        backends = (core.flash_attention, core.fused_attention, core.unfused_attention)
        found[str(dropout)] = [
            backend.attention_dropout_ctx is not contextlib.nullcontext for backend in backends
        ]
    return found


def summed() -> list[bool]:
    """Of every product of a layer with its norms in the products and apart: whether it adds."""
    from model.layers.products import sum_in_products
    from parallel.launch.one_process import single_process

    found = []
    for kinds in ("te", "te_apart"):
        layer = build(model_config(scheme="b2t"), single_process(), kinds, "cpu").decoder.layers[0]
        assert sum_in_products([layer]) == 4
        attention, mlp = layer.self_attention, layer.mlp
        products = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        found += [vars(one)["fuse_wgrad_accumulation"] for one in products]
    return found


def graphed(scheme: str) -> dict[str, Any]:
    """Losses of steps with and without a CUDA graph, on the imitation of one."""
    from parallel.engine.step_graph import WARM_UP
    from tests.parallel.graph_emulator import emulated

    model, steps = model_config(scheme=scheme), WARM_UP + 3
    with emulated() as graphs:
        by_graph = train(engine_of(model, "te", cuda_graph=True), 0, steps)
        counts = [graphs.captures, graphs.replays]
    return {"eager": train(engine_of(model, "te"), 0, steps), "graph": by_graph, "counts": counts}


def main(folder: str, output: str) -> None:
    te = standin.load(Path(folder))
    import megatron.core.models.gpt  # noqa: F401

    warnings.simplefilter("ignore")
    kernels.install(te)
    from model.depth.schemes import SCHEMES

    found: dict[str, Any] = {
        "context": context.compared(),  # first, as its ranks are forked from a process without groups
        "local to te": exchange("local", "te", "b2t"),
        "te to local": exchange("te", "local", "deepscalelm_pre_ln"),
        "fp8 state": fp8_state(te),
        "fp8 contexts": fp8_contexts(te),
        "weight casts": {f"zero {zero}": weight_casts(te, zero) for zero in (1, 3)},
        "random states": random_states(),
        "summed": summed(),
        "graphed": {scheme: graphed(scheme) for scheme in SCHEMES},
    }
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:3])
