"""`fathom design`: a complete configuration for a size, a depth, GPUs and a budget of tokens.

Sizes are those of the shipped family from 24 to 1000 layers. Rate and warm-up are a scheme's
recipe, carried over by `model.transfer` (docs/transfer.md). The layout is the first of
`fathom plan`.
"""

from __future__ import annotations

import math
from typing import Any

from model.depth.schemes import SCHEMES
from model.errors import UserError
from model.words import quantity
from parallel.hardware.gpus import Gpu, planned_gpu
from pretrain.config.compose import SHIPPED, compose
from pretrain.config.errors import checked
from pretrain.config.load import complete_model, load_config
from pretrain.config.schema import RunConfig
from pretrain.config.yaml_reader import Plain
from pretrain.design.sizes import Sizes, sizes_for
from pretrain.design.wish import Design, Wish
from pretrain.plan.layouts import (
    Prediction,
    days,
    possible,
    rank,
    why_none,
    work_of,
)

FAMILIES = {"gpt": "model/rotary.yaml"}
"""Families that can be designed, and the shipped file with their layer."""
BATCH_TOKENS, BUDGET = 256 * 2048, 31.5e9
"""Tokens of a step, and of the run that has such steps: configs/run/days.yaml."""
WARMUP_STEPS = 2000
"""Of such a run, a warm-up of a tenth ends here at the latest."""
LEAST_STEPS = 100
TYPED = {
    "name": "--name",
    "data.corpora.0.path": "--data",
    "data.seq_length": "--seq-length",
    "model.vocab_size": "--vocab-size",
    "model.num_layers": "--layers",
}
"""Options of the command by the keys that take their values as they are."""


def design(wish: Wish) -> tuple[Design, RunConfig, Prediction]:
    """What was chosen, as a configuration that holds together, and what `fathom plan` says of it.

    Raises UserError in one line for what cannot be had.
    """
    device = planned_gpu(wish.gpu)
    _check(wish)
    found = Design(run_name(wish))
    layer = _section(FAMILIES[wish.family], "model")
    recipe = load_config(SHIPPED / "quickstart.yaml", [f"+include={SHIPPED / 'recipe' / wish.scheme}.yaml"])
    given: dict[str, Plain] = {"vocab_size": wish.vocab_size, "max_position_embeddings": wish.seq_length}
    sizes = sizes_for(wish.params, wish.layers, {**layer, **given, "scheme": wish.scheme})
    _model(found, wish, sizes, layer)
    _scheme(found, wish, recipe)
    batch, steps = _batch(wish)
    _data(found, wish, batch, steps)
    _rate(found, recipe, steps)
    _habits(found, steps)
    whole = found.overrides()
    train = whole["train"]
    assert isinstance(train, dict)
    whole["train"] = {**train, "micro_batch_size": 1}  # until the layout says otherwise
    config = checked(RunConfig, whole, f"--scheme {wish.scheme}: ", TYPED)
    prediction = _layout(found, wish, config, device)
    return found, checked(RunConfig, found.overrides(), ""), prediction


def run_name(wish: Wish) -> str:
    """The run's name, as wished or after its sizes."""
    return (
        wish.name or f"{wish.family}_{quantity(wish.params).replace('.', 'p').lower()}_{wish.layers}_layers"
    )


def _check(wish: Wish) -> None:
    if wish.family not in FAMILIES:
        raise UserError(
            f"--family {wish.family} cannot be designed yet, only {', '.join(FAMILIES)}: "
            "take one of the shipped configurations, such as configs/deep_bert_base_96_layers.yaml"
        )
    if wish.scheme not in SCHEMES:
        raise UserError(f"--scheme {wish.scheme} is unknown: choose one of {', '.join(SCHEMES)}")


def _section(file: str, name: str) -> dict[str, Plain]:
    """The keys of a section that a shipped file itself gives."""
    content = compose(SHIPPED / file)
    section = content.values[name]
    assert isinstance(section, dict)
    return {key: section[key] for key in section if f"{name}.{key}" in content.origins}


def _model(found: Design, wish: Wish, sizes: Sizes, layer: dict[str, Plain]) -> None:
    found.add(
        f"layer: {FAMILIES[wish.family]}, as the shipped family from 24 to 1000 layers has it",
        model__family=wish.family,
        **{f"model__{key}": value for key, value in layer.items()},
    )
    found.add(
        f"width {sizes.hidden}, {sizes.heads} heads of {sizes.hidden // sizes.heads}: the multiple of a head "
        f"at which the feed-forward comes nearest to 4 times the width ({sizes.ffn / sizes.hidden:.2f})",
        model__num_layers=wish.layers,
        model__hidden_size=sizes.hidden,
        model__num_attention_heads=sizes.heads,
    )
    found.add(
        f"feed-forward {sizes.ffn}: what brings the model to {sizes.parameters:,} parameters, "
        f"{sizes.parameters / wish.params - 1:+.2%} of what was asked for",
        model__ffn_hidden_size=sizes.ffn,
        model__vocab_size=wish.vocab_size,
        model__max_position_embeddings=wish.seq_length,
    )


