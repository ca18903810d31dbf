import math
from itertools import pairwise

import pytest

from ijepa_zoo.train.schedules import cosine, linear, warmup_cosine

LR = {"start": 2e-4, "peak": 1e-3, "final": 1e-6, "warmup_steps": 40, "horizon": 300}


def test_warmup_cosine():
    curve = [warmup_cosine(step, **LR) for step in range(400)]
    assert curve[0] == pytest.approx(2e-4 + 8e-4 / 40)
    assert curve[39] == 1e-3 == max(curve)
    assert all(a < b for a, b in pairwise(curve[:40]))
    assert all(a > b for a, b in pairwise(curve[39:300]))
    assert curve[169] == pytest.approx((1e-3 + 1e-6) / 2)
    assert curve[299:] == [pytest.approx(1e-6)] * 101


def test_no_warmup():
    assert warmup_cosine(0, **{**LR, "warmup_steps": 0}) == pytest.approx(
        1e-6 + (1e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi / 300))
    )
    assert warmup_cosine(0, **{**LR, "warmup_steps": 1, "horizon": 1}) == 1e-3


def test_cosine_rises_and_stays():
    curve = [cosine(step, first=0.04, final=0.4, horizon=100) for step in range(150)]
    assert all(a < b for a, b in pairwise(curve[:100]))
    assert curve[49] == pytest.approx(0.22)
    assert curve[99:] == [pytest.approx(0.4)] * 51


def test_linear():
    assert linear(0, first=0.996, final=1.0, horizon=10) == 0.996
    assert linear(5, first=0.996, final=1.0, horizon=10) == pytest.approx(0.998)
    assert linear(25, first=0.996, final=1.0, horizon=10) == 1.0
