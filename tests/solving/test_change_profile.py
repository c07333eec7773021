"""The profile of a change against counting entry by entry."""

import math

import pytest
import torch

from rect_lightning.solving import change_profile as module
from rect_lightning.solving.change_profile import BINS, HIGH, LOW, change_profile, smallest_kept


def test_a_profile_counts_each_entry_once(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 100)
    weight = torch.randn(40, 25, dtype=torch.float64)
    update = torch.randn(40, 25, dtype=torch.float64) * torch.logspace(-6, 2, 25, dtype=torch.float64)
    update[:10] = 0
    update[20, 0], weight[20, 1] = 1e-12, 0
    found = change_profile(update, weight)
    delta = [
        abs(u / w) if w else math.inf for u, w in zip(update.flatten().tolist(), weight.flatten().tolist(), strict=True)
    ]
    assert found.entries == 1000
    assert found.zero == 250
    assert found.below == sum(0 < d < 10**LOW for d in delta) > 0
    assert found.above == sum(d > 10**HIGH for d in delta) > 0
    for i in range(BINS):
        low, high = (10 ** (LOW + (HIGH - LOW) * (i + j) / BINS) for j in (0, 1))
        assert found.counts[i] == sum(low <= d < high for d in delta)
    for keep in (0.2, 0.4, 0.6, 0.8):
        expected = sorted(delta, reverse=True)[round(1000 * keep) - 1]
        assert found.thresholds[f"{keep:g}"] == pytest.approx(expected)
    assert found.norm == pytest.approx(float(update.norm()), rel=1e-5)
    assert found.weight_norm == pytest.approx(float(weight.norm()), rel=1e-5)


def test_an_infinite_threshold_is_none_since_json_knows_no_infinity():
    assert change_profile(torch.ones(10), torch.zeros(10)).thresholds["0.4"] is None


def test_the_smallest_kept():
    mask = torch.tensor([True, False, True])
    assert smallest_kept(torch.tensor([3.0, 1.0, 2.0]), mask) == 2
    assert smallest_kept(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.bool)) == math.inf
