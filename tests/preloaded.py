"""What forked processes of tests would each import for themselves, some of it late.

Imported by the server of forks, and by nothing else.
"""

import contextlib
import gc
import importlib
import os
import warnings

MODULES = (
    "deepspeed",
    "megatron.core.models.gpt",
    "pretrain.train.loop",
    "pretrain.train.build",
    # Imported by DeepSpeed while it starts an engine.
    "deepspeed.comm.mori",
    "deepspeed.moe.ep_count",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.utils.pin_memory",
    "torch.utils.serialization.config",
    # Imported by a run while it starts.
    "pretrain.train.callbacks.display",
    "pretrain.train.callbacks.signal.health",
    "pretrain.train.run",
    "tools.runs.pretrain",
    "matplotlib.pyplot",
    "transformers.models.gpt2.modeling_gpt2",
)

# Bare `warning` and `print` of the libraries at import are nothing a test reads.
with (
    open(os.devnull, "w") as nothing,
    contextlib.redirect_stdout(nothing),
    contextlib.redirect_stderr(nothing),
    warnings.catch_warnings(),
):
    warnings.simplefilter("ignore")
    for module in MODULES:
        importlib.import_module(module)
# What is imported stays: the collector need not walk it again in every fork.
gc.collect()
gc.freeze()
