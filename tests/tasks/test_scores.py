from __future__ import annotations

from decimal import Decimal

import pytest

from rect_lightning.tasks.scores import Ratio, exact, f1, last_number, rouge, summarise


def test_wilson_by_hand():
    """7 of 10: (0.7 + z²/20 ± z sqrt(0.021 + z²/400)) / (1 + z²/10) with z = 1.96."""
    score = summarise([1.0] * 7 + [0.0] * 3)
    assert score.value == pytest.approx(0.7)
    assert (score.low, score.high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))
    none = summarise([0.0] * 4)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.4899, abs=1e-4)


def test_the_interval_of_a_mean_is_nearly_the_normal_one():
    values = [i / 99 for i in range(100)]
    score = summarise(values)
    assert score.value == pytest.approx(0.5)
    half = 1.96 * 0.2916 / 10  # the standard deviation of a uniform distribution
    assert score.low == pytest.approx(0.5 - half, abs=0.01)
    assert score.high == pytest.approx(0.5 + half, abs=0.01)
    assert summarise(values) == score


def test_a_ratio_is_of_sums_and_groups_are_averaged():
    parts = [Ratio((1, 0, 0), (1, 4, 0)), Ratio((1, 1, 0), (3, 0, 0))]
    assert summarise(parts).value == pytest.approx((2 / 4 + 1 / 4) / 2), "the third group has no data"
    assert summarise([Ratio((0.0,), (0.0,))]).value == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 12 + 6 = 18.", "18"),
        ("She makes $1,234.50", "1234.50"),
        ("between 3 and -4", "-4"),
        ("7, 8, and", "8"),
        ("a loss of -$5", "-5"),
        ("H2O", None),
        ("none at all", None),
        ("", None),
        ("about .5", "0.5"),
        ("2x", "2"),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_exact_and_f1_are_those_of_squad():
    assert exact("The Eiffel-Tower!", ["x", "eiffeltower"]) == 1
    assert exact("Eiffel", ["Eiffel Tower"]) == 0
    assert f1("the Eiffel", ["Eiffel Tower", "nothing"]) == pytest.approx(2 / 3)
    assert f1("go go go", ["go now"]) == pytest.approx(2 * 1 / 5)
    assert f1("", ["a"]) == 1, "nothing is left of either"
    assert f1("", ["b"]) == 0


def test_rouge_by_hand():
    """cat sat down / the cat sat: 2 of 3 words, 1 of 2 bigrams."""
    assert rouge("cat sat down", "the cat sat") == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3})
    assert rouge("", "the cat") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}
