"""A Hugging Face folder or Hub model -> configuration and canonical weights, bit by bit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.hub import download
from model.hf.mapping import CanonicalWeights, Entry, entries, fixed_positions
from model.hf.names.conversions import FINAL_BIAS, GEMMAS, Target
from model.hf.names.tables import LOGIT_BIAS_HF
from model.hf.settings.read import read_config
from model.hf.settings.read_images import image_facts
from model.hf.settings.read_speech import speech_facts
from model.hf.settings.records import ADVICE, Special
from model.hf.source import SafetensorsFolder, source_file
from model.hf.tokenizer.table import FILES, tokenizer_in
from model.parameters.table import Role, parameter_table
from model.records import read_json, read_record
from model.words import printable

# Tensors that some files carry and no weight depends on:
# GPT-2's and GPT-NeoX's causal masks, Llama's rotary frequencies, BERT's numbers of positions.
_NO_WEIGHTS = re.compile(
    r"(\.(attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|embeddings\.position_ids)$"
)
# The tied output projection: GPT-2's and others', BERT's, the second place of BERT's bias,
# and further places of the words of BART and others.
_TIED = re.compile(
    r"^(lm_head\.weight|embed_out\.weight|decoder\.weight|cls\.predictions\.decoder\.(weight|bias)"
    r"|model\.(shared|(encoder|decoder)\.embed_tokens)\.weight)$"
)
# Marian's fixed positions, which older files have.
_FIXED = re.compile(r"^model\.(encoder|decoder)\.embed_positions\.weight$")
# What BERT was trained with beside masked language modelling: whether two sentences follow.
_LEFT_OUT = re.compile(r"^(bert\.pooler\.|cls\.seq_relationship\.)")
# Old files call a norm's gain and bias so.
_OLD_LEAVES = {"gamma": "weight", "beta": "bias"}
ELEMENTS = ("F32", "F16", "BF16", "F64")
"""Element types of weights, as safetensors calls them. All but the last are exact in fp32."""
MOST_PADDING = 1 << 16
"""Largest multiple that a vocabulary is padded to."""


@dataclass(frozen=True)
class Imported:
    """What a folder holds."""

    config: ModelConfig
    weights: CanonicalWeights
    """Canonical names, fp32, converted as they are read."""
    positions: int
    """Rows of the position table, or the longest sequence."""
    logit_scale: float
    layout: Target
    """Whose tensor names the files have."""
    tokenizer: Path | None
    """The files' own, where they have one."""
    special: dict[str, object]
    """Token ids by the names in SPECIAL, those that are given."""
    left_out: tuple[str, ...] = ()
    """Tensors of the files that masked language modelling does not read."""
    inputs: dict[str, dict[str, object]] = field(default_factory=dict)
    """Of images their classes, mean and standard deviation, of speech how frames are made.

    Empty where the folder does not tell.
    """


