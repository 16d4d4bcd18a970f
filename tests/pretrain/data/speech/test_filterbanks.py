"""Filterbanks are those of transformers, whatever file the sound comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import Speech2TextFeatureExtractor

from pretrain.data.speech.audio import TooLongError, read_clip
from pretrain.data.speech.filterbanks import RATE, loaded, log_mel, own_scale, stored
from tests.pretrain.clips import spoken, write_clip

CLIP = spoken(["red", "grey", "black"])


@pytest.mark.parametrize("filters", [23, 80])
def test_filterbanks_are_those_of_speech2text(filters: int) -> None:
    ours = log_mel(CLIP, filters)
    plain, scaled = (
        Speech2TextFeatureExtractor(
            feature_size=filters, num_mel_bins=filters, do_ceptral_normalize=normalised
        )(CLIP, sampling_rate=RATE)["input_features"][0]
        for normalised in (False, True)
    )
    assert ours.shape == (1 + (len(CLIP) - 400) // 160, filters)
    # Both are rounded to fp32, of values up to 30; theirs has means in fp32 as well.
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(own_scale(ours), scaled, rtol=0, atol=5e-5)


def test_what_is_stored_is_within_half_a_step() -> None:
    values = np.concatenate((log_mel(CLIP, 8).ravel(), [-64.0, 63.99, 1e9]))
    found = loaded(stored(values))
    np.testing.assert_allclose(found[:-1], values[:-1], rtol=0, atol=1 / 1024 + 1e-6)
    assert found[-1] == pytest.approx(64, abs=0.01)


def test_a_filter_that_hears_nothing_is_zero() -> None:
    values = np.ones((5, 2), dtype=np.float32)
    values[:, 1] = range(5)
    scaled = own_scale(values)
    assert not scaled[:, 0].any()
    assert scaled[:, 1].std() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_files_give_one_channel_at_16_khz(tmp_path: Path, kind: str) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype(np.float32) / 2
    write_clip(tmp_path / f"x.{kind}", np.stack((tone, np.zeros_like(tone)), axis=1), 8000)
    found = read_clip(tmp_path / f"x.{kind}")
    assert len(found) == RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE) / 4
    assert np.abs(found - expected)[100:-100].max() < 2e-3  # the ends of a filter
    assert np.array_equal(found, read_clip((tmp_path / f"x.{kind}").read_bytes()))
    with pytest.raises(TooLongError, match=r"1 s, the most is 0.5 s"):
        read_clip(tmp_path / f"x.{kind}", 0.5)
