"""The model of a checkpoint on one process.

Losses of given tokens, as the trainer computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import UserError
from parallel.config import Fp8Config
from pretrain.data.documents import document_parts

if TYPE_CHECKING:
    from pretrain.config.schema import BranchConfig
    from pretrain.trained.open import Trained


class Scorer:
    """Weights of a checkpoint of any layout, whole, on this process: on its GPU where there is one.

    precision: auto, fp32 or bf16, as `train.precision`; label: what it came to.
    verified: the checkpoint's files were, already.
    Raises UserError for damage, or a precision this machine lacks.
    """

    end_mark: int | None = None
    """Ends documents that do not see each other, where the model was trained so."""

    def __init__(self, trained: Trained, precision: str = "auto", *, verified: bool = False) -> None:
        from parallel.launch.one_process import single_process

        if not verified:
            trained.reader.verify()
        # First, because it silences what the libraries below say when they are imported.
        topology = single_process()
        from model.layers.transformer_config import transformer_config
        from model.network.language_model import LanguageModel
        from model.parameters.names import named_parameters
        from parallel.checkpoint.loader import check_model
        from parallel.hardware.precision import numerics_for, this_machine

        numerics = numerics_for(precision, "auto", Fp8Config(), this_machine())
        if numerics.dtype != torch.float32 and trained.reader.sections.train.fp32_residual:
            numerics = replace(numerics, fp32_residual=True)
        on_cpu = not torch.cuda.is_available()
        config = transformer_config(
            trained.config,
            dtype=numerics.dtype,
            on_cpu=on_cpu,
            **topology.core_fields(),
            **numerics.core_fields(),
        )
        chunk = LanguageModel(
            trained.config,
            config,
            seq_length=trained.positions,
            source_length=trained.source_positions,
            kernels=numerics.kernels,
        )
        # Megatron-core makes the table of positions in fp32.
        # In training DeepSpeed converts the whole model.
        self.model = (chunk if on_cpu else chunk.cuda()).to(numerics.dtype).eval()
        parameters = list(named_parameters(self.model, 0, 1))
        check_model(trained.reader, parameters)
        warmup = trained.warmup
        if trained.reader.step < warmup.last_step(trained.config.num_layers):
            self._warm_up(warmup, trained.reader.step)
        with torch.no_grad():
            for named in parameters:
                named.parameter.copy_(trained.reader.tensor(named.name))
        self.device = parameters[0].parameter.device
        self.label = f"{numerics.label} on {'the CPU' if on_cpu else this_machine().gpu}"
        self.vocab_size, self.positions = (
            trained.config.vocab_size or trained.config.padded_vocab,
            trained.positions,
        )
        self.learned = trained.config.position == "learned"

    def _warm_up(self, warmup: BranchConfig, step: int) -> None:
        """Gives the branches the shares that they had after `step` steps."""
        from model.layers.branch_share import BranchShares

        assert warmup.steps is not None
        layers: Any = self.model.decoder.layers
        BranchShares(layers, warmup.kind, warmup.steps, len(layers)).fill(step)

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        keep: Tensor | None = None,
        types: Tensor | None = None,
        source: Tensor | None = None,
        source_keep: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, s, padded vocabulary] of token ids [b, s], fp32, on the CPU.

        keep: [b, s], 0 for padding; types: [b, s], rows of a table of token types. Of an encoder.
        source, source_keep: [b, t], of an encoder under a decoder.
        """
        # Padding is a document of its own, which no token sees.
        given = {
            "tokens": tokens,
            "documents": keep,
            "token_types": types,
            "source": source,
            "source_documents": source_keep,
        }
        if source is not None and source.is_floating_point():  # frames of speech
            heard = torch.ones(source.shape[:2], dtype=torch.int64)
            given |= {"source": None, "frames": source, "frame_documents": heard}
        return self._model({name: tensor for name, tensor in given.items() if tensor is not None})

    @torch.no_grad()
    def told(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What an encoder makes of hidden tokens: (losses in nats, whether the likeliest is right).

        batch: of the task `masked_lm`, with labels [b, t]. Both are [b, t], on the CPU.
        """
        given = {name: tensor for name, tensor in batch.items() if name not in ("labels", "weights", "share")}
        logits_bvt = self._model(given)[..., : self.vocab_size].transpose(1, 2)
        labels = batch["labels"]
        losses = F.cross_entropy(logits_bvt, labels, reduction="none")
        return losses, logits_bvt.argmax(1) == labels

    @torch.no_grad()
    def labelled(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Losses of all labels of a batch in nats, [b, t] in fp32, on the CPU.

        batch: with labels [b, t], as a training task makes it.
        """
        return self._model({name: value for name, value in batch.items() if name not in ("weights", "share")})

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits of the classes of images, [n, classes] in fp32, on the CPU.

        batch: of the task `classification`.
        """
        return self._model({"images": batch["images"]})[:, 0, : self.vocab_size]

    def _model(self, given: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.model({name: tensor.to(self.device) for name, tensor in given.items()})
        return found.float().cpu()

    def inputs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(Tokens read, tokens to be predicted), [b, n] each, on the model's device.

        tokens: [b, n + 1].

        Raises UserError for ids outside the vocabulary, or more tokens than there are learned
        positions.
        """
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise UserError(
                f"the data have token ids up to {int(tokens.max())}, "
                f"the model's vocabulary is {self.vocab_size}: it was trained with another one"
            )
        inputs, labels = (part.to(self.device) for part in (tokens[:, :-1], tokens[:, 1:]))
        if self.learned and inputs.shape[1] > self.positions:
            raise UserError(
                f"windows of {inputs.shape[1]} tokens do not fit: "
                f"the model has learned {self.positions} positions"
            )
        return inputs, labels.contiguous()

    @torch.no_grad()
    def losses(self, tokens: Tensor) -> Tensor:
        """Loss of every token but the first, given those before it, in nats.

        tokens: [b, n + 1].
        Returns [b, n] in fp32, on the CPU.

        Raises UserError as `inputs` does.
        """
        inputs, labels = self.inputs(tokens)
        losses: Tensor = self.model(self.batch(inputs) | {"labels": labels})
        return losses.float().cpu()

    def batch(self, inputs: Tensor) -> dict[str, Tensor]:
        """What the model reads with tokens [b, n] of the stream of documents."""
        parts = {} if self.end_mark is None else document_parts(inputs, self.end_mark)
        return {"tokens": inputs, **parts}
