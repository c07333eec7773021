"""RECT's selection against its definition, entry by entry."""

import math

import pytest
import torch

from rect_lightning.solving import relative_change as rc


def naive_mask(update, weight, keep):
    """Sort all entries by (δ descending, position) in Python."""

    def delta(i):
        u, w = float(update.flatten()[i]), float(weight.flatten()[i])
        return (math.inf if u else 0.0) if w == 0 else abs(u) / abs(w)

    order = sorted(range(update.numel()), key=lambda i: (-delta(i), i))
    mask = torch.zeros(update.numel(), dtype=torch.bool)
    mask[order[: round(keep * update.numel())]] = True
    return mask.view(update.shape)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.4, 0.5, 0.999, 1.0])
def test_keeps_the_largest_relative_changes(keep):
    update, weight = torch.randn(37, 23, dtype=torch.float64), torch.randn(37, 23, dtype=torch.float64)
    mask = rc.largest(rc.relative_change(update, weight), keep)
    assert torch.equal(mask, naive_mask(update, weight, keep))
    assert int(mask.sum()) == round(keep * update.numel())


def test_zero_weights_and_ties():
    update = torch.tensor([[1.0, 0.0, 2.0, 1.0], [1.0, 3.0, 1.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0, 0.0, 1.0], [-1.0, 1.0, 1.0, 5.0]])
    delta = rc.relative_change(update, weight)
    assert delta.tolist() == [[1, 0, math.inf, 1], [1, 3, 1, 0]]
    for kept in range(9):
        assert torch.equal(rc.largest(delta, kept / 8), naive_mask(update, weight, kept / 8)), kept


def test_a_change_that_is_no_number_stays_none():
    delta = rc.relative_change(torch.tensor([torch.nan, 0.0, 0.0, torch.inf]), torch.tensor([1.0, 0.0, torch.nan, 2.0]))
    assert delta[0].isnan()
    assert delta[1:].tolist() == [0, 0, math.inf]


@pytest.mark.parametrize("shape", ["distinct", "ties", "few values", "half zero", "infinite", "sorted"])
def test_large_matrices_are_selected_exactly(shape, monkeypatch):
    monkeypatch.setattr(rc, "_SMALL", 1000)  # so that the sampling path runs, and misses its bracket, at test size
    monkeypatch.setattr(rc, "_SAMPLE", 300)
    n = 20_011
    delta = torch.rand(n)
    if shape == "ties":
        delta = (delta * 50).round() / 50
    elif shape == "few values":
        delta = (delta > 0.3).float()
    elif shape == "half zero":
        delta[: n // 2] = 0
    elif shape == "infinite":
        delta[::3] = math.inf
    elif shape == "sorted":
        delta = delta.sort().values
    for keep in (0.0001, 0.2, 0.4, 0.6, 0.9999):
        expected = torch.zeros(n, dtype=torch.bool)
        expected[delta.sort(descending=True, stable=True).indices[: round(keep * n)]] = True
        assert torch.equal(rc.largest(delta, keep), expected), keep


@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_what_is_no_number_is_told(keep):
    with pytest.raises(ValueError, match="1 of 5 entries are nan"):
        rc.largest(torch.tensor([1.0, 2.0, 3.0, math.nan, 0.0]), keep)


def test_more_than_2_to_the_24_entries():
    """Where ``torch.quantile`` gives up."""
    n = 2**24 + 12345
    delta = torch.rand(n)
    mask = rc.largest(delta, 0.4)
    assert int(mask.sum()) == round(0.4 * n)
    assert delta[mask].min() >= delta[~mask].max()


def test_statistics():
    weight, update = torch.tensor([1.0, -2.0, 4.0, 0.0]), torch.tensor([0.1, 0.1, -1.0, 1.0])
    found = rc.change_statistics(update, rc.relative_change(update, weight), [0.077, 0.171])
    assert found == {
        "manhattan": pytest.approx(2.2, rel=1e-6),
        "above_0.077": 0.75,  # δ = 0.1, 0.05, 0.25, inf
        "above_0.171": 0.5,
    }


def test_the_manhattan_distance_of_a_large_matrix():
    """One fp32 sum over as many entries is off by several per cent."""
    update = torch.randn(4096, 5000)
    found = rc.change_statistics(update, update.abs(), [])["manhattan"]
    assert found == pytest.approx(float(update.double().abs().sum()), rel=1e-6)


@pytest.mark.parametrize("small", [1 << 20, 1000])
@pytest.mark.parametrize("values", ["distinct", "ties", "few values"])
def test_one_threshold_over_several_tensors(values, small, monkeypatch):
    monkeypatch.setattr(rc, "_SMALL", small)
    monkeypatch.setattr(rc, "_SAMPLE", 300)
    tensors = [torch.rand(size) * (i + 1) for i, size in enumerate([7, 9_001, 1, 30, 6_000, 2])]
    if values == "ties":
        tensors = [(x * 50).round() / 50 for x in tensors]
    elif values == "few values":
        tensors = [(x > 0.3).float() for x in tensors]
    tensors[1] = tensors[1].view(9_001, 1).double()  # of other shapes and dtypes
    sizes = [x.numel() for x in tensors]
    joined = torch.cat([x.flatten() for x in tensors])
    for keep in (0.0, 0.0001, 0.2, 0.4, 0.9999, 1.0):
        expected = torch.zeros(len(joined), dtype=torch.bool)
        expected[joined.sort(descending=True, stable=True).indices[: round(keep * len(joined))]] = True
        found = rc.largest_of_all(lambda i: tensors[i], sizes, keep)
        assert torch.equal(torch.cat(found), expected), keep


def test_half_precision_is_compared_in_fp32():
    update, weight = torch.randn(50).bfloat16(), torch.randn(50).half()
    delta = rc.relative_change(update, weight)
    assert torch.equal(delta, (update.float() / weight.float()).abs())
    found = rc.change_statistics(torch.full((4, 30_000), 3.0, dtype=torch.float16), delta, [])["manhattan"]
    assert found == 360_000
