"""An exported encoder-decoder that translates, by `generate` of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model.errors import UserError
from model.hf.trust import own_code
from model.words import printable
from pretrain.trained.beam import Found, Search


class ExportTranslator:
    """A folder of `fathom export`, as a `Translator`. On a GPU where there is one, in fp32."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError for another kind of model, no tokenizer, or code that is not ours."""
        import torch
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        trusted = own_code(folder)
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            if not config.is_encoder_decoder:
                raise UserError(
                    f"{folder} holds no encoder-decoder: `fathom translate` is for models that translate"
                )
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(
                folder, trust_remote_code=trusted, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            line = printable(str(error).splitlines()[0])
            raise UserError(f"{folder} cannot be loaded as an exported model ({line})") from None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.eval().to(self.device)
        # Settings of the folder that a search would follow beside those that it is told.
        self.model.generation_config.max_length = None
        self.name = str(folder)
        end = model.generation_config.eos_token_id
        if not isinstance(end, int):
            raise UserError(f"{folder} names eos_token_id={end}, and a translation ends with one end mark")
        self.end = end
        self.new_tokens: int = config.max_position_embeddings
        # Of our own class; all others have tables of positions.
        limited = getattr(config, "position", "learned") == "learned"
        source: int = getattr(config, "max_source_positions", None) or self.new_tokens
        self.longest_new = self.new_tokens if limited else None
        self.longest = source if limited else None

    def encode(self, text: str) -> list[int]:
        """As `Translator`."""
        text.encode()  # lone surrogates are no text
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """As `Translator`."""
        known = [index for index in ids if index < len(self.tokenizer)]
        text: str = self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def search(self, sources: Sequence[list[int]], settings: Search) -> list[list[Found]]:
        """As `Translator`."""
        import torch

        longest = max(map(len, sources))
        padding = self.model.generation_config.pad_token_id
        fill = self.end if padding is None else padding
        ids = torch.tensor([[*one, *[fill] * (longest - len(one))] for one in sources])
        keep = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in sources])
        penalty = {"length_penalty": settings.length_penalty} if settings.beam > 1 else {}
        out = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=keep.to(self.device),
            do_sample=False,
            num_beams=settings.beam,
            num_return_sequences=settings.best,
            max_new_tokens=settings.max_new_tokens,
            early_stopping=False,
            return_dict_in_generate=True,
            output_scores=True,
            **penalty,
        )
        found = [self._cut(row) for row in out.sequences[:, 1:].tolist()]
        if settings.beam > 1:
            scores = out.sequences_scores.tolist()
        else:
            steps = self.model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
            scores = [
                float(row[: len(one)].sum()) / len(one) ** settings.length_penalty
                for row, one in zip(steps, found, strict=True)
            ]
        both = [Found(*pair) for pair in zip(found, scores, strict=True)]
        return [both[at : at + settings.best] for at in range(0, len(both), settings.best)]

    def _cut(self, ids: list[int]) -> list[int]:
        """Ids up to the end mark."""
        return ids[: ids.index(self.end) + 1] if self.end in ids else ids
