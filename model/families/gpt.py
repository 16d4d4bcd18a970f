"""Configuration -> Megatron-core's GPTModel on our layer specification."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.folded import FoldedLayer
from model.depth.scheme import SCHEMES
from model.families.losses import cross_entropy
from model.layers.torch_parts import Norm, rotary_table
from model.layers.torch_spec import local_layer_spec
from model.parameters.table import parameter_table
from model.weights.init import logit_scale

Kernels = Literal["local", "te"]


def kernel_parts(
    kernels: Kernels, fp32_stream: bool = False
) -> tuple[Callable[[FoldedLayer], ModuleSpec], type]:
    """The layer specification and the norm around the stack of a set of kernels.

    fp32_stream: the stream is in fp32 and the weights are not. Raises ImportError for `te` where
    Transformer Engine is not installed.
    """
    if kernels == "te":
        from model.layers.te_spec import TENorm, te_layer_spec

        return partial(te_layer_spec, fp32_stream=fp32_stream), Norm if fp32_stream else TENorm
    return partial(local_layer_spec, fp32_stream=fp32_stream), Norm


def mark_tensor_parallel(module: nn.Module) -> None:
    """Sets the attributes that say how weights are cut over tensor-parallel ranks.

    Megatron-core sets them only where it draws the values itself.
    """
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if weight is None or hasattr(weight, "tensor_model_parallel"):
            continue
        if isinstance(part, (ColumnParallelLinear, VocabParallelEmbedding)):
            set_tensor_model_parallel_attributes(weight, True, 0, 1)
        elif isinstance(part, RowParallelLinear):
            set_tensor_model_parallel_attributes(weight, True, 1, 1)


class GPT(GPTModel):
    """A decoder-only language model under a depth scheme, or one pipeline stage of it.

    Forward as Megatron-core's: tokens [b, s], positions [b, s] -> logits [b, s, V / TP],
    or per-token losses [b, s] where labels are given.
    kernels: parts of the layers, PyTorch's (`local`) or Transformer Engine's (`te`);
    names and values of parameters are the same.
    plan: of all layers of the model, whatever stage of it this is;
    layers compute in its units (`model/depth/folded.py`).
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        seq_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        kernels: Kernels = "local",
    ) -> None:
        scheme = SCHEMES[model.scheme]
        self.plan = plan = model.depth_plan().folded()
        # Slices by GLOBAL layer number:
        # a stage must never compute depth constants from its own layer count.
        first = get_transformer_layer_offset(config, vp_stage, get_pipeline_model_parallel_rank())
        count = get_num_layers_to_build(config, vp_stage, get_pipeline_model_parallel_rank())
        self.fp32_stream = bool(config.fp32_residual_connection)
        layer_spec, norm = kernel_parts(kernels, self.fp32_stream)
        layers = [layer_spec(layer) for layer in plan[first : first + count]]
        super().__init__(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=layers, layer_norm=norm if scheme.final_norm else None
            ),
            vocab_size=model.padded_vocab,
            max_sequence_length=model.max_position_embeddings or seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type={"learned": "learned_absolute", "rotary": "rope", "none": "none"}[
                model.position
            ],
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
        if post_process and model.logit_bias:
            # Megatron-core's output layer adds a bias where it has one, and is built without.
            rows = self.output_layer.output_size_per_partition
            self.output_layer.bias = nn.Parameter(torch.empty(rows, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.output_layer.bias, True, 0, 1)
        mark_tensor_parallel(self)
        self.rows = {row.name: row for row in parameter_table(model, positions=seq_length)}
        if pre_process and scheme.embedding_norm:
            self.embedding.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.embedding_norm = pre_process and scheme.embedding_norm
        self.logit_scale = logit_scale(model)
        top = plan[-1].leaving
        if self.decoder.final_layernorm is not None:
            self.decoder.final_layernorm.eps = config.layernorm_epsilon / top**2
        elif not scheme.final_norm:
            self.logit_scale *= top  # nothing else undoes the units of the stream
        self.true_vocab = model.vocab_size or model.padded_vocab

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing to send.

        Both copies of a tied embedding are drawn from its name (`model/weights/init.py`),
        and gradients are summed by attribute.
        """

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Embeds tokens, with the scheme's norm after the embedding.

        Rotary angles become what the layers read.
        """
        if self.embedding_norm and decoder_input is None:
            decoder_input = self.embedding.norm(
                self.embedding(input_ids=input_ids, position_ids=position_ids)
            )
        hidden, angles, *rest = super()._preprocess(
            input_ids=input_ids, position_ids=position_ids, decoder_input=decoder_input, **kwargs
        )
        if angles is not None:
            angles = rotary_table(angles, self.config.params_dtype)
        return hidden, angles, *rest

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits or losses of the last stage.

        The logit scale belongs to the output projection and is applied to its input [s, b, h].
        """
        if self.post_process and self.logit_scale != 1.0:
            hidden_states = hidden_states * self.logit_scale
        if self.post_process and self.fp32_stream:
            hidden_states = hidden_states.to(self.config.params_dtype)
        result: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return result

    def enter(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """The stream [s, b, h] before the first layer, and the rotary angles that layers read.

        For a model that is no stage of a pipeline.
        tokens, positions: [b, s].
        """
        hidden, angles, *_ = self._preprocess(input_ids=tokens, position_ids=positions)
        return hidden, angles

    def leave(self, stream_sbh: Tensor) -> Tensor:
        """Logits [b, s, V] of the stream after the last layer, in its units.

        For a model that is no stage of a pipeline.
        """
        norm: Callable[[Tensor], Tensor] | None = self.decoder.final_layernorm
        nothing = dict.fromkeys(
            (
                "input_ids",
                "position_ids",
                "labels",
                "rotary_pos_emb",
                "rotary_pos_cos",
                "rotary_pos_sin",
            )
        )
        return self._postprocess(stream_sbh if norm is None else norm(stream_sbh), **nothing)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy per token in nats, [b, s].

        labels: [b, s]; logits: [s, b, V / TP].
        Padding rows of the vocabulary take no part.
        """
        if self.tp_group_size == 1:
            loss = cross_entropy(logits.flatten(0, 1), labels.t().flatten(), self.true_vocab)
            return loss.view(labels.shape[1], labels.shape[0]).t().contiguous()
        local = logits.shape[-1]
        valid = min(max(self.true_vocab - self.pg_collection.tp.rank() * local, 0), local)
        if valid < local:
            logits[..., valid:].fill_(torch.finfo(logits.dtype).min)
        losses: Tensor = super().compute_language_model_loss(labels, logits)
        return losses

    @property
    def tp_group_size(self) -> int:
        """Tensor-parallel size."""
        return int(self.pg_collection.tp.size())
