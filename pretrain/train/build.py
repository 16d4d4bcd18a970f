"""From a configuration to a ready engine: topology, model chunks, weights by name, optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from model.config import ModelConfig
from model.layers.activated import activate_in_products
from model.layers.one_pass import pass_at_once
from model.layers.product_pass import feed_pass
from model.layers.products import add_in_products, sum_in_products
from model.layers.transformer_config import transformer_config
from model.network.fused_losses import FUSED_LOSSES
from model.network.language_model import LanguageModel
from model.network.parts import Kernels
from model.parameters.names import named_parameters
from model.weights.init import initialize_
from parallel.engine.engine import Engine, EngineOptions
from parallel.engine.muon import Muon
from parallel.hardware.precision import Numerics, fallback, this_machine
from parallel.optimizers import OptimizerName
from parallel.topology import Topology
from pretrain.config.schema import MOMENTUM, OptimizerConfig, RunConfig
from pretrain.config.sections.factors import factors_of
from pretrain.train.checks.feasibility import fit_machine
from pretrain.train.compiling import compile_chunks


def seed_everything(seed: int, topology: Topology, *, graph: bool = False) -> None:
    """Sets the random streams for dropout.

    Data- and context-parallel ranks and pipeline stages have their own.
    Tensor-parallel regions have Megatron-core's.
    graph: CUDA graphs may draw from them, of the same numbers.
    """
    from megatron.core import tensor_parallel

    own = seed + 100 * topology.pipeline_rank + 10_000 * topology.replica_rank
    torch.manual_seed(own)
    tensor_parallel.model_parallel_cuda_manual_seed(own, use_cudagraphable_rng=graph, force_reset_rng=True)


def build_chunks(
    model: ModelConfig,
    topology: Topology,
    *,
    seq_length: int,
    source_length: int | None = None,
    dtype: torch.dtype,
    seed: int,
    kernels: Kernels = "local",
    log_p_v: torch.Tensor | None = None,
    **core: Any,
) -> list[LanguageModel]:
    """The model chunks of this rank with their initial weights.

    source_length: tokens that an encoder under a decoder reads.
    log_p_v: log frequencies of the training tokens, for `model.init.unigram`.
    core: further fields for Megatron-core's configuration.
    """
    on_cpu = not torch.cuda.is_available()
    config = transformer_config(model, dtype=dtype, on_cpu=on_cpu, **topology.core_fields(), **core)
    virtual = topology.layout.virtual
    chunks = []
    for stage in range(virtual):
        chunk = LanguageModel(
            model,
            config,
            seq_length=seq_length,
            source_length=source_length,
            pre_process=topology.first_stage and stage == 0,
            post_process=topology.last_stage and stage == virtual - 1,
            vp_stage=stage if virtual > 1 else None,
            kernels=kernels,
        )
        named = named_parameters(chunk, topology.tensor_rank, topology.layout.tensor)
        placed = ((one.name, one.parameter, one.shard) for one in named)
        initialize_(placed, model, seq_length, seed, log_p_v, source_length=source_length)
        chunks.append(chunk if on_cpu else chunk.cuda())
    return chunks


def adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """AdamW over the engine's groups; only those marked `decay` decay."""
    return torch.optim.AdamW(_settings(config, groups), **_adam_fields(config))


def muon(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Muon:
    """Muon over those marked `whole`, AdamW over the others."""
    return Muon(
        _settings(config, groups),
        momentum=MOMENTUM if config.momentum is None else config.momentum,
        **_adam_fields(config),
    )


MAKERS: dict[OptimizerName, Callable[[OptimizerConfig, list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}
"""What makes each entry of `OPTIMIZERS`."""


def make_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The configured optimizer over the engine's groups."""
    return MAKERS[config.kind](config, groups)


def _settings(config: OptimizerConfig, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Torch's parameter groups. Their rates are set before every step (`Engine.set_lr`)."""
    return [
        {
            "params": group["params"],
            "whole": group["whole"],
            "eps": config.eps * group["factors"].eps,
            "weight_decay": config.weight_decay * group["factors"].decay if group["decay"] else 0.0,
        }
        for group in groups
    ]


def _adam_fields(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}


def _set_up(chunks: list[LanguageModel], config: RunConfig, numerics: Numerics) -> None:
    """Has new chunks compute as a run trains: losses, and what of layers is put together."""
    train = config.train
    for chunk in chunks:
        chunk.label_smoothing, chunk.z_loss = train.label_smoothing, train.z_loss
        chunk.loss_chunk, chunk.loss_kernel = train.loss_chunk, FUSED_LOSSES.get(train.loss_kernel)
    if train.compile:
        compile_chunks(config, numerics, chunks)
    if numerics.joins is not None:
        pass_at_once(chunks, numerics.joins)
    layers = [layer for chunk in chunks for layer in chunk.decoder.layers]
    if train.residual_in_product:
        add_in_products(layers)
    if train.activation_in_product:
        activate_in_products(layers, feed_pass)


def build_engine(config: RunConfig, topology: Topology, log_p_v: torch.Tensor | None = None) -> Engine:
    """The engine of a run. `config.model.vocab_size` must be set.

    log_p_v: as `build_chunks`.
    Raises UserError for a precision that this machine does not have.
    """
    train = config.train
    numerics = fit_machine(config, topology.layout)
    notes = [fallback(train.kernels, numerics, this_machine())]
    if topology.layout.offload and not torch.cuda.is_available():
        notes.append(
            "parallel.offload.optimizer=true: optimizer state is in host "
            "memory anyway on a machine without GPUs; the results are the same"
        )
    for note in filter(None, notes if torch.distributed.get_rank() == 0 else []):
        print(f"fathom: {note}", file=sys.stderr)
    seed_everything(train.seed, topology, graph=train.cuda_graph)
    chunks = build_chunks(
        config.model,
        topology,
        seq_length=config.data.seq_length,
        source_length=config.data.source_length,
        dtype=numerics.dtype,
        seed=train.seed,
        kernels=numerics.kernels,
        log_p_v=log_p_v,
        # Otherwise the host waits for the device after messages between stages, which no capture
        # allows. Megatron-core does so for versions of PyTorch long before ours.
        batch_p2p_sync=not train.cuda_graph,
        **config.parallel.recompute.core_fields(),
        **numerics.core_fields(),
    )
    _set_up(chunks, config, numerics)
    engine = Engine(
        chunks,
        topology,
        make_optimizer=lambda groups: make_optimizer(config.optimizer, groups),
        options=EngineOptions(
            dtype=numerics.dtype,
            micro_batch_size=config.train.micro_batch_size,
            seq_length=config.data.seq_length,
            source_length=config.data.source_length or 0,
            clip=config.optimizer.clip_grad,
            tied=config.model.tie_embeddings,
            decay_embeddings=config.optimizer.decay_embeddings,
            optimizer=config.optimizer.kind,
            factors=factors_of(config.optimizer.factors, config.model),
            cuda_graph=train.cuda_graph,
            overlap=config.parallel.reduces_early(graph=train.cuda_graph),
            reduce_in_bf16=config.parallel.grad_reduce == "bf16",
        ),
    )
    if train.gradient_accumulation_fusion:
        sum_in_products(chunks)
    return engine