class _Prefixed(Mapping[str, Tensor]):
    """Tensors under the names of a whole model.

    Base-model files leave out the first part:
    GPT-2 on the Hub has `h.0...`, not `transformer.h.0...`.
    prefixes: the first part, and those of tensors that stand beside it.
    """

    def __init__(self, inner: SafetensorsFolder, prefixes: tuple[str, ...]) -> None:
        self._inner = inner
        self._names = {
            _new_leaf(name if name.startswith(prefixes) else prefixes[0] + name): name for name in inner
        }

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, element type) of a tensor."""
        return self._inner.facts(self._names[name])

    def __getitem__(self, name: str) -> Tensor:
        return self._inner[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _WithZeros(Mapping[str, Tensor]):
    """Files, and zeros for what an architecture may leave out. zeros: name -> shape."""

    def __init__(self, inner: _Prefixed, zeros: Mapping[str, tuple[int, ...]]) -> None:
        self._inner, self._zeros = inner, zeros

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, element type) of a tensor."""
        return (self._zeros[name], "F32") if name in self._zeros else self._inner.facts(name)

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(self._zeros[name]) if name in self._zeros else self._inner[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._zeros
        yield from (name for name in self._inner if name not in self._zeros)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Multiplied(Mapping[str, Tensor]):
    """Files of which some tensors are multiplied, in float64, and rounded to float32."""

    def __init__(self, inner: _Files, names: frozenset[str], factor: float) -> None:
        self._inner, self._names, self._factor = inner, names, factor

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """(shape, element type) of a tensor."""
        return self._inner.facts(name)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._inner[name]
        return (tensor.double() * self._factor).float() if name in self._names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


_Files = _Prefixed | _WithZeros | _Multiplied


def _new_leaf(name: str) -> str:
    head, dot, leaf = name.rpartition(".")
    return head + dot + _OLD_LEAVES.get(leaf, leaf)


PREFIXES: dict[Target, tuple[str, ...]] = {
    "gpt2": ("transformer.", "lm_head."),
    "llama": ("model.", "lm_head."),
    "opt": ("model.", "lm_head."),
    "bert": ("bert.", "cls."),
    "megatron-bert": ("bert.", "cls."),
    "eurobert": ("model.", "lm_head."),
    "modernbert": ("model.", "head.", "decoder."),
    "mistral": ("model.", "lm_head."),
    **dict.fromkeys(FINAL_BIAS, ("model.", "lm_head.", "final_logits_bias")),
    "qwen2": ("model.", "lm_head."),
    "qwen3": ("model.", "lm_head."),
    "gpt_neox": ("gpt_neox.", "embed_out."),
    **dict.fromkeys(GEMMAS, ("model.", "lm_head.")),
    "vit": ("vit.", "classifier."),
    "fathom": ("model.", "lm_head.", "head.", "patches.", "class_token", LOGIT_BIAS_HF["fathom"]),
}
"""What the names of a whole model begin with; the first part is what base-model files leave out."""


def import_model(source: str | Path, *, vocab_multiple: int = 128) -> Imported:
    """Reads a local folder, or a model of the Hub by its name, whose files are downloaded.

    vocab_multiple: the embedding gets rows of zeros up to a multiple of this.
    They are masked in training and cut off by an export.
    No weight is read yet, but all names, shapes and element types are compared.
    Raises UserError with the reason for a folder that is damaged, or a model that cannot be
    represented exactly: architecture, activation, rotary scaling, sliding window, biases,
    or tensors that have no place.
    """
    folder = _folder(source)
    path = source_file(folder, "config.json")
    if path is None:
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face model")
    content = read_json(path, ADVICE)
    read = read_config(content, str(path))
    layout, config = read.layout, read.config
    if layout != "fathom":
        config = config.model_copy(update={"vocab_multiple": vocab_multiple})
    if not 1 <= config.vocab_multiple <= MOST_PADDING:
        said = f"{path}: vocab_multiple=" if layout == "fathom" else "--vocab-multiple "
        raise UserError(f"{said}{config.vocab_multiple} must lie between 1 and {MOST_PADDING}")
    whole = _Prefixed(SafetensorsFolder(folder), PREFIXES[layout])
    if config.num_layers > len(whole):
        raise UserError(
            f"{path} asks for {config.num_layers} layers, "
            f"but the model files have {len(whole)} tensors only: "
            f"{ADVICE}"
        )
    todo = entries(layout, config, read.positions)
    zeros = {} if read.norm_bias else _norm_biases(todo, config)
    if layout in FINAL_BIAS and LOGIT_BIAS_HF[layout] not in whole:
        zeros[LOGIT_BIAS_HF[layout]] = (1, config.vocab_size or 0)
    given = _WithZeros(whole, zeros) if zeros else whole
    files: _Files = given
    if read.word_factor != 1:
        words = {row.name for row in parameter_table(config) if row.role is Role.WORD}
        scaled = frozenset(name for entry in todo if entry.canonical in words for name in entry.hf)
        files = _Multiplied(given, scaled, read.word_factor)
    _check_names(files, todo, config)
    _check_facts(files, todo, config)
    for name in FILES:  # whichever of them is taken, and what is taken with it
        source_file(folder, name)
    tokenizer = tokenizer_in(folder, source_file)
    weights = CanonicalWeights(files, todo, config)
    left_out = tuple(sorted(filter(_LEFT_OUT.match, files)))
    processor, inputs = source_file(folder, "preprocessor_config.json"), {}
    if config.image is not None:
        inputs["images"] = image_facts(content, str(path), processor)
    if config.speech is not None:
        inputs["speech"] = speech_facts(processor, config.speech.filters)
    special = _special(folder)
    told = {kind: facts for kind, facts in inputs.items() if facts}
    return Imported(
        config, weights, read.positions, read.logit_scale, layout, tokenizer, special, left_out, told
    )


def _norm_biases(todo: list[Entry], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name in the files -> shape of the bias of every norm."""
    own = {row.name for row in parameter_table(config) if row.role is Role.NORM_BIAS}
    biases = [entry for entry in todo if entry.canonical in own]
    return {name: shape for entry in biases for name, shape in entry.shapes(config).items()}


def _folder(source: str | Path) -> Path:
    try:
        local = Path(source).is_dir()
    except OSError:  # a name that is too long for a folder
        local = False
    return Path(source) if local else download(str(source), ["*.json", "*.safetensors", *FILES])


def _special(folder: Path) -> dict[str, object]:
    """Special token ids of a folder.

    What generation uses goes before what the configuration says.
    """
    found: dict[str, object] = {}
    for name in ("config.json", "generation_config.json"):
        if path := source_file(folder, name):
            found |= read_record(path, Special, ADVICE).model_dump(exclude_none=True)
    return found


def _check_names(files: _Files, todo: list[Entry], config: ModelConfig) -> None:
    """Raises UserError naming the first tensor that is missing, or one too many.

    The latter is one that config.json does not account for.
    """
    wanted = {name for entry in todo for name in entry.hf}
    missing = sorted(wanted - set(files))
    if config.head_transform and missing and not any(name.startswith("cls.") for name in files):
        raise UserError(
            f"the model files have no head of a masked language model ({missing[0]!r} is missing): "
            "name the files of a model for masked language modelling"
        )
    for name in missing:
        raise UserError(f"the model files have no tensor {name!r}, which config.json asks for")
    for name in sorted(set(files) - wanted):
        tied = config.tie_embeddings and _TIED.match(name)
        if config.position == "sinusoidal" and _FIXED.match(name):
            _check_fixed(name, files[name], config)
            continue
        if not (_NO_WEIGHTS.search(name) or tied or _LEFT_OUT.match(name)):
            raise UserError(
                f"the model files have a tensor {printable(repr(name))}, which config.json does not "
                "account for: this is another architecture"
            )


def _check_fixed(name: str, given: Tensor, config: ModelConfig) -> None:
    """Raises UserError for positions in the files that are no sines and cosines."""
    if given.dim() != 2 or given.shape[1] != config.hidden_size:
        raise UserError(f"{name} has shape {tuple(given.shape)}, and hidden_size={config.hidden_size}")
    difference = float((given.float() - fixed_positions(config, len(given)).float()).abs().max())
    if not difference < 1e-4:
        raise UserError(
            f"{name} has learned positions, up to {difference:.2g} away from the sines and cosines of its "
            "class: transformers itself drops them when it saves the model, and they are not read"
        )


def _check_facts(files: _Files, todo: list[Entry], config: ModelConfig) -> None:
    """Raises UserError naming the first tensor that is wrong.

    It has another shape than config.json gives, or is no weight.
    """
    for entry in todo:
        for name, shape in entry.shapes(config).items():
            given, element = files.facts(name)
            if given != shape:
                raise UserError(f"{name} has shape {given}, but config.json gives {shape}")
            if element not in ELEMENTS:
                raise UserError(
                    f"{name} has elements of type {element}; weights are read from {', '.join(ELEMENTS)}: "
                    "save the model again in one of these"
                )