def _scheme(found: Design, wish: Wish, recipe: RunConfig) -> None:
    """The scheme with its recipe, and what carries the recipe's settings over to this size."""
    small, entry = recipe.model, SCHEMES[wish.scheme]
    init = small.init.model_dump(exclude_defaults=True)
    found.add(
        f"scheme {wish.scheme} as configs/recipe/{wish.scheme}.yaml has it, the settings of docs/schemes.md",
        model__scheme=wish.scheme,
        model__scheme_options=dict(small.scheme_options),
        **{f"model__init__{key}": value for key, value in init.items()},
    )
    if small.transfer.method != "none":
        transfer = small.transfer.model_dump(exclude_defaults=True)
        why = f"the recipe's own, tuned at width {small.transfer.base_hidden}, one rate for all depths"
    else:
        transfer = {"method": "completep", "base_hidden": small.hidden_size}
        why = f"from the recipe's width {small.hidden_size}"
        option = entry.transfer.option if entry.transfer else None
        if entry.transfer is not None and (option is None or option in small.scheme_options):
            transfer["base_layers"] = small.num_layers
            why += f" and {small.num_layers} layers"
        else:
            why += "; for depth no rule is known (docs/transfer.md), so try rates around it"
    transfer["base_head_dim"] = small.hidden_size // small.num_attention_heads
    found.add(
        f"model.transfer carries the rate over by CompleteP's rules: {why}",
        **{f"model__transfer__{key}": value for key, value in transfer.items()},
    )


def _batch(wish: Wish) -> tuple[int, int]:
    """(samples of a step, steps). Raises UserError for a budget of too few steps."""
    wanted = BATCH_TOKENS * math.sqrt(wish.tokens / BUDGET) / wish.seq_length
    batch = 2 ** max(0, round(math.log2(wanted)))
    if wish.gpus <= batch:
        batch = max(1, round(batch / wish.gpus)) * wish.gpus
    steps = math.ceil(wish.tokens / (batch * wish.seq_length))
    if steps < LEAST_STEPS:
        raise UserError(
            f"--tokens {quantity(wish.tokens)}: {steps} steps of {batch} samples, which is no training: "
            f"give {quantity(LEAST_STEPS * batch * wish.seq_length)} or more"
        )
    return batch, steps


def _data(found: Design, wish: Wish, batch: int, steps: int) -> None:
    found.add(
        f"batch {batch} x {wish.seq_length} tokens: half a million at 31 billion tokens "
        "(configs/run/days.yaml), growing as the root of the budget (critical batch, Zhang et al. 2024), "
        "a multiple of the GPUs where there are fewer",
        data__corpora=[{"path": str(wish.data)}],
        data__seq_length=wish.seq_length,
        train__global_batch_size=batch,
    )
    found.add(
        f"{steps} steps: {quantity(float(steps) * batch * wish.seq_length)} tokens, the budget",
        train__steps=steps,
    )


def _rate(found: Design, recipe: RunConfig, steps: int) -> None:
    optimizer, small = recipe.optimizer, recipe.model
    carried = small.transfer.method != "none"
    days_of = _section("run/days.yaml", "optimizer")
    found.add(
        f"peak rate {optimizer.lr:g}: the recipe's, which model.transfer multiplies for this size",
        optimizer__lr=optimizer.lr,
        **{f"optimizer__{key}": value for key, value in days_of.items() if key != "lr"},
    )
    factors: dict[str, Any] = optimizer.factors.model_dump(exclude_defaults=True)
    for role, each in factors.items():
        for key, value in each.items():
            # A word would follow the size of this model; what is meant is that of the base.
            if value == "sqrt(hidden)" and not carried:
                each[key] = math.sqrt(small.hidden_size)
        found.add(
            f"{role}: as in the recipe (docs/research/forgetting.md, The recipe)",
            **{f"optimizer__factors__{role}__{key}": value for key, value in each.items()},
        )
    share = recipe.schedule.warmup_steps / recipe.train.steps
    warmup = max(1, min(round(share * steps), round(WARMUP_STEPS * share / 0.1)))
    found.add(
        f"warm-up {warmup} steps: the recipe's {share:.0%} of the run, and no more than "
        f"{round(WARMUP_STEPS * share / 0.1)} steps",
        schedule__kind="cosine",
        schedule__warmup_steps=warmup,
    )


def _habits(found: Design, steps: int) -> None:
    """Precision, evaluation, checkpoints and logs."""
    each = max(1, min(1000, steps // 20))
    found.add("bf16, which every GPU that can be planned for has", train__precision="bf16")
    found.add(
        "evaluation, checkpoints and logs as configs/run/days.yaml, twenty of them at least",
        train__eval_interval=each,
        train__eval_samples=512,
        checkpoint__interval=each,
        checkpoint__keep_last=3,
        checkpoint__keep_every=10 * each,
        log__interval=10,
        log__signal_interval=max(1, each // 2),
    )


def _layout(found: Design, wish: Wish, config: RunConfig, device: Gpu) -> Prediction:
    """The fastest layout that fits. Raises UserError where none does."""
    work = work_of(config, complete_model(config, wish.vocab_size))
    tried = possible(work, device, wish.gpus, config.parallel)
    best = rank(tried, most=1)
    if not best:
        reason = why_none(work, device, wish.gpus, tried)
        raise UserError(f"--gpus {wish.gpus} --gpu {wish.gpu}: {reason[0].lower()}{reason[1:].rstrip('.')}")
    chosen = best[0]
    given = chosen.parallel.model_dump(mode="json", exclude_defaults=True)
    recompute = given.pop("recompute", None) or {}
    found.add(
        f"layout: the fastest of {len(tried)} that `fathom plan` tries for {wish.gpus} x {device.name}: "
        f"{quantity(chosen.tokens_per_s)} tokens/s, MFU {chosen.mfu:.0%}, "
        f"{chosen.memory.total / 2**30:.0f} of {device.memory / 2**30:.0f} GiB, "
        f"{days(chosen, wish.tokens):.1f} days",
        train__micro_batch_size=chosen.micro,
        **{f"parallel__{key}": value for key, value in given.items()},
        **{f"parallel__recompute__{key}": value for key, value in recompute.items()},
    )
    return chosen
