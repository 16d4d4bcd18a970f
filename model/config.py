"""What a user may say about the model: a strict schema.

Its cross-checks live beside the fields they protect.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pydantic import model_validator

from model.depth.placed import PlacedLayer
from model.depth.plan import DepthPlan
from model.depth.schemes import SCHEMES, scheme_names
from model.depth.transfer import Reach
from model.errors import UserError
from model.families.family import Family, Stack
from model.families.table import FAMILIES, OWN_SETTINGS
from model.fields import ModelFields
from model.images import image_problem
from model.norms import NORMS
from model.speech import speech_problem
from model.words import printable, written


class ModelConfig(ModelFields):
    """A model. Sizes are whole-model sizes, never per-rank ones."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.family not in FAMILIES:
            raise ValueError(
                f"model.family={printable(repr(self.family), 60)} is not a family; "
                f"choose one of {', '.join(FAMILIES)}"
            )
        if self.scheme not in SCHEMES:
            raise ValueError(
                f"model.scheme={printable(repr(self.scheme), 60)} is not a scheme; "
                f"choose one of {', '.join(scheme_names())}"
            )
        for stack in self.blueprint.stacks:
            self.stack_plan(stack)  # refuses options and depths that have no constants
        self.init.check_read(self.scheme, recursion=self.plans_correlation)
        self._check_family_reads()
        self._check_crossed()
        if self.blueprint.inputs == "patches" and (problem := image_problem(self)):
            raise ValueError(problem)
        if self.blueprint.inputs == "frames" and (problem := speech_problem(self)):
            raise ValueError(problem)
        self._check_unigram()
        self._check_window()
        for name in ("num_attention_heads", "encoder_attention_heads"):
            heads = getattr(self, name)
            if heads is not None and self.head_dim is None and self.hidden_size % heads:
                raise ValueError(
                    f"model.hidden_size={self.hidden_size} is not divisible by model.{name}={heads}: "
                    "change one of them or set model.head_dim"
                )
        if self.num_attention_heads % self.groups:
            raise ValueError(
                f"model.num_query_groups={self.groups} does not divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        base = self.rotary_base
        default = base == ModelConfig.model_fields["rotary_base"].default
        self.rotary.check(self.position, self.kv_channels, None if default else base)
        self.attention.check(bias=self.bias, crossed=self.family if self.blueprint.crossed else None)
        return self

    def _check_family_reads(self) -> None:
        for name in OWN_SETTINGS:
            value = getattr(self, name)
            if name not in self.blueprint.settings and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"model.{name}={written(value)} has no effect with model.family={self.family}: remove it"
                )
        if self.position not in self.blueprint.positions:
            raise ValueError(
                f"model.position={self.position} does not combine with model.family={self.family}: "
                f"choose one of {', '.join(self.blueprint.positions)}"
            )
        if self.logit_bias and self.head_transform:
            raise ValueError(
                f"model.logit_bias=true has no effect with model.family={self.family}, whose head has a bias "
                "on its logits: remove it, or set model.plain_head=true"
            )
        if not self.init.causal_correction and not any(stack.causal for stack in self.blueprint.stacks):
            raise ValueError(
                f"model.init.causal_correction=false has no effect with model.family={self.family}, "
                "which has no causal mask: remove it"
            )

    def _check_crossed(self) -> None:
        """What stacks with cross-attention do not have, and what only they read."""
        scheme = SCHEMES[self.scheme]
        if not self.blueprint.crossed:
            for name in scheme.cross_options:
                if self.scheme_options.get(name):
                    raise ValueError(
                        f"model.scheme_options.{name}=true has no effect with model.family={self.family}, "
                        "which has no cross-attention: remove it"
                    )
            if self.transfer.base_encoder_layers is not None:
                raise ValueError(
                    f"model.transfer.base_encoder_layers={self.transfer.base_encoder_layers} has no effect "
                    f"with model.family={self.family}, which has one stack: give model.transfer.base_layers"
                )
            return
        other = f"model.family={self.family}"
        for present, problem in (
            (
                bool(scheme.no_cross),
                f"model.scheme={self.scheme} has no rule for cross-attention, because {scheme.no_cross}, and "
                f"does not combine with {other}: choose another scheme",
            ),
            (
                self.groups != self.num_attention_heads,
                f"model.num_query_groups={self.groups} does not combine with {other}: "
                "cross-attention has as many key heads as query heads; remove it",
            ),
            (
                self.init.unigram and not self.logit_bias,
                f"model.init.unigram=true needs model.logit_bias=true with {other}: "
                "set it, or model.init.unigram=false",
            ),
            (
                self.position == "rotary"
                and len({self.of(stack).kv_channels for stack in self.blueprint.stacks}) > 1,
                f"model.position=rotary needs heads of one width: model.encoder_attention_heads="
                f"{self.encoder_attention_heads} gives another than model.num_attention_heads="
                f"{self.num_attention_heads}; set model.head_dim or remove the first",
            ),
            (
                self.position == "sinusoidal" and self.hidden_size % 2 == 1,
                f"model.position=sinusoidal needs an even model.hidden_size, got {self.hidden_size}",
            ),
        ):
            if present:
                raise ValueError(problem)

    def _check_window(self) -> None:
        window, every, base = self.window, self.global_every, self.rotary_base_local
        for name, present, missing in (
            ("global_every", every and not window, "without model.window"),
            ("global_first", self.global_first and not every, "without model.global_every"),
            ("rotary_base_local", base and not every, "without model.global_every"),
            ("rotary_base_local", base and self.position != "rotary", f"with model.position={self.position}"),
            ("window", window and not self.local_layers, f"in {self.num_layers} layers of which none has it"),
        ):
            if present:
                raise ValueError(f"model.{name}={getattr(self, name)} has no effect {missing}; remove it")
        if every and self.global_first >= every:
            raise ValueError(
                f"model.global_first={self.global_first} must be below model.global_every={every}: "
                f"the layer {every} before it would see all tokens too"
            )

    def _check_unigram(self) -> None:
        """Refuses `init.unigram` where no initial value can make the logits a constant."""
        if self.init.unigram and self.logit_soft_cap is not None:
            raise ValueError(
                f"model.init.unigram=true does not combine with model.logit_soft_cap={self.logit_soft_cap}, "
                "which bends the frequencies: remove one of them"
            )
        if not self.init.unigram or self.biased_logits:
            return
        for present, problem in (
            (not self.tie_embeddings, "model.tie_embeddings=false"),
            (not NORMS[self.normalization].centred, f"model.normalization={self.normalization}"),
            (self.depth_plan().last_norm is None, f"model.scheme={self.scheme}, which ends without a norm"),
        ):
            if present:
                raise ValueError(
                    f"model.init.unigram=true needs model.logit_bias=true with {problem}: "
                    "set it, or model.init.unigram=false"
                )

    def depth_plan(self) -> DepthPlan:
        """What the scheme makes of every layer of a model of one stack.

        Raises ValueError on options out of range, and UserError where there are more stacks.
        """
        return self.stack_plan(self.stack)

    @property
    def norms_embedding(self) -> bool:
        """Whether the embedding has a norm: as the model says, else as its scheme does."""
        own = self.embedding_norm
        return SCHEMES[self.scheme].embedding_norm if own is None else own

    def stack_plan(self, stack: Stack) -> DepthPlan:
        """What the scheme makes of every layer of a stack, by the stack's own depth.

        A stack that another one follows has the norm after it as one of its last layer.
        Raises ValueError on options out of range.
        """
        stacks = self.blueprint.stacks
        other = next((self.of(one).num_layers for one in stacks if one is not stack), None)
        plan = DepthPlan.of(
            self.scheme,
            self.of(stack).num_layers,
            self.scheme_options,
            sublayers=stack.sublayers,
            reach=self.of(stack).reach,
            other=other,
        )
        plan = replace(plan, embedding_norm=self.norms_embedding)
        if self.attention.qk_norm:
            plan = plan.with_score_norms()
        if not self.first_norm:
            plan = plan.without_first_norm()
        return plan if stack is stacks[-1] else plan.closed()

    def placed_layers(self) -> tuple[PlacedLayer, ...]:
        """All layers of the model in the order of the stream, stack after stack."""
        found: list[PlacedLayer] = []
        for stack in self.blueprint.stacks:
            plan = self.stack_plan(stack)
            for index, pair in enumerate(zip(plan.layers, plan.folded(), strict=True)):
                found.append(PlacedLayer(len(found), stack, index, len(plan.layers), *pair))
        return tuple(found)

    def of(self, stack: Stack) -> ModelConfig:
        """The same model with the sizes of one of its stacks: layers, heads and feed-forward.

        Its base of transfer is the stack's too.
        """
        if stack is self.blueprint.stacks[-1]:
            return self
        return self.model_copy(
            update={
                "num_layers": self.encoder_layers or self.num_layers,
                "num_attention_heads": self.encoder_attention_heads or self.num_attention_heads,
                "num_query_groups": None,
                "ffn_hidden_size": self.encoder_ffn_hidden_size or self.ffn_hidden_size,
                "transfer": self.transfer.of_encoder(),
            }
        )

    @property
    def total_layers(self) -> int:
        """Layers of all stacks."""
        return sum(self.of(stack).num_layers for stack in self.blueprint.stacks)

    def is_local(self, layer: int) -> bool:
        """Whether a layer, 0-based of the whole model, sees no more than the window."""
        if self.window is None or self.global_every is None:
            return self.window is not None
        return (layer - self.global_first) % self.global_every != 0

    @property
    def local_layers(self) -> int:
        """How many layers see no more than the window."""
        return sum(map(self.is_local, range(self.num_layers)))

    @property
    def reach(self) -> Reach | None:
        """From which depth settings of the last stack carry over; None where they do not."""
        base = self.transfer.base_layers
        return None if base is None else Reach(base, self.transfer.alpha)

    @property
    def deeper(self) -> float:
        """Layers of the last stack over those of the base of transfer; 1 without."""
        return self.num_layers / (self.transfer.base_layers or self.num_layers)

    @property
    def base_width(self) -> int:
        """Width of the base of transfer, which variances of tables and logits follow."""
        return self.transfer.base_hidden or self.hidden_size

    @property
    def wider(self) -> float:
        """Width over that of the base of transfer; 1 without."""
        return self.hidden_size / self.base_width

    @property
    def score_scale(self) -> float:
        """Factor on attention's scores beside 1 / sqrt(head width).

        With transfer they are divided by the head width, and equal at the base.
        """
        return math.sqrt((self.transfer.base_head_dim or self.kv_channels) / self.kv_channels)

    @property
    def blueprint(self) -> Family:
        """What the family says of its models."""
        return FAMILIES[self.family]

    @property
    def stack(self) -> Stack:
        """The stack that all layers are in.

        Raises UserError where there are more.
        """
        first, *others = self.blueprint.stacks
        if others:
            names = " and ".join(stack.name for stack in self.blueprint.stacks)
            raise UserError(
                f"model.family={self.family} has an {names}, and this serves models of one stack only: "
                f"it is not available for model.family={self.family}"
            )
        return first

    @property
    def biased_logits(self) -> bool:
        """Whether logits have a bias."""
        return self.logit_bias or self.head_transform

    @property
    def head_transform(self) -> bool:
        """Whether a dense layer, the activation and a norm stand before the output projection."""
        return self.blueprint.head.transform and not self.plain_head

    @property
    def plans_correlation(self) -> bool:
        """Whether initial weights follow from the token correlation of the embedding."""
        return self.init.base == "scheme" and SCHEMES[self.scheme].base == "deepscale"

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_width(self) -> int:
        """Entries of a head that turn with the position."""
        return self.rotary.width(self.kv_channels)

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate and an up projection (fc1 rows: [gate; up])."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ffn_size(self) -> int:
        """Feed-forward width after defaults."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.gated else 4 * self.hidden_size

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding table. Raises ValueError before the vocabulary is known."""
        if self.vocab_size is None:
            raise ValueError(
                "model.vocab_size is not known yet: give it, or take it from the data set's tokenizer"
            )
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
