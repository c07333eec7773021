"""Running statistics against those of all rows at once."""

import pytest
import torch

from rect_lightning.solving.running_statistics import RunningStatistics


@pytest.mark.parametrize("sizes", [(1, 1), (1, 30), (30, 1), (7, 2, 5, 1)])
def test_parts_add_up_to_the_whole(sizes):
    rows = (torch.randn(sum(sizes), 9) * torch.logspace(-3, 3, 9) + 1000 * torch.randn(9)).double()
    parts = [RunningStatistics.of(part) for part in rows.split(sizes)]
    total = sum(parts, start=RunningStatistics.none(9))
    assert total.count == len(rows)
    torch.testing.assert_close(total.mean, rows.mean(0))
    torch.testing.assert_close(total.squares / (total.count - 1), rows.var(0), rtol=1e-9, atol=0)


def test_normalised_rows_have_mean_zero_and_deviation_one():
    rows = 5 + 3 * torch.randn(40, 6).double()
    found = RunningStatistics.of(rows).normalise(rows)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.mean(0), torch.zeros(6).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(6).double(), atol=1e-6, rtol=0)


def test_what_never_varies_is_zero():
    rows = torch.randn(5, 3)
    rows[:, 1] = 0
    assert (RunningStatistics.of(rows).normalise(rows)[:, 1] == 0).all()
