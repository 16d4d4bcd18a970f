"""Changes of images are pure functions of seed and number, and do what their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pretrain.config.sections.augment import Augment
from pretrain.data.images.augment import Draws, View, mixture

PIXELS = torch.arange(2 * 6 * 5, dtype=torch.uint8).reshape(2, 6, 5)
VIEW = View((6, 5), torch.zeros(2, 1, 1), torch.full((2, 1, 1), 1 / 255))
"""Shows pixels as they are."""


def views(augment: Augment, view: View = VIEW, count: int = 200) -> list[torch.Tensor]:
    return [view.changed(PIXELS, augment, Draws(7, index)) for index in range(count)]


def test_nothing_asked_for_changes_nothing() -> None:
    assert all(torch.allclose(one, PIXELS.float()) for one in views(Augment(), count=3))
    assert torch.allclose(VIEW.plain(PIXELS), PIXELS.float())


def test_a_number_gives_the_same_image_again() -> None:
    everything = Augment(flip=True, min_area=0.2)
    for first, second in zip(views(everything, count=20), views(everything, count=20), strict=True):
        assert torch.equal(first, second)
    assert len({one.numpy().tobytes() for one in views(everything)}) > 50


def test_one_half_is_turned() -> None:
    turned = [torch.allclose(one, PIXELS.float().flip(2)) for one in views(Augment(flip=True))]
    assert 70 < sum(turned) < 130


def test_shifts_go_every_way_and_leave_the_mean_behind() -> None:
    found = views(Augment(shift=1))
    padded = torch.nn.functional.pad(PIXELS.float(), (1, 1, 1, 1))
    places = set()
    for one in found:
        places |= {
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.allclose(one, padded[:, top : top + 6, left : left + 5])
        }
    assert len(places) == 9


def test_a_smaller_model_sees_parts_in_training_and_the_middle_after_it() -> None:
    small = View((2, 3), VIEW.mean, VIEW.std)
    assert torch.allclose(small.plain(PIXELS), PIXELS[:, 2:4, 1:4].float())
    corners = {round(float(one[0, 0, 0])) for one in views(Augment(), small)}
    assert corners == {int(PIXELS[0, top, left]) for top in range(5) for left in range(3)}


def test_parts_have_the_size_of_the_model_and_any_area_from_the_least_on() -> None:
    gradient = View((4, 4), VIEW.mean[:1], VIEW.std[:1])
    ramp = torch.arange(60, dtype=torch.uint8).expand(1, 60, 60)
    seen = [gradient.changed(ramp, Augment(min_area=0.25), Draws(1, index)) for index in range(300)]
    assert {tuple(one.shape) for one in seen} == {(1, 4, 4)}
    # Four columns of a part are a quarter of its width apart.
    widths = torch.stack([(one[0, 0, -1] - one[0, 0, 0]) * 4 / 3 for one in seen])
    assert 25 * 0.8 < float(widths.min()) < 30
    assert 55 < float(widths.max()) <= 61


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_have_the_moments_of_beta(alpha: float) -> None:
    draws = Draws(0, 0)
    shares = np.array([draws.share(alpha) for _ in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)


def test_mixtures_are_weighted_sums() -> None:
    torch.testing.assert_close(mixture(torch.ones(2), torch.zeros(2), 0.3), torch.full((2,), 0.3))
