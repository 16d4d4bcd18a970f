"""What is measured of frames is what convolutions with random weights make of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.speech import NO_DATA
from pretrain.data.speech.filterbanks import log_mel, own_scale
from pretrain.data.speech.statistics import frame_moments
from tests.pretrain.clips import spoken

CHANNELS, WIDTH, FILTERS = 4096, 2048, 20


def test_moments_are_those_of_wide_random_convolutions() -> None:
    # Frames that have something in common.
    clips = [own_scale(log_mel(spoken(["red", "grey", "blue"][:n], n), FILTERS)) + 0.7 for n in (2, 3)]
    told = frame_moments(clips)
    generator = torch.Generator().manual_seed(0)

    def weights(out: int, entering: int, variance: float) -> torch.Tensor:
        return torch.randn(out, entering, 5, generator=generator) * (variance / (5 * entering)) ** 0.5

    first, second = (
        weights(CHANNELS, FILTERS, 1 / told.entering),
        weights(WIDTH, CHANNELS // 2, 1 / told.middle),
    )
    entering, leaving, own, shared, pairs = [], [], 0.0, 0.0, 0
    for clip in clips:
        u = F.conv1d(torch.from_numpy(clip).T[None], first, stride=2, padding=2)
        v = F.conv1d(F.glu(u, dim=1), second, stride=2, padding=2)
        x = F.glu(v, dim=1)[0].T
        entering.append(u.square().mean((0, 1)))
        leaving.append(v.square().mean((0, 1)))
        gram = x @ x.T / x.shape[1]
        own, shared = own + float(gram.trace()), shared + float(gram.sum() - gram.trace())
        pairs += len(x) * (len(x) - 1)
    tokens = sum(map(len, leaving))
    assert float(torch.cat(entering).mean()) == pytest.approx(1, abs=0.05)
    assert float(torch.cat(leaving).mean()) == pytest.approx(1, abs=0.05)
    assert own / tokens == pytest.approx(told.leaving, rel=0.05)
    assert shared / pairs / (own / tokens) == pytest.approx(told.correlation, abs=0.03)


def test_clips_of_one_token_say_nothing() -> None:
    assert frame_moments([np.ones((4, 3), np.float32)]) == NO_DATA
