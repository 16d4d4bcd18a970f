"""A Hugging Face folder or Hub model -> configuration and canonical weights, tensor by tensor and bit by bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.errors import UserError
from model.hf.configs import SPECIAL
from model.hf.mapping import CanonicalWeights, Target, entries
from model.hf.read_config import read_config

# Tensors that some files carry and no weight depends on: GPT-2's causal mask, Llama's rotary frequencies.
_NO_WEIGHTS = re.compile(r"(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")


@dataclass(frozen=True)
class Imported:
    """weights: canonical names, fp32, converted as they are read. positions: rows of the position table, or the longest sequence.

    layout: whose tensor names the files have. special: token ids by the names in SPECIAL, those that are given.
    tokenizer: the files' SentencePiece model, where they have one.
    """

    config: ModelConfig
    weights: CanonicalWeights
    positions: int
    logit_scale: float
    layout: Target
    tokenizer: Path | None
    special: dict[str, Any]


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a model folder, read from disk as they are asked for. Raises UserError where the folder has no safetensors."""

    def __init__(self, folder: Path) -> None:
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            self._places = {
                name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()
            }
        elif single.exists():
            self._places = dict.fromkeys(_names(single), single)
        else:
            raise UserError(
                f"{folder} has no model.safetensors: load it with transformers and save it again with save_pretrained"
            )
        for path in set(self._places.values()):
            if not path.exists():
                raise UserError(
                    f"{path} is missing, although model.safetensors.index.json names it: download the model again"
                )

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._places[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Prefixed(Mapping[str, Tensor]):
    """Base-model files leave out the first part of every name (GPT-2 on the Hub has `h.0...`, not `transformer.h.0...`)."""

    def __init__(self, inner: Mapping[str, Tensor], prefix: str) -> None:
        self._inner = inner
        self._names = {
            name if name.startswith((prefix, "lm_head.")) else prefix + name: name for name in inner
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._inner[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def import_model(source: str | Path, *, vocab_multiple: int = 128) -> Imported:
    """Reads a local folder, or a model of the Hub by its name (downloading configuration and safetensors files).

    vocab_multiple: the embedding gets rows of zeros up to a multiple of this; they are masked in training and pruned in export.
    Raises UserError with the reason for a model that cannot be represented exactly: architecture, activation, rotary scaling, sliding window, biases,
    or tensors that have no place.
    """
    folder = Path(source) if Path(source).is_dir() else _download(str(source))
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: it is not a Hugging Face model")
    layout, config, positions, logit_scale = read_config(json.loads((folder / "config.json").read_text()))
    if layout != "fathom":
        config = config.model_copy(update={"vocab_multiple": vocab_multiple})
    files: Mapping[str, Tensor] = _Prefixed(
        SafetensorsFolder(folder), "transformer." if layout == "gpt2" else "model."
    )
    _check_names(files, layout, config, positions)
    weights = CanonicalWeights(files, layout, config, positions)
    tokenizer = next(
        (folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).exists()), None
    )
    return Imported(config, weights, positions, logit_scale, layout, tokenizer, _special(folder))


def _special(folder: Path) -> dict[str, Any]:
    """Special token ids of a folder: what generation uses goes before what the configuration says."""
    found: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        data = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        found |= {key: data[key] for key in SPECIAL if data.get(key) is not None}
    return found


def _names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _check_names(files: Mapping[str, Tensor], layout: Target, config: ModelConfig, positions: int) -> None:
    """Raises UserError naming the first tensor that is missing, or that config.json does not account for."""
    wanted = {name for entry in entries(layout, config, positions) for name in entry.hf}
    for name in sorted(wanted - set(files)):
        raise UserError(f"the model files have no tensor {name!r}, which config.json asks for")
    for name in sorted(set(files) - wanted):
        if not _NO_WEIGHTS.search(name) and not (name == "lm_head.weight" and config.tie_embeddings):
            raise UserError(
                f"the model files have a tensor {name!r}, which config.json does not account for: this is another architecture"
            )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name!r} is neither a folder nor a model that the Hub gives: {str(error).splitlines()[0]}"
        ) from error
