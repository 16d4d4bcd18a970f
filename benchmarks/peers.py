"""What Fathom is measured against, written the way its users would.

Shape, precision, data and optimizer are the same.
Every contestant is an object with `step(tokens)`: one optimizer step with clipping over
micro-batches of token ids [accumulation, batch, seq + 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.config import ModelConfig

BETAS, DECAY, CLIP, RATE = (0.9, 0.95), 0.1, 1.0, 1e-4


@dataclass(frozen=True)
class Shape:
    """A GPT-2 shape: learned positions, GELU, LayerNorm, biases, tied embeddings, no dropout."""

    layers: int
    hidden: int
    heads: int
    seq: int
    batch: int
    accumulation: int
    vocab: int

    @property
    def label(self) -> str:
        """Layers x width."""
        return f"{self.layers}x{self.hidden}"

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.seq * self.batch * self.accumulation

    def sample(self) -> Tensor:
        """Token ids of one optimizer step, [accumulation, batch, seq + 1].

        They are the same for all that are compared.
        """
        return torch.randint(
            0,
            self.vocab,
            (self.accumulation, self.batch, self.seq + 1),
            generator=torch.Generator().manual_seed(0),
        )


class Contestant(Protocol):
    """Something that trains."""

    name: str
    keeps_memory: bool
    """Whether it runs with Fathom's setting of the C library's memory allocator, or with its own.

    Fathom's setting is `parallel.launch.cpu.keep_freed_memory`.
    """

    def step(self, tokens: Tensor) -> float:
        """One optimizer step; returns the mean loss."""


class PlainLoop:
    """Micro-batches, backward, clip, fused AdamW: the loop everybody writes.

    loss_of: (inputs, labels) [b, s] -> mean loss.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        *,
        keeps_memory: bool = False,
    ) -> None:
        self.name, self.module, self.loss_of, self.keeps_memory = name, module, loss_of, keeps_memory
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True
        )

    def step(self, tokens: Tensor) -> float:
        """One optimizer step."""
        total: float | Tensor = 0.0
        for micro in tokens:
            loss = self.loss_of(micro[:, :-1], micro[:, 1:]) / len(tokens)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)


