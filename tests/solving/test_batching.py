"""Rows put into batches: nothing lost, nothing twice, nothing out of place."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch

from rect_lightning.solving.batching import by_length, by_time, pad, padded

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [1, 20, 64, 10_000])
def test_every_index_once_and_within_the_budget(seed, budget):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 30) for _ in range(40)]
    batches = by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)


def test_batches_are_full():
    assert by_length([2] * 7, 6) == [[0, 1, 2], [3, 4, 5], [6]]
    assert by_length([1, 3, 3, 1], 6) == [[1, 2], [0, 3]]
    assert by_length([5, 9], 4) == [[1], [0]]
    assert by_length([], 4) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overhead", [0, 3, 50])
def test_no_way_of_cutting_takes_less_time(seed, overhead):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 12) for _ in range(9)]
    batches = by_time(lengths, 30, overhead=overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    in_order = sorted(lengths, reverse=True)
    assert [lengths[i] for batch in batches for i in batch] == in_order

    def time(parts: list[list[int]]) -> float:
        padded = [len(part) * max(part) for part in parts]
        return sum(overhead + p for p in padded) if max(padded) <= 30 else float("inf")

    best = min(
        time([in_order[a:b] for a, b in pairwise([0, *cuts, 9])])
        for count in range(9)
        for cuts in combinations(range(1, 9), count)
    )
    assert time([[lengths[i] for i in batch] for batch in batches]) == best


def test_a_few_rows_are_one_batch_and_many_have_little_padding():
    assert by_time([6, 6, 6, 1], 1024, overhead=40) == [[0, 1, 2, 3]]
    draw = random.Random(0)
    lengths = [draw.choice([1, 1, 2, 2, 3, 3, 4, 6, 9]) for _ in range(400)]
    batches = by_time(lengths, 1024, overhead=40)
    assert sum(lengths) > 0.8 * padded(lengths, batches)
    assert all(len(batch) * lengths[batch[0]] <= 1024 for batch in batches)


def test_tokens_with_padding():
    assert padded([3, 1, 2, 5], [[3], [1, 0], [2]]) == 5 + 2 * 3 + 2
    assert padded([], []) == 0


def test_rows_that_no_budget_holds_and_no_rows():
    assert by_time([50, 2], 10, overhead=5) == [[0], [1]]
    assert by_time([], 10, overhead=5) == []


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_of_nothing_is_refused(budget):
    with pytest.raises(ValueError, match=f"at least one token, got {budget}"):
        by_length([1, 2], budget)
    with pytest.raises(ValueError, match=f"at least one token, got {budget}"):
        by_time([1, 2], budget, overhead=1)


ROWS = [(5, 6, 7), (8,), (9, 10, 11, 12)]


def test_pad_on_the_right():
    batch = pad(ROWS, CPU)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert batch.starts.tolist() == [0, 0, 0]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3
    assert_rows(batch, ROWS)


def test_pad_with_anchors_in_one_column():
    anchors = [2, 0, 1]
    batch = pad(ROWS, CPU, anchors=anchors)
    assert batch.input_ids[:, 2].tolist() == [row[a] for row, a in zip(ROWS, anchors, strict=True)]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 1, 1, 1, 1]]
    assert batch.starts.tolist() == [0, 2, 1]
    assert_rows(batch, ROWS)


def assert_rows(batch, rows):
    """Each row's real tokens in order, their positions counted from zero."""
    for i, row in enumerate(rows):
        real = batch.attention_mask[i].bool()
        assert tuple(batch.input_ids[i][real].tolist()) == row
        assert batch.position_ids[i][real].tolist() == list(range(len(row)))
        assert int(real.nonzero()[0]) == int(batch.starts[i])
    assert (batch.position_ids >= 0).all()
    for tensor in (batch.input_ids, batch.attention_mask, batch.position_ids, batch.starts):
        assert tensor.dtype == torch.int64


def test_padding_does_not_matter_to_the_model(tiny):
    """What the model makes of each real token is what it makes of the row alone, on either side's padding."""
    rows = [tuple(torch.randint(2, 400, (n,)).tolist()) for n in (3, 11, 7)]
    for anchors in (None, [2, 5, 0], [0, 10, 6]):
        batch = pad(rows, CPU, anchors=anchors)
        with torch.no_grad():
            together = tiny.backbone(**batch.inputs(), use_cache=False).last_hidden_state
        for i, row in enumerate(rows):
            with torch.no_grad():
                alone = tiny.model.base_model(torch.tensor([row])).last_hidden_state[0]
            torch.testing.assert_close(together[i][batch.attention_mask[i].bool()], alone, rtol=1e-4, atol=1e-5)


def test_batches_of_so_many_rows_at_most():
    draw = random.Random(0)
    lengths = [draw.choice([1, 1, 2, 3, 4, 6, 9, 200]) for _ in range(403)]
    batches = by_time(lengths, 384, overhead=40, most=24)
    assert sorted(i for batch in batches for i in batch) == list(range(403))
    assert all(len(batch) * lengths[batch[0]] <= 384 for batch in batches)
    assert max(len(batch) for batch in batches) == 24
    assert {len(batch) for batch in batches if lengths[batch[0]] == 200} == {1}
