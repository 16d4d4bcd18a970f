"""A tiny model trained for a few steps under any layout. Runs inside ranks.

Also what is needed to compare two such trainings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.parameters.shards import full_shape, put
from parallel.config import ParallelConfig
from parallel.engine.engine import Engine
from pretrain.config.schema import RunConfig
from pretrain.data.documents import document_parts, in_pieces
from pretrain.data.order import micro_batch_indices
from pretrain.data.samples import next_tokens
from pretrain.tasks.causal_lm import CAUSAL_LM
from pretrain.tasks.task import Batch
from pretrain.train.branch_warmup import branch_shares
from pretrain.train.build import build_engine
from pretrain.train.steps import own_tokens, shared, training_step
from tests.distributed import gather, rebuild

SEQ_LENGTH, SOURCE_LENGTH = 16, 12
VOCAB_SIZE = 120  # padded to 128: under tensor parallelism the last rank has rows that are no token


def given(**fields: Any) -> dict[str, Any]:
    """Some fields of a configuration section."""
    return fields


MODEL = given(
    scheme="deepscalelm_pre_ln",
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=SEQ_LENGTH,
)
# The first of two equal pipeline stages, and the second of four, hold layers of both kinds.
SEQ2SEQ = given(family="seq2seq", encoder_layers=3, num_layers=5)
DROPOUT = given(hidden_dropout=0.1, attention_dropout=0.1)
CLASSES = 11
VIT = given(
    family="vit",
    vocab_size=CLASSES,
    vocab_multiple=8,  # under tensor parallelism the last rank has columns that are no class
    tie_embeddings=False,
    max_position_embeddings=None,
    logit_bias=True,
    image=given(height=6, width=10, patch=2, channels=2, zero_head=False),
)
# Of the post-norm kind, with all tables that an encoder may have, and BERT's head.
ENCODER = given(family="bert", scheme="deepscalelm_post_ln", token_types=2, embedding_norm=True)
PLACES = 4
MASKED_LABELS = torch.tensor([5, 70, 119])
"""All that occur in `masked`."""
OPTIMIZER = given(lr=1e-3)
TRAIN = given(steps=100, global_batch_size=8, micro_batch_size=2, precision="fp32", seed=1)


def run_config(
    model: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **optimizer: Any,
) -> RunConfig:
    """A run of the tiny model with changes.

    Its data set does not exist: batches come from the functions below.
    """
    chosen = ModelConfig(**(MODEL | (model or {})))
    source = given(source_length=SOURCE_LENGTH) if chosen.blueprint.crossed else {}
    return RunConfig(
        name="tiny",
        model=chosen,
        data={"corpora": [{"path": "none"}], "seq_length": SEQ_LENGTH} | source | (data or {}),
        parallel=ParallelConfig(**(parallel or {})),
        optimizer=OPTIMIZER | optimizer,
        train=TRAIN | (train or {}),
        schedule=schedule or {},
    )


def engine_of(config: RunConfig, log_p_v: Tensor | None = None) -> Engine:
    """A new engine over the processes of this group; the previous layout is gone afterwards."""
    return build_engine(config, rebuild(config.parallel, config.model), log_p_v)


forward_step = training_step(CAUSAL_LM)


def sample(index: int) -> Tensor:
    """Tokens [seq_length + 1] of a sample, the same on every rank."""
    return torch.randint(0, VOCAB_SIZE, (SEQ_LENGTH + 1,), generator=torch.Generator().manual_seed(index))


def pairs(index: int) -> Batch:
    """A row of two pairs with padding on both sides, the same on every rank.

    Rows have other numbers of labels, so that micro-batches and ranks do.
    """
    generator = torch.Generator().manual_seed(index)

    def side(length: int) -> tuple[Tensor, Tensor, Tensor]:
        ends = torch.randint(1, length // 2 + 1, (2,), generator=generator).cumsum(0)
        places = torch.arange(length)
        number = torch.bucketize(places, ends, right=True)
        begins = torch.cat((torch.zeros(1, dtype=torch.long), ends))[number]
        documents = (number + 1) * (number < 2)
        return torch.randint(0, VOCAB_SIZE, (length + 1,), generator=generator), documents, places - begins

    (source, of_source, source_places), (target, documents, positions) = side(SOURCE_LENGTH), side(SEQ_LENGTH)
    return {
        "source": source[1:],
        "source_documents": of_source,
        "source_positions": source_places,
        "tokens": target[:-1],
        "labels": target[1:],
        "documents": documents,
        "positions": positions,
        "weights": (documents > 0).float(),
    }


def masked(config: RunConfig, index: int) -> Batch:
    """A window of up to three documents and padding, with 0 to PLACES labels."""
    generator = torch.Generator().manual_seed(index)
    ends = torch.randint(1, SEQ_LENGTH + 1, (3,), generator=generator).sort().values
    documents = torch.bucketize(torch.arange(SEQ_LENGTH), ends, right=True) + 1
    found = {
        "tokens": torch.randint(0, VOCAB_SIZE, (SEQ_LENGTH,), generator=generator),
        "documents": torch.where(documents > 3, 0, documents),
        "targets": torch.randperm(SEQ_LENGTH, generator=generator)[:PLACES].sort().values,
        "labels": MASKED_LABELS[torch.randint(0, len(MASKED_LABELS), (PLACES,), generator=generator)],
        "weights": (torch.arange(PLACES) < index % (PLACES + 1)).float(),
    }
    types = {"token_types": (torch.arange(SEQ_LENGTH) > 5).long()} if config.model.token_types else {}
    return found | types


def picture(config: RunConfig, index: int) -> Batch:
    """An image and its class, the same on every rank."""
    image, draw = config.model.image, torch.Generator().manual_seed(index)
    assert image is not None
    return {
        "images": torch.randn(image.shape, generator=draw),
        "labels": torch.randint(0, CLASSES, (1,), generator=draw),
    }


def batches_of(config: RunConfig, engine: Engine, step: int) -> list[Batch]:
    """This rank's micro-batches of a step, by the product's own order."""
    layout, micro = engine.topology.layout, config.train.micro_batch_size
    batch, before = config.batch_sizes.at(step), config.batch_sizes.before(step)
    parts = [
        [before + i for i in micro_batch_indices(0, k, engine.topology.data_rank, layout.data, micro, batch)]
        for k in range(batch // (micro * layout.data))
    ]
    if config.task.samples == "next_token":
        found = [next_tokens(torch.stack([sample(i) for i in part])) for part in parts]
        if config.data.document_mask:  # every eighth token ends a document
            found = [one | document_parts(one["tokens"] % 8, 0) for one in found]
        cut = [in_pieces(one, config.seq_lengths.at(step)) for one in found]
        return [own_tokens(one, engine.topology) for one in cut]
    rows_of: dict[str, Callable[[int], Batch]] = {
        "images": functools.partial(picture, config),
        "masked": functools.partial(masked, config),
        "pairs": pairs,
    }
    row_of = rows_of[config.task.samples]
    rows = [[row_of(i) for i in part] for part in parts]
    stacked = [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in rows]
    if "weights" not in stacked[0]:
        return stacked
    whole = sum(int(row_of(index)["weights"].sum()) for index in range(before, before + batch))
    return shared(stacked, whole, layout.data)


@dataclass
class Curve:
    """What a training gave."""

    losses: list[float] = field(default_factory=list)
    """Loss of every step."""
    norms: list[float] = field(default_factory=list)
    """Global gradient norm of every step."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """The whole parameters at the end by canonical name."""
    unequal: list[str] = field(default_factory=list)
    """Parameters of which two ranks that must agree held different values."""


def train(
    config: RunConfig, engine: Engine, first: int, last: int, each_step: Callable[[int], None] | None = None
) -> Curve:
    """Steps first .. last - 1 with the tiny model's data."""
    curve = Curve()
    engine.set_lr(config.optimizer.lr)
    shares = branch_shares(config, engine.chunks)
    for step in range(first, last):
        if shares is not None:
            shares.fill(step)
        engine.step_length = config.seq_lengths.at(step)
        batches = batches_of(config, engine, step)
        result = engine.train_step(training_step(config.task), functools.partial(iter, batches), len(batches))
        assert result.applied, f"step {step} was skipped: loss {result.loss}, norm {result.grad_norm}"
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        if each_step is not None:
            each_step(step)
    return curve