class BareLayer(nn.Module):
    """A pre-norm layer with nothing but PyTorch calls: the eager limit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden
        self.heads = shape.heads
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h]."""
        b, s, h = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, s, 3, self.heads, h // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, h)
        )
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class BareGPT(nn.Module):
    """The smallest GPT."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.word, self.position = (
            nn.Embedding(shape.vocab, shape.hidden),
            nn.Embedding(shape.seq, shape.hidden),
        )
        nn.init.normal_(self.word.weight, std=0.02)
        self.layers = nn.ModuleList(BareLayer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.hidden)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """inputs, labels: [b, s] -> mean loss."""
        x = self.word(inputs) + self.position.weight[: inputs.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(F.linear(self.norm(x), self.word.weight).flatten(0, 1), labels.flatten())


def bare(shape: Shape) -> Contestant:
    """Bare PyTorch, eager."""
    model = BareGPT(shape)
    return PlainLoop("bare PyTorch", model, model)


def bare_keeping(shape: Shape) -> Contestant:
    """Bare PyTorch, eager, with Fathom's setting of the memory allocator.

    It shows what is left of the difference.
    """
    model = BareGPT(shape)
    return PlainLoop("bare PyTorch, memory kept", model, model, keeps_memory=True)


def _hf_model(shape: Shape) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab,
        n_positions=shape.seq,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).train()


def huggingface(shape: Shape) -> Contestant:
    """Hugging Face GPT-2 in a plain AdamW loop."""
    model = _hf_model(shape)

    def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())

    return PlainLoop("Hugging Face GPT-2", model, loss_of)


class UnderDeepSpeed:
    """A model under DeepSpeed ZeRO-1, driven as DeepSpeed's manual and Hugging Face's Trainer do.

    That is forward, engine.backward and engine.step per micro-batch.
    loss_of: (engine, inputs, labels [b, s]) -> mean loss.
    """

    keeps_memory = False

    def __init__(
        self,
        name: str,
        shape: Shape,
        model: nn.Module,
        loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor],
    ) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        self.name, self.loss_of = name, loss_of
        config = {
            "train_micro_batch_size_per_gpu": shape.batch,
            "gradient_accumulation_steps": shape.accumulation,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True
        )
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )

    def step(self, tokens: Tensor) -> float:
        """One optimizer step."""
        total = 0.0
        for micro in tokens:
            loss = self.loss_of(self.engine, micro[:, :-1], micro[:, 1:])
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss.detach()) / len(tokens)
        return total


def huggingface_deepspeed(shape: Shape) -> Contestant:
    """Hugging Face GPT-2 under DeepSpeed."""

    def loss_of(engine: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(engine(inputs).logits.flatten(0, 1), labels.flatten())

    return UnderDeepSpeed("Hugging Face GPT-2, DeepSpeed ZeRO-1", shape, _hf_model(shape), loss_of)


def fathom_deepspeed(shape: Shape) -> Contestant:
    """Our model with nothing of our engine."""
    from parallel.launch.one_process import single_process
    from pretrain.train.build import build_chunks

    (model,) = build_chunks(
        _fathom_model(shape, "pre_ln"), single_process(), seq_length=shape.seq, dtype=torch.float32, seed=1
    )

    def loss_of(engine: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = engine(inputs, torch.arange(shape.seq).expand_as(inputs), None, labels=labels).mean()
        return loss

    return UnderDeepSpeed("Fathom's model, DeepSpeed's engine", shape, model.train(), loss_of)


def megatron_core(shape: Shape) -> Contestant:
    """Megatron-core's GPTModel with its own local layer specification, in a plain loop.

    Megatron-core's optimizer and DDP need CUDA.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )
    model = GPTModel(
        config, get_gpt_layer_local_spec(), shape.vocab, shape.seq, share_embeddings_and_output_weights=True
    )
    hidden = torch.triu(torch.ones(1, 1, shape.seq, shape.seq, dtype=torch.bool), 1)
    positions = torch.arange(shape.seq).expand(shape.batch, shape.seq)

    def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
        return model(inputs, positions, hidden, labels=labels).mean()

    return PlainLoop("Megatron-core, its own layers", model, loss_of)


def _fathom_model(shape: Shape, scheme: str) -> ModelConfig:
    from model.config import ModelConfig

    return ModelConfig(
        scheme=scheme,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab,
    )


class Fathom:
    """Fathom: its model, Megatron-core's schedule, its gradient buffers, DeepSpeed ZeRO-1."""

    def __init__(self, shape: Shape, scheme: str = "pre_ln", *, compiled: bool = False) -> None:
        from parallel.engine.engine import Engine, EngineOptions
        from parallel.launch.one_process import single_process
        from pretrain.config.schema import OptimizerConfig
        from pretrain.train.build import adamw, build_chunks

        self.name, self.keeps_memory = f"Fathom {scheme}" + (", compiled" if compiled else ""), True
        topology = single_process()
        chunks = build_chunks(
            _fathom_model(shape, scheme), topology, seq_length=shape.seq, dtype=torch.float32, seed=1
        )
        if compiled:
            from model.layers.compiled import compile_layers

            torch._dynamo.utils.counters.clear()
            compile_layers(chunks)
        self.compiled = compiled
        optimizer = OptimizerConfig(lr=RATE, betas=BETAS, weight_decay=DECAY)
        self.engine = Engine(
            chunks,
            topology,
            make_optimizer=lambda groups: adamw(optimizer, groups),
            options=EngineOptions(
                dtype=torch.float32,
                micro_batch_size=shape.batch,
                seq_length=shape.seq,
                clip=CLIP,
                tied=True,
                decay_embeddings=False,
            ),
        )

    def step(self, tokens: Tensor) -> float:
        """One optimizer step."""
        from pretrain.data.samples import next_tokens
        from pretrain.tasks.causal_lm import CAUSAL_LM
        from pretrain.train.steps import training_step

        batches = [next_tokens(part) for part in tokens]
        loss = self.engine.train_step(training_step(CAUSAL_LM), lambda: iter(batches), len(batches)).loss
        if self.compiled and (graphs := torch._dynamo.utils.counters["stats"]["unique_graphs"]) != 1:
            raise RuntimeError(f"{graphs} compilations instead of one for all layers")
        return loss
