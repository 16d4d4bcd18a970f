"""The model of every family: embedding, Megatron-core's block of our layers, and a head.

The class is ours, so that it depends on Megatron-core's block, embedding and parallel linear layers
alone. What the schedules of Megatron-core read of a model: `set_input_tensor`, `decoder.layers`,
`config`, `model_type`, `vp_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from model.config import ModelConfig
from model.depth.folded import FoldedLayer
from model.depth.placed import PlacedLayer
from model.layers.capped import soft_capped
from model.layers.context import of_pieces, places
from model.layers.transformer_config import stack_config
from model.layers.windows import WindowMask
from model.loss_kernels import rows_at_once
from model.network.angles import RotaryAngles
from model.network.batch import unread
from model.network.chunks import in_chunks
from model.network.crossed import crossed_masks, seam_spec
from model.network.documents import additive, hidden_keys, packed_sequences
from model.network.embedding import input_tables
from model.network.frames import FrameTables, with_source
from model.network.fused_losses import FusedLosses, Projection, fused_losses
from model.network.head import TargetHead, TransformHead
from model.network.losses import Extra, cross_entropy, cut_losses, likeliest, rank_of_label
from model.network.parts import Kernels, kernel_parts, mark_tensor_parallel
from model.network.patches import PatchTables, PooledHead
from model.parameters.table import parameter_table
from model.weights.init import logit_scale


class LanguageModel(MegatronModule):
    """A model of tokens of any family under a depth scheme, or one pipeline stage of it.

    kernels: parts of the layers, PyTorch's or Transformer Engine's (`model/network/parts.py`);
    names and values of parameters are the same.
    """

    model_type = ModelType.encoder_or_decoder
    """What Megatron-core's schedules ask of any model: there is no other."""
    label_smoothing: float = 0.0
    """Share of each label that is spread over the vocabulary, in gradients alone."""
    embedding: LanguageModelEmbedding
    """What makes the stream, on the first stage; of images a `PatchTables`."""
    z_loss: float = 0.0
    """Factor on log(Z)^2 beside the loss of each label, in gradients alone."""
    loss_chunk: int | None = None
    """Positions of a whole sequence whose logits exist at once beside labels; None: all."""
    loss_kernel: FusedLosses | None = None
    """What computes losses from what the output projection reads; None: `losses`, of logits."""
    plan: tuple[FoldedLayer, ...]
    """Of all layers of the model, whatever stage of it this is, in the units that layers compute in
    (`model/depth/folded.py`).
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        *,
        seq_length: int,
        source_length: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        kernels: Kernels = "local",
    ) -> None:
        """seq_length, source_length: tokens of the longest sequence, of an encoder's under it."""
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.placed = model.placed_layers()
        self.crossed = model.blueprint.crossed
        self.plan = plan = tuple(place.folded for place in self.placed)
        self.fp32_stream = bool(config.fp32_residual_connection)
        last = self.placed[-1].stack
        cap, self.logit_soft_cap = model.attention.soft_cap, model.logit_soft_cap
        layer_spec, norm = kernel_parts(kernels, self.fp32_stream, causal=last.causal, soft_cap=cap)
        self.ranks, self.seq_length = self.pg_collection.cp.size(), seq_length
        if self.ranks > 1:
            whole_spec = layer_spec
            layer_spec = lambda plan: of_pieces(whole_spec(plan))  # noqa: E731
        if pre_process:
            self._build_tables(model, seq_length, source_length)
        # Transformer Engine's attention knows its window itself, but not where sequences are cut.
        self.adds = kernels == "local" or cap is not None or self.ranks > 1
        self.window = WindowMask(config) if self.adds and config.window_size is not None else None
        self.causal = last.causal and not self.crossed
        self.packs = self.causal and not self.adds
        self.angles: RotaryAngles | None = None
        if model.position == "rotary":
            self.angles = RotaryAngles(model, config, self.pg_collection.cp, restarts=self.causal)
        depth = model.stack_plan(last)
        self.decoder = self._block(model, layer_spec, norm if depth.final_norm else None)
        # Nothing but a norm undoes the units of the stream.
        unit = 1.0 if depth.final_norm else plan[-1].leaving
        self.logit_scale = logit_scale(model)
        self.head: TargetHead | None = None
        if post_process and model.head_transform:
            self.head = TransformHead(model, config, unit)
        else:
            self.logit_scale *= unit
            if post_process and model.blueprint.head.targets:
                self.head = TargetHead(config)
            if post_process and model.image is not None:
                self.head = PooledHead(model.image, config)
        if post_process:
            self._build_output(model)
        self.unread, self.images = unread(model), model.image is not None
        self._finish()
        table = parameter_table(model, positions=seq_length, source_positions=source_length)
        self.rows = {row.name: row for row in table}
        self.embedding_norm = pre_process and depth.embedding_norm
        if self.embedding_norm:
            self.embedding.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
            if self.crossed:
                self.source_embedding.norm = norm(config, config.hidden_size, config.layernorm_epsilon)
        if self.decoder.final_layernorm is not None:
            self.decoder.final_layernorm.eps = config.layernorm_epsilon / plan[-1].leaving ** 2
        self.true_vocab = model.vocab_size or model.padded_vocab

    def _build_output(self, model: ModelConfig) -> None:
        config = self.config
        self.output_layer = ColumnParallelLinear(
            config.hidden_size,
            model.padded_vocab,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
            tp_group=self.pg_collection.tp,
        )
        if model.logit_bias:
            # Megatron-core's output layer adds a bias where it has one, and is built without.
            rows = self.output_layer.output_size_per_partition
            self.output_layer.bias = nn.Parameter(torch.empty(rows, dtype=config.params_dtype))
            set_tensor_model_parallel_attributes(self.output_layer.bias, True, 0, 1)
        if self.head is not None:
            # It gets whole sequences, and has to sum its input's gradient itself.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = config.tensor_model_parallel_size > 1

    def _build_tables(self, model: ModelConfig, positions: int, source_positions: int | None = None) -> None:
        longest, groups = model.max_position_embeddings or positions, self.pg_collection
        if model.image is not None:
            self.embedding = PatchTables(model, model.image, self.config, groups)
            return
        self.embedding = input_tables(model, self.config, longest, groups)
        if not self.crossed:
            return
        longest = model.max_source_positions or source_positions or 0
        if model.speech is not None:
            self.source_embedding = FrameTables(model, model.speech, self.config, groups, longest)
            return
        words = self.embedding.word_embeddings if model.share_embeddings else None
        self.source_embedding = input_tables(model, self.config, longest, groups, words)

    def _block(
        self, model: ModelConfig, layer_spec: Callable[..., ModuleSpec], norm: type | None
    ) -> TransformerBlock:
        # Slices by GLOBAL layer number:
        # a stage must never compute depth constants from its own layer count.
        rank = get_pipeline_model_parallel_rank()
        first = get_transformer_layer_offset(self.config, self.vp_stage, rank)
        count = get_num_layers_to_build(self.config, self.vp_stage, rank)
        held = self.placed[first : first + count]
        if self.crossed:
            layers = self._seam_specs(model, layer_spec, held)
        else:
            layers = [layer_spec(place.folded) for place in held]
        return TransformerBlock(
            config=self.config,
            spec=TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=self.vp_stage,
        )

    def _seam_specs(
        self, model: ModelConfig, layer_spec: Callable[..., ModuleSpec], held: Sequence[PlacedLayer]
    ) -> list[ModuleSpec]:
        sizes = {stack.name: stack_config(self.config, model.of(stack)) for stack in model.blueprint.stacks}
        return [
            seam_spec(
                # Its masks come with the batch.
                layer_spec(place.folded, causal=False, cross=place.stack.cross),
                place,
                sizes[place.stack.name],
                joins=place is held[-1] and place is not self.placed[-1],
            )
            for place in held
        ]

    def _finish(self) -> None:
        """What Megatron-core's parts expect of the model around them."""
        mark_tensor_parallel(self)
        for name, module in self.named_modules():
            if hasattr(module, "finish_init"):
                module.finish_init(get_quant_config_or_none(name, self.config.quant_recipe))

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Takes what the stage before sent, before a forward pass: [s, b, h] or [s / TP, b, h]."""
        (stream,) = input_tensor
        self.decoder.set_input_tensor(stream)

    def forward(
        self, batch: Mapping[str, Tensor], *, hits: bool = False, within: int | None = None
    ) -> Tensor:
        """Losses in nats where the batch has labels, else logits; the stream on an inner stage.

        batch: a micro-batch, of which every stage gets all; s is that of this rank's pieces
        (`model/layers/context.py`):
        tokens [b, s]: ids.
        documents [b, t]: numbers, of the whole sequences; tokens of different ones do not see each
        other. Padding has one.
        positions [b, s]: rows of a table of positions, in a decoder angles too;
        without them 0 .. s - 1.
        token_types [b, s]: rows of a table of token types; without them 0.
        targets [b, t]: positions that an encoder's head reads; without them all.
        labels [b, t] -> losses [b, t]; without them logits [b, t, V / TP].
        With an encoder under the decoder, whose input the tokens are:
        source [b, s_e]: ids that the encoder reads.
        source_documents [b, s_e], documents [b, s_d]: numbers of pairs from 1, 0 for padding.
        source_positions [b, s_e]: as positions.
        With an encoder of speech, instead of source and source_documents:
        frames [b, 4 s_e, m], in any float format, standardised, zeros outside of clips.
        frame_documents [b, 4 s_e]: numbers of clips (`model/network/frames.py`).
        Of images, instead of all that is about tokens:
        images [b, channels, rows, columns], in any float format; labels [b, t]: t classes of each.
        hits: losses, and 1 for every label that is the likeliest token, else 0: [2, b, t] in fp32.
        within: beside hits, 1 for every label among so many likeliest, [3, b, t].
        Raises ValueError for tensors that this model does not read.
        """
        if unread := batch.keys() & self.unread:
            raise ValueError(f"a batch has {sorted(unread)}, which this model does not read")
        stream = self._both_streams(batch) if self.crossed else self._one_stream(batch)
        if not self.post_process:
            return stream
        hidden_sbh = self._at_targets(stream, batch.get("targets"))
        if "labels" not in batch:
            return self._logits(hidden_sbh).transpose(0, 1).contiguous()
        measure, labels = partial(self._measured, hits=hits, within=within), batch["labels"]
        size = self._positions_at_once(batch)
        if size is None:
            return measure(hidden_sbh, labels)
        if self.loss_kernel is not None and not hits:
            return fused_losses(self.loss_kernel, self._read(hidden_sbh), labels, self._projection(), size)
        ranks = self.pg_collection.tp.size() if self.output_layer.sequence_parallel else 1
        return in_chunks(measure, hidden_sbh, labels, size, ranks)

    def _positions_at_once(self, batch: Mapping[str, Tensor]) -> int | None:
        """Positions of every sample whose logits may exist at once beside labels; None: all."""
        if self.loss_chunk is not None:
            # Shorter sequences come as more rows.
            return int(self.loss_chunk * batch["tokens"].shape[1] * self.ranks // self.seq_length)
        if self.loss_kernel is None:
            return None
        labels = batch["labels"]
        return -(-rows_at_once(labels.numel(), self.config.hidden_size, self.true_vocab) // len(labels))

    def _measured(self, hidden_sbh: Tensor, labels: Tensor, *, hits: bool, within: int | None) -> Tensor:
        """What `forward` gives for labels [b, t] of what the output projection reads."""
        logits_sbv = self._logits(hidden_sbh)
        if self.images:  # an image has one row of logits, whatever the number of its labels
            logits_sbv = logits_sbv.repeat(labels.shape[1], 1, 1)
        if not hits:
            return self.losses(labels, logits_sbv)
        # First, as the losses may be computed in the memory of the logits.
        tp = self.pg_collection.tp
        group = tp if tp.size() > 1 else None
        best_sb = likeliest(logits_sbv, self.true_vocab, group)
        measured = [(best_sb.t() == labels).float()]
        if within is not None:
            rank_sb = rank_of_label(logits_sbv, labels.t(), self.true_vocab, group)
            measured.append((rank_sb.t() < within).float())
        return torch.stack((self.losses(labels, logits_sbv).float(), *measured))

    def _one_stream(self, batch: Mapping[str, Tensor]) -> Tensor:
        stream: Tensor = self.decoder(
            hidden_states=self._embed(batch) if self.pre_process else None,
            attention_mask=None if self.images else self._mask(batch),
            rotary_pos_emb=None if self.angles is None else self.angles.of_batch(batch),
            **self._packed(batch),
        )
        return stream

    def _both_streams(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The message of an inner stage (`model/layers/seam.py`), or the decoder's stream."""
        message, angles = None, None
        if self.pre_process:
            message = torch.cat((self._embed_source(batch), self._embed_with(self.embedding, batch)))
        heard = with_source(batch)
        if self.angles is not None:
            lengths = heard["source"].shape[1], batch["tokens"].shape[1]
            longest = self.angles.of_length(max(lengths))
            angles = torch.cat([longest[:length] for length in lengths])
        own, of_source = crossed_masks(heard)
        stream: Tensor = self.decoder(
            hidden_states=message, attention_mask=own, context_mask=of_source, rotary_pos_emb=angles
        )
        return stream

    def enter(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        """The stream [s, b, h] before the first layer, and what layers read beside it, by name.

        For a model that is no stage of a pipeline.
        batch: as `forward` reads it, of which labels are left.
        """
        angles = None if self.angles is None else self.angles.of_batch(batch)
        beside: dict[str, Any] = {
            "attention_mask": self._mask(batch),
            "rotary_pos_emb": angles,
            **self._packed(batch),
        }
        return self._embed(batch), beside

    def leave(self, stream_sbh: Tensor) -> Tensor:
        """Logits [b, s, V] of the stream after the last layer, in its units.

        For a model that is no stage of a pipeline.
        """
        norm: Callable[[Tensor], Tensor] | None = self.decoder.final_layernorm
        hidden_sbh = self._at_targets(stream_sbh if norm is None else norm(stream_sbh), None)
        return self._logits(hidden_sbh).transpose(0, 1).contiguous()

    def _at_targets(self, hidden_sbh: Tensor, targets_bt: Tensor | None) -> Tensor:
        """What the output projection reads, [t, b, h], of what the block gives."""
        return hidden_sbh if self.head is None else self.head(hidden_sbh, targets_bt)

    def _embed(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The stream [s, b, h] that enters the first layer, with the scheme's norm."""
        if self.images:
            stream: Tensor = self.embedding(batch["images"])
            return self.embedding.norm(stream) if self.embedding_norm else stream
        return self._embed_with(self.embedding, batch)

    def _embed_source(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The stream [s_e, b, h] of an encoder under a decoder."""
        positions = batch.get("source_positions")
        if "frames" in batch:
            tables: FrameTables = self.source_embedding
            stream: Tensor = tables(batch["frames"], batch["frame_documents"], positions)
            normed: Tensor = tables.norm(stream) if self.embedding_norm else stream
            return normed
        source = {"tokens": batch["source"]}
        if positions is not None:
            source["positions"] = positions
        return self._embed_with(self.source_embedding, source)

    def _embed_with(self, tables: LanguageModelEmbedding, batch: Mapping[str, Tensor]) -> Tensor:
        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = self._places(tokens).expand_as(tokens)
        types = batch.get("token_types")
        if types is None and tables.tokentype_embeddings is not None:
            types = torch.zeros_like(tokens)
        stream: Tensor = tables(input_ids=tokens, position_ids=positions, tokentype_ids=types)
        return tables.norm(stream) if self.embedding_norm else stream

    def _mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """What layers hide, all of it; None where their kind of mask says it.

        PyTorch's kernels get it added to scores, Transformer Engine's True where hidden.
        """
        documents = None if self.packs else batch.get("documents")
        if self.window is None and documents is None:
            return None
        tokens = batch["tokens"]
        places = self._places(tokens)
        hidden = None if documents is None else hidden_keys(documents, places, causal=self.causal)
        if self.window is not None:
            hidden = self.window(hidden, places, tokens.shape[1] * self.ranks)
        return hidden if hidden is None or not self.adds else additive(hidden, self.config.params_dtype)

    def _packed(self, batch: Mapping[str, Tensor]) -> dict[str, PackedSeqParams]:
        """What the block is told of documents where its kernels know rows of them."""
        if not self.packs or "documents" not in batch:
            return {}
        return {"packed_seq_params": packed_sequences(batch["documents"])}

    def _places(self, tokens: Tensor) -> Tensor:
        """Positions [s] of a rank's tokens [b, s] in their sequences."""
        group = self.pg_collection.cp
        return places(tokens.shape[1] * self.ranks, group.rank(), self.ranks, tokens.device)

    def _read(self, hidden_sbh: Tensor) -> Tensor:
        """What the output projection reads, with the logit scale, which belongs to it."""
        if self.logit_scale != 1.0:
            hidden_sbh = hidden_sbh * self.logit_scale
        if self.fp32_stream:
            hidden_sbh = hidden_sbh.to(self.config.params_dtype)
        return hidden_sbh

    def _projection(self) -> Projection:
        """The output projection of a model that is not cut by tensor parallelism."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_weight() if tied else self.output_layer.weight
        bias = self.output_layer.bias if self.head is None or self.head.bias is None else self.head.bias
        extra = Extra(self.label_smoothing, self.z_loss)
        return Projection(weight, bias, self.logit_soft_cap, extra).of(self.true_vocab)

    def _logits(self, hidden_sbh: Tensor) -> Tensor:
        """[s, b, V / TP]."""
        weight = self.shared_weight() if self.share_embeddings_and_output_weights else None
        logits_sbv: Tensor = self.output_layer(self._read(hidden_sbh), weight=weight)[0]
        bias = None if self.head is None else self.head.bias
        return soft_capped(logits_sbv if bias is None else logits_sbv + bias, self.logit_soft_cap)

    def shared_weight(self) -> Tensor:
        """The table of words where it is the output projection too: this stage's copy."""
        part = self.embedding.word_embeddings if self.pre_process else self.output_layer
        weight: Tensor = part.weight
        return weight

    def losses(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross-entropy per token in nats, [b, s].

        labels: [b, s]; logits: [s, b, V / TP].
        Padding rows of the vocabulary take no part.
        """
        extra = Extra(self.label_smoothing, self.z_loss)
        if self.pg_collection.tp.size() > 1:
            labels_sb = labels.t().contiguous()
            losses_sb = cut_losses(logits, labels_sb, self.true_vocab, self.pg_collection.tp, extra)
            return losses_sb.t().contiguous()
        loss = cross_entropy(logits.flatten(0, 1), labels.t().flatten(), self.true_vocab, *extra)
        return loss.view(labels.shape[1], labels.shape[0]).t().contiguous()