def whole_parameters(engine: Engine) -> tuple[dict[str, Tensor], list[str]]:
    """Whole parameters by canonical name in fp32.

    Also the names of those that ranks hold differently.
    The same on all ranks.
    """
    with engine.gathered():
        local = [
            (named.name, named.shard, named.parameter.detach().float().clone()) for named in engine.parameters
        ]
    parts: dict[str, dict[Any, Tensor]] = {}
    unequal: list[str] = []
    for name, shard, tensor in (entry for rank in gather(local) for entry in rank):
        held = parts.setdefault(name, {}).setdefault(shard, tensor)
        if not torch.equal(held, tensor) and name not in unequal:
            unequal.append(name)
    whole = {}
    for name, shards in parts.items():
        shard, tensor = next(iter(shards.items()))
        assert len(shards) == shard.count, f"{name} has {len(shards)} of {shard.count} parts"
        whole[name] = torch.empty(full_shape(tensor.shape, shard))
        for shard, tensor in shards.items():
            put(whole[name], tensor, shard)
    return whole, unequal


def whole_curve(config: RunConfig, engine: Engine, steps: int) -> Curve:
    """A training from the start with a new engine, and the parameters at its end."""
    curve = train(config, engine, 0, steps)
    curve.parameters, curve.unequal = whole_parameters(engine)
    return curve


def run(config: RunConfig, steps: int) -> Curve:
    """A training from the start, on all ranks."""
    return whole_curve(config, engine_of(config), steps)
