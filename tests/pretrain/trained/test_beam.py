"""Beam search against all sequences there are, and against `generate` of transformers."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

from model.errors import UserError
from model.hf.crossed_reference import CrossedEvaluation
from model.parameters.names import named_parameters
from model.weights.init import logit_scale
from pretrain.trained.beam import Found, Search, search
from pretrain.trained.translate import Read
from tests.model.network.test_seq2seq import build

END = 2


class Stepping:
    """A model of transformers that has read sources, one forward pass over all tokens a step."""

    def __init__(self, model: BartForConditionalGeneration, source: Tensor, keep: Tensor) -> None:
        self.model, self.keep = model, keep
        self.memory = model.get_encoder()(input_ids=source, attention_mask=keep).last_hidden_state
        self.tokens = torch.empty(len(source), 0, dtype=torch.int64)

    def next(self, tokens: Tensor, rows: Tensor | None, sources: Tensor | None) -> Tensor:
        if sources is not None:
            self.memory, self.keep = self.memory[sources], self.keep[sources]
        before = self.tokens if rows is None else self.tokens[rows]
        self.tokens = torch.cat((before, tokens[:, None]), dim=1)
        count = len(self.tokens) // len(self.memory)
        found = self.model(
            encoder_outputs=(self.memory.repeat_interleave(count, dim=0),),
            attention_mask=self.keep.repeat_interleave(count, dim=0),
            decoder_input_ids=self.tokens,
            use_cache=False,
        )
        logits: Tensor = found.logits[:, -1]
        return logits


@pytest.fixture(scope="module")
def bart() -> BartForConditionalGeneration:
    """A random one that ends some sentences early and others not at all."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers",)}
    sizes |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        **sizes,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.35)
        model.final_logits_bias[0, END] = 2.0
    return model


@pytest.mark.parametrize(("beam", "penalty"), [(1, 0.6), (2, 0.0), (4, 0.6), (4, 2.0), (3, -0.5)])
def test_it_finds_what_generate_finds(bart: BartForConditionalGeneration, beam: int, penalty: float) -> None:
    generator = torch.Generator().manual_seed(3)
    source = torch.randint(3, 40, (12, 9), generator=generator)
    keep = (torch.arange(9) < torch.randint(2, 10, (12, 1), generator=generator)).long()
    settings: dict[str, Any] = {"length_penalty": penalty} if beam > 1 else {}
    theirs = bart.generate(
        input_ids=source,
        attention_mask=keep,
        num_beams=beam,
        num_return_sequences=beam,
        do_sample=False,
        max_new_tokens=15,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    with torch.no_grad():
        ours = search(Stepping(bart, source, keep), 12, Search(beam, penalty, 15, best=beam), END)
    flat = [one for sequences in ours for one in sequences]
    lengths = {len(one.ids) for one in flat}
    assert min(lengths) < 15  # of which some end by their mark, and some do not
    assert max(lengths) == 15
    for one, ids in zip(flat, theirs.sequences[:, 1:].tolist(), strict=True):
        assert one.ids == ids[: len(one.ids)]
        assert set(ids[len(one.ids) :]) <= {1}
    if beam > 1:
        scores = torch.tensor([one.score for one in flat])
        torch.testing.assert_close(scores, theirs.sequences_scores, rtol=1e-5, atol=1e-5)


def tiny() -> CrossedEvaluation:
    chunk, config = build("deepscalelm_post_ln", position="rotary", vocab_size=4, num_layers=2)
    weights = {one.name: one.parameter.detach().clone() for one in named_parameters(chunk, 0, 1)}
    return CrossedEvaluation(weights, config, logit_scale=logit_scale(config), dtype=torch.float64)


SOURCES = [[1, 3, 2], [3, 2], [1, 1, 3, 0, 3, 1, 2], [0, 2]]
LONGEST = 4


def everything(evaluation: CrossedEvaluation, source: list[int], penalty: float) -> list[Found]:
    """All sequences of up to LONGEST tokens, best first, each by a forward pass without a cache."""
    whole = product(range(4), repeat=LONGEST)
    ids = {tokens[: tokens.index(END) + 1] if END in tokens else tokens for tokens in whole}
    memory, found = evaluation.encode(torch.tensor([source])), []
    for length in range(1, LONGEST + 1):
        alike = torch.tensor([one for one in ids if len(one) == length])
        read = torch.cat((torch.full((len(alike), 1), END), alike[:, :-1]), dim=1)
        logits = evaluation.decode(read, memory)
        sums = logits.log_softmax(-1).gather(2, alike[..., None]).sum((1, 2)) / length**penalty
        found += [Found(*both) for both in zip(alike.tolist(), sums.tolist(), strict=True)]
    return sorted(found, key=lambda one: -one.score)


def padded(sources: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources as rows of one length, and 1 where there is a token."""
    longest = max(map(len, sources))
    ids = torch.tensor([one + [0] * (longest - len(one)) for one in sources])
    return ids, torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in sources])


@pytest.mark.parametrize("penalty", [0.0, 0.6, 1.5])
def test_a_beam_as_wide_as_all_sequences_finds_the_best(penalty: float) -> None:
    evaluation, width = tiny(), 256
    read = Read(evaluation, *padded(SOURCES), torch.device("cpu"))
    found = search(read, len(SOURCES), Search(width, penalty, LONGEST, best=width), END)
    for source, ours in zip(SOURCES, found, strict=True):
        theirs = everything(evaluation, source, penalty)
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        torch.testing.assert_close(
            torch.tensor([one.score for one in ours]), torch.tensor([one.score for one in theirs])
        )


@pytest.mark.parametrize("beam", [1, 3])
def test_company_changes_nothing(beam: int) -> None:
    """Sources of other lengths, which end at other steps."""
    evaluation, settings = tiny(), Search(beam, 0.6, 12, best=beam)

    def of(sources: list[list[int]]) -> list[list[Found]]:
        return search(Read(evaluation, *padded(sources), torch.device("cpu")), len(sources), settings, 1)

    together = of(SOURCES)
    assert len({len(one.ids) for sequences in together for one in sequences}) > 1
    for source, sequences in zip(SOURCES, together, strict=True):
        (alone,) = of([source])
        assert [one.ids for one in sequences] == [one.ids for one in alone]
        torch.testing.assert_close(
            torch.tensor([one.score for one in sequences], dtype=torch.float64),
            torch.tensor([one.score for one in alone], dtype=torch.float64),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"beam": 0}, "--beam 0"),
        ({"length_penalty": float("nan")}, "--length-penalty nan"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"beam": 2, "best": 3}, "--best 3 must lie between 1 and --beam 2"),
    ],
)
def test_settings_out_of_range_are_one_line(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Search(**given)
