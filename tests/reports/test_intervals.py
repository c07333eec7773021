"""Student's t against the printed tables."""

import pytest

from rect_lightning.reports.intervals import t_interval, t_quantile


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_quantiles_are_those_of_the_tables(degrees, quantile):
    assert t_quantile(degrees) == pytest.approx(quantile, abs=5e-4)


def test_other_confidences():
    assert t_quantile(5, 0.9) == pytest.approx(2.015, abs=5e-4)
    assert t_quantile(5, 0.99) == pytest.approx(4.032, abs=5e-4)


def test_interval_of_a_mean():
    low, high = t_interval([1.0, 2.0, 3.0])
    assert (low + high) / 2 == pytest.approx(2)
    assert (high - low) / 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-5)
