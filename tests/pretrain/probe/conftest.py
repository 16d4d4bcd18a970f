"""What the tests of the probe share."""

from __future__ import annotations

import pytest

from pretrain.probe.records import Probe
from tests.pretrain.probe.probes import measured, model


@pytest.fixture(scope="module")
def sound() -> Probe:
    return measured(model("deepscalelm_pre_ln", 4))
