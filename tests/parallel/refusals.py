"""Everything that is refused before a run starts, tried, with the line that a user reads."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from parallel.config import Fp8Config, ParallelConfig
from parallel.hardware.precision import Machine, check_sizes, numerics_for
from parallel.topology import check_layout
from pretrain.config.schema import RunConfig
from pretrain.train.checks.feasibility import check_activation, check_sums
from tests.parallel.refusing import MODEL, Refusal, layout, of_layout, of_losses, of_machine, of_run
from tests.parallel.training import VIT, given, run_config

CPU = Machine(te_problem="is not used without a GPU")
A100 = Machine("NVIDIA A100-SXM4-80GB", (8, 0), (13, 0), "2.11.0", "")
H100 = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0), "2.11.0", "")
H100_BARE = Machine("NVIDIA H100 80GB HBM3", (9, 0), (13, 0))
H100_OLD_CUDA = Machine("NVIDIA H100 80GB HBM3", (9, 0), (12, 6), "2.11.0", "")


def _sizes() -> None:
    model, parallel = (
        ModelConfig(**(MODEL | given(ffn_hidden_size=1520, hidden_size=1536, num_attention_heads=24))),
        ParallelConfig(tensor=2),
    )
    check_sizes(
        numerics_for("bf16", "te", Fp8Config(recipe="delayed"), H100),
        model,
        check_layout(parallel, model, 2),
        seq_length=128,
        micro_batch_size=1,
    )


SUMS, RESIDUAL = given(gradient_accumulation_fusion=True), given(residual_in_product=True, kernels="local")
INSIDE = given(activation_in_product=True, kernels="local_joined")
COMPILE, GRAPH = given(compile=True), given(cuda_graph=True)
LIGER, DOCUMENTS = given(loss_kernel="liger"), given(document_mask=True)
SP, VP = given(tensor=2, sequence_parallel=True), given(pipeline=2, virtual_stages=3)
REFUSALS = [
    of_layout(
        "processes that the degrees do not divide",
        r"2 x 1 x 1 = 2 does not divide 3 processes: use parallel.processes=4 or smaller",
        3,
        tensor=2,
    ),
    of_layout(
        "too few processes",
        r"= 4 does not divide 1 processes: use parallel.processes=4",
        1,
        tensor=2,
        pipeline=2,
    ),
    of_layout(
        "heads that TP does not divide",
        "num_attention_heads=4 is not divisible by parallel.tensor=8",
        8,
        given(num_query_groups=1),
        tensor=8,
    ),
    of_layout(
        "query groups that TP does not divide",
        "num_query_groups=2 is not divisible by parallel.tensor=4",
        4,
        given(num_query_groups=2),
        tensor=4,
    ),
    of_layout(
        "a feed-forward that TP does not divide",
        "ffn_hidden_size=33 is not divisible by parallel.tensor=2",
        2,
        given(ffn_hidden_size=33),
        tensor=2,
    ),
    of_layout(
        "a vocabulary that TP does not divide",
        "set model.vocab_multiple=2",
        2,
        given(vocab_multiple=1, vocab_size=121),
        tensor=2,
    ),
    of_layout(
        "sequence parallelism without TP", "has no effect with parallel.tensor=1", 1, sequence_parallel=True
    ),
    Refusal(
        "a step that micro-batches do not divide",
        r"=12 .* 4 x 2 = 8: set train.global_batch_size=16",
        lambda: layout(2).num_microbatches(12, 4),
    ),
    Refusal(
        "a sequence that SP cannot cut",
        r"data.seq_length=15 .*: use 16",
        lambda: layout(2, **SP).check_batches(15, 1),
    ),
    Refusal(
        "a source that SP cannot cut",
        r"data.source_length=13 .*: use 14",
        lambda: layout(2, **SP).check_batches(16, 1, 13),
    ),
    of_layout(
        "heads of an encoder that TP does not divide",
        "model.encoder_attention_heads=2 is not divisible by parallel.tensor=4: set parallel.tensor=2",
        4,
        given(family="seq2seq", encoder_attention_heads=2, head_dim=8),
        tensor=4,
    ),
    of_layout(
        "layers that stages do not divide", r"set parallel.pipeline_split=\[2, 2, 1, 1\]", 4, pipeline=4
    ),
    of_layout("more stages than layers", "use parallel.pipeline=6 or less", 8, pipeline=8),
    of_layout(
        "a split of another count",
        "must have 2 positive entries .* that sum to model.num_layers=6",
        2,
        pipeline=2,
        pipeline_split=[6],
    ),
    of_layout(
        "a split of another sum",
        r"pipeline_split=\[3, 4\] must have 2 positive entries",
        2,
        pipeline=2,
        pipeline_split=[3, 4],
    ),
    of_layout("a stage without layers", "positive entries", 2, pipeline=2, pipeline_split=[6, 0]),
    of_layout(
        "a split with interleaving",
        "does not combine with parallel.virtual_stages=2",
        2,
        pipeline=2,
        pipeline_split=[4, 2],
        virtual_stages=2,
    ),
    of_layout(
        "interleaving without a pipeline", "has no effect with parallel.pipeline=1", 1, virtual_stages=2
    ),
    of_layout(
        "layers that chunks do not divide",
        "choose parallel.virtual_stages that divides 3",
        2,
        pipeline=2,
        virtual_stages=2,
    ),
    Refusal(
        "micro-batches that interleaving cannot order",
        r"3 micro-batches .*virtual_stages=1",
        lambda: layout(2, **VP).check_batches(16, 3),
    ),
    of_layout(
        "cut sequences that are not causal",
        "model.family=bert: .* set parallel.context=1",
        2,
        given(family="bert"),
        context=2,
    ),
    Refusal(
        "a sequence that does not divide into pieces",
        r"data.seq_length=18 is not divisible by 4, .*: use 20",
        lambda: layout(2, context=2).check_batches(18, 4),
    ),
    Refusal(
        "pieces that SP does not divide",
        r"data.seq_length=20 is not divisible by 8, .* x parallel.tensor, .*: use 24",
        lambda: layout(4, context=2, **SP).check_batches(20, 4),
    ),
    of_layout(
        "ZeRO-3 under a pipeline",
        "parallel.zero=3 with parallel.pipeline=2: .* parallel.pipeline=1",
        2,
        pipeline=2,
        zero=3,
    ),
    of_layout(
        "offload without shards",
        "and parallel.zero=0: set parallel.zero=1",
        1,
        zero=0,
        offload={"optimizer": True},
    ),
    of_layout(
        "offload under ZeRO-3",
        "and parallel.zero=3: set parallel.zero=1",
        1,
        zero=3,
        offload={"optimizer": True},
    ),
    of_layout(
        "overlapping a reduction that is not there",
        "has no effect with one data-parallel rank",
        2,
        tensor=2,
        overlap_grad_reduce=True,
    ),
    of_layout(
        "reducing in bf16 what is not reduced",
        "grad_reduce=bf16 has no effect with one data-parallel rank",
        1,
        grad_reduce="bf16",
    ),
    of_layout(
        "reducing in bf16 without shards",
        "zero=0 has none: set parallel.zero=1",
        2,
        grad_reduce="bf16",
        zero=0,
    ),
    of_layout(
        "reducing in bf16 during the backward pass",
        "grad_reduce=bf16 does not combine with parallel.overlap_grad_reduce=true",
        2,
        grad_reduce="bf16",
        overlap_grad_reduce=True,
    ),
    of_layout(
        "overlapping DeepSpeed's reduction",
        "does not combine with parallel.zero=3",
        2,
        zero=3,
        overlap_grad_reduce=True,
    ),
    Refusal(
        "bf16 without fp32 copies",
        "parallel.zero=0 keeps no fp32 copy",
        lambda: layout(1, zero=0).check_dtype(torch.bfloat16),
    ),
    of_run(
        "Muon without ZeRO",
        "set parallel.zero=1 or optimizer.kind=adamw",
        parallel=given(zero=0),
        optimizer=given(kind="muon"),
    ),
    of_run(
        "Muon under ZeRO-3",
        "set parallel.zero=1 or optimizer.kind=adamw",
        parallel=given(zero=3),
        optimizer=given(kind="muon"),
    ),
    of_run(
        "Muon with offload",
        "offload.optimizer=false or",
        parallel=given(offload=given(optimizer=True)),
        optimizer=given(kind="muon"),
    ),
    of_run(
        "documents that do not see each other in a CUDA graph",
        "document_mask=true does not combine with train.cuda_graph=true yet",
        train=GRAPH,
        data=DOCUMENTS,
    ),
    of_run(
        "hiding documents where samples say what is hidden",
        "document_mask=true has no effect with train.task=masked_lm",
        model=given(family="bert"),
        data=DOCUMENTS,
    ),
    of_run("momentum without Muon", "set optimizer.kind=muon", optimizer=given(momentum=0.9)),
    of_run(
        "compiled layers with TP, without SP, that drop attention",
        "compile=true with parallel.tensor=2 .*set parallel.sequence_parallel=true",
        model=given(attention_dropout=0.1),
        parallel=given(tensor=2),
        train=COMPILE | given(kernels="local"),
    ),
    of_run(
        "joins compiled twice",
        "train.compile=true .*train.kernels=local_joined.*set train.compile=false or train.kernels=local$",
        train=COMPILE | given(kernels="local_joined"),
    ),
    of_run(
        "joins with norms under ZeRO-3",
        "train.kernels=te_joined .*parallel.zero=3.*set parallel.zero=2 or train.kernels=te$",
        parallel=given(zero=3),
        train=given(kernels="te_joined"),
    ),
    of_run(
        "sums in products under ZeRO-3",
        "gradient_accumulation_fusion=true .*parallel.zero=3",
        parallel=given(zero=3),
        train=SUMS,
    ),
    of_run(
        "sums in compiled products",
        "gradient_accumulation_fusion=true .*train.compile=true.* or train.kernels=te",
        train=COMPILE | SUMS,
    ),
    Refusal(
        "sums in products of bf16 on a CPU",
        "gradient_accumulation_fusion=true .*or train.precision=fp32",
        lambda: check_sums(numerics_for("bf16", "local", Fp8Config(), CPU), CPU),
    ),
    of_run(
        "residuals in products of Transformer Engine",
        "residual_in_product=true has no effect with train.kernels=auto: set train.kernels=local",
        train=RESIDUAL | given(kernels="auto"),
    ),
    of_run(
        "residuals in products under ZeRO-3",
        "residual_in_product=true .*parallel.zero=3",
        parallel=given(zero=3),
        train=RESIDUAL,
    ),
    of_run(
        "residuals in products before biases",
        "residual_in_product=true has no effect with model.bias=true: set model.bias=false",
        train=RESIDUAL,
    ),
    of_run(
        "residuals in products of parts",
        "residual_in_product=true has no effect with parallel.tensor=2: set parallel.tensor=1",
        parallel=given(tensor=2),
        model=given(bias=False),
        train=RESIDUAL,
    ),
    of_run(
        "residuals in products before norms",
        "residual_in_product=true has no effect with model.scheme=peri_ln",
        model=given(scheme="peri_ln", bias=False),
        train=RESIDUAL,
    ),
    of_run(
        "activations in products of kernels apart",
        "no effect with train.kernels=local: set train.kernels=local_joined",
        train=INSIDE | given(kernels="local"),
    ),
    of_run(
        "activations in products of parts",
        "=true .*parallel.tensor=2",
        parallel=given(tensor=2),
        train=INSIDE,
    ),
    of_run(
        "activations in products before norms",
        "activation_in_product=true has no effect with model.scheme=subln",
        model=given(scheme="subln"),
        train=INSIDE,
    ),
    Refusal(
        "activations in products on a CPU",
        "activation_in_product=true needs a GPU",
        lambda: check_activation(numerics_for("fp32", "local_joined", Fp8Config(), CPU)),
    ),
    of_run(
        "compiled layers over cut sequences",
        "compile=true .*parallel.context=2.*set train.compile=false",
        parallel=given(context=2),
        train=COMPILE,
    ),
    of_run(
        "a CUDA graph over cut sequences",
        "cuda_graph=true .*parallel.context=2.*set train.cuda_graph=false",
        parallel=given(context=2),
        train=GRAPH,
    ),
    of_run(
        "compiled layers under ZeRO-3",
        "train.compile=true .*set parallel.zero=1",
        parallel=given(zero=3),
        train=COMPILE,
    ),
    of_run(
        "a CUDA graph with recomputed dropout",
        "cuda_graph=true .*hidden_dropout=0.1 would compute again .*set parallel.recompute.granularity=none",
        model=given(hidden_dropout=0.1),
        parallel=given(recompute=given(granularity="full")),
        train=GRAPH,
    ),
    of_run(
        "a CUDA graph with recomputed attention that drops",
        "cuda_graph=true .*or model.attention_dropout=0",
        model=given(attention_dropout=0.1),
        parallel=given(recompute=given(granularity="selective")),
        train=GRAPH,
    ),
    of_run(
        "a CUDA graph with recomputation in FP8",
        "cuda_graph=true .*fp8.recipe=delayed: .*set parallel.recompute.granularity=none",
        parallel=given(recompute=given(granularity="full")),
        train=GRAPH | given(kernels="te", precision="bf16", fp8=given(recipe="delayed")),
    ),
    of_run(
        "a CUDA graph under ZeRO-3",
        "cuda_graph=true .*set parallel.zero=1",
        parallel=given(zero=3),
        train=GRAPH,
    ),
    Refusal(
        "a CUDA graph that is hardly used",
        "set log.signal_interval=10 or more, or 0",
        lambda: RunConfig.model_validate(
            run_config(train=GRAPH).model_dump() | {"log": given(signal_interval=5)}
        ),
    ),
    of_run(
        "fused losses of a vocabulary that is cut",
        "loss_kernel=liger does not combine with parallel.tensor=2, .*local, which train.loss_chunk cuts$",
        parallel=given(tensor=2),
        train=LIGER,
    ),
    of_run(
        "fused losses under ZeRO-3",
        "loss_kernel=liger does not combine with parallel.zero=3, .*set parallel.zero=2, or",
        parallel=given(zero=3),
        train=LIGER,
    ),
    of_run(
        "fused losses in a CUDA graph",
        "loss_kernel=liger does not combine with train.cuda_graph=true.*set train.cuda_graph=false, or",
        train=GRAPH | LIGER,
    ),
    of_run(
        "fused losses of images",
        "loss_kernel=torch has no effect with model.family=vit, .*remove it",
        model=VIT,
        train=given(loss_kernel="torch"),
    ),
    of_run(
        "a soft cap on logits by torch's fused losses",
        "loss_kernel=torch has no form for model.logit_soft_cap=3: set",
        model=given(logit_soft_cap=3.0),
        train=given(loss_kernel="torch"),
    ),
    of_run(
        "a z-loss by torch's fused losses",
        "loss_kernel=torch has no form for train.z_loss=0.01: set",
        train=given(loss_kernel="torch", z_loss=0.01),
    ),
    of_run(
        "label smoothing by torch's fused losses",
        "loss_kernel=torch has no form for train.label_smoothing=0.1: set",
        train=given(loss_kernel="torch", label_smoothing=0.1),
    ),
    of_run(
        "chunks of fused losses that have their own",
        "loss_chunk=4 has no effect with train.loss_kernel=liger, .*remove one of them",
        train=LIGER | given(loss_chunk=4),
    ),
    of_losses(
        "fused losses on a machine without a GPU",
        "needs a GPU, and this machine has none",
        "liger",
        gpu=False,
    ),
    of_losses("fused losses that are not there", r"not installed: .*pip install '.\[liger\]'\), or", "liger"),
    of_losses(
        "fused losses of a release that is not known",
        "needs liger-kernel>=0.8.5,<0.9, and 0.9.1 is installed: set",
        "liger",
        version="0.9.1",
    ),
    of_losses(
        "fused losses of an older torch",
        "needs torch>=2.13, and 2.11.0 is installed: set",
        "torch",
        version="2.11.0",
    ),
    of_losses(
        "torch's fused losses in bf16",
        "bf16 has three digits: set train.precision=fp32, or",
        "torch",
        version="2.13.0",
    ),
    of_run("fp16", "loss scaling.*set train.precision=bf16", train=given(precision="fp16")),
    of_run(
        "FP8 with PyTorch's kernels",
        "set train.kernels=te",
        train=given(kernels="local", fp8=given(recipe="delayed")),
    ),
    of_run(
        "FP8 in fp32", "set train.precision=bf16", train=given(precision="fp32", fp8=given(recipe="delayed"))
    ),
    of_run(
        "An fp32 residual in fp32",
        "set it to false",
        train=given(precision="fp32", fp32_residual=True),
    ),
    Refusal(
        "An fp32 residual where `auto` is fp32",
        "or train.precision=bf16",
        lambda: numerics_for("auto", "auto", Fp8Config(), CPU, fp32_residual=True),
    ),
    of_machine("Transformer Engine without a GPU", "set train.kernels=local", CPU, kernels="te"),
    of_machine("Transformer Engine that is not there", "set train.kernels=local", H100_BARE, kernels="te"),
    of_machine("FP8 without a GPU", "set train.fp8.recipe=none", CPU, recipe="delayed"),
    of_machine(
        "FP8 without Transformer Engine", "silently compute in bf16: install it", H100_BARE, recipe="delayed"
    ),
    of_machine(
        "FP8 on a GPU that has none",
        "set train.fp8.recipe=none and train.precision=bf16",
        A100,
        recipe="delayed",
    ),
    of_machine("a recipe of another GPU", "set train.fp8.recipe=blockwise", H100, recipe="mxfp8"),
    of_machine(
        "a recipe of a newer CUDA", "set train.fp8.recipe=tensorwise", H100_OLD_CUDA, recipe="blockwise"
    ),
    Refusal("sizes that FP8 kernels do not take", "= 760 is not a multiple of 16: change it", _sizes),
]
