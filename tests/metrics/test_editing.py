from __future__ import annotations

from math import exp
from types import SimpleNamespace

import pytest
import torch

from rect_lightning.metrics import DEFINITIONS, EditMetrics, Pair, RequestScores, TargetScore, evaluate
from tests.metrics.naive import target_log_probs


def score(probability, hits, *, places=4, predicted=None):
    """A score of a target of ``places`` tokens of which the first ``hits`` are predicted."""
    target = tuple(range(places))
    given = tuple(i if i < hits else 99 for i in range(places)) if predicted is None else predicted
    return TargetScore(torch.tensor(probability, dtype=torch.float64).log().item(), target=target, predicted=given)


def request(rewrite, paraphrases=(), neighbours=()):
    return RequestScores(Pair(*rewrite), tuple(Pair(*p) for p in paraphrases), tuple(Pair(*n) for n in neighbours))


# Pairs are (new, true). Four requests; the second has no true target, the third neither paraphrase nor neighbour.
FIRST = request(
    rewrite=(score(0.6, 4), score(0.1, 0)),
    paraphrases=[(score(0.3, 4), score(0.1, 0)), (score(0.1, 1), score(0.2, 4)), (score(0.2, 0), score(0.4, 4))],
    neighbours=[(score(0.1, 0), score(0.5, 4)), (score(0.3, 0), score(0.2, 2)), (score(0.4, 0), score(0.3, 1))],
)
SECOND = request(rewrite=(score(0.5, 3), None), paraphrases=[(score(0.5, 4), None)])
THIRD = request(rewrite=(score(0.2, 2), score(0.3, 0)))
FOURTH = request(
    rewrite=(score(0.7, 4), score(0.2, 0)),
    paraphrases=[(score(0.4, 0), score(0.1, 0))],
    neighbours=[(score(0.2, 0), score(0.3, 4))],
)
REQUESTS = [FIRST, SECOND, THIRD, FOURTH]
CLEAN = [
    request(
        rewrite=(score(0.1, 0), score(0.6, 0)),
        paraphrases=[(score(0.1, 0), score(0.2, 4))] * 3,
        neighbours=[
            (score(0.1, 0), score(0.5, 4)),  # 4 of 4 as before
            (score(0.1, 0), score(0.5, 3)),  # 3 of 4: wrong at the last place then and now
            (score(0.1, 0), score(0.5, 0, predicted=(7, 7, 7, 7))),  # 0 of 4
        ],
    ),
    SECOND,
    THIRD,
    request(rewrite=(score(0.1, 0), score(0.6, 0)), neighbours=[(score(0.1, 0), score(0.5, 3))]),  # 3 of 4
]
EXPECTED = {
    "efficacy/probability": (1 + 0 + 1) / 3,  # the second has no true target
    "efficacy/magnitude": (0.5 - 0.1 + 0.5) / 3,
    "efficacy/exact": (1 + 0 + 0 + 1) / 4,
    "efficacy/token": (1 + 3 / 4 + 2 / 4 + 1) / 4,
    "generalisation/probability": (1 / 3 + 1) / 2,
    "generalisation/magnitude": ((0.2 - 0.1 - 0.2) / 3 + 0.3) / 2,
    "generalisation/exact": (1 / 3 + 1 + 0) / 3,
    "generalisation/token": ((4 / 4 + 1 / 4 + 0) / 3 + 1 + 0) / 3,
    "locality/probability": (1 / 3 + 1) / 2,
    "locality/magnitude": ((0.4 - 0.1 - 0.1) / 3 + 0.1) / 2,
    "locality/exact": (1 / 3 + 1) / 2,
    "locality/token": ((1 + 2 / 4 + 1 / 4) / 3 + 1) / 2,
    "locality/unchanged": ((1 + 3 / 4 + 0) / 3 + 3 / 4) / 2,
}


def computed(after, clean=None):
    metric = EditMetrics()
    metric.update(after, clean)
    return {name: value.item() for name, value in metric.compute().items()}


def test_every_name_has_its_hand_computed_value():
    values = computed(REQUESTS, CLEAN)
    overall = 3 / (3 / 2 + 3 / 2 + 3 / 2)
    assert values == pytest.approx(EXPECTED | {"score/probability": overall})


def test_each_name_is_told_from_every_other():
    """All values differ, so that no two definitions can be swapped unnoticed."""
    after = request(
        rewrite=(score(0.5, 7, places=8), score(0.1, 0)),
        paraphrases=[(score(0.5, 8, places=8), score(0.1, 0))] * 4
        + [(score(0.1, 3, places=8), score(0.2, 0))] * 2
        + [(score(0.3, 8, places=8), score(0.7, 0))],
        neighbours=[(score(0.1, 0), score(0.4, 4))] * 2
        + [(score(0.1, 0), score(0.25, 3))] * 5
        + [(score(0.3, 0), score(0.2, 0))] * 2,
    )
    clean = request(rewrite=(score(0.5, 0), score(0.5, 0)), neighbours=[(score(0.5, 0), score(0.5, 1))] * 9)
    values = computed([after], [clean])
    assert values == pytest.approx(
        {
            "efficacy/probability": 1,
            "efficacy/magnitude": 0.4,
            "efficacy/exact": 0,
            "efficacy/token": 7 / 8,
            "generalisation/probability": 4 / 7,
            "generalisation/magnitude": (4 * 0.4 - 2 * 0.1 - 0.4) / 7,
            "generalisation/exact": 5 / 7,
            "generalisation/token": (5 + 2 * 3 / 8) / 7,
            "locality/probability": 7 / 9,
            "locality/magnitude": (2 * 0.3 + 5 * 0.15 - 2 * 0.1) / 9,
            "locality/exact": 2 / 9,
            "locality/token": (2 + 5 * 3 / 4) / 9,
            "locality/unchanged": (2 * 1 / 4 + 5 * 2 / 4 + 2 * 3 / 4) / 9,
            "score/probability": 3 / (1 + 7 / 4 + 9 / 7),
        }
    )
    assert len({round(value, 6) for value in values.values()}) == len(values) == len(EXPECTED) + 1


def test_all_names_are_defined():
    free = {f"{group}/{name}" for group in ("efficacy", "generalisation") for name in ("wild", "wild_begins")}
    assert set(computed(REQUESTS, CLEAN)) | {"efficacy/generated"} | free == set(DEFINITIONS)


def test_names_without_data_are_left_out():
    assert set(computed([SECOND])) == {
        "efficacy/exact",
        "efficacy/token",
        "generalisation/exact",
        "generalisation/token",
    }
    assert "locality/unchanged" not in computed(REQUESTS)
    assert "score/probability" not in computed([THIRD])


def test_the_score_is_zero_where_a_part_is():
    lost = Pair(score(0.1, 0), score(0.6, 0))
    after = RequestScores(lost, FOURTH.paraphrases, FOURTH.neighbours)
    assert computed([after])["score/probability"] == 0


def test_a_tie_is_no_success():
    tied = request((score(0.5, 0), score(0.5, 0)), neighbours=[(score(0.5, 0), score(0.5, 0))])
    values = computed([tied])
    assert values["efficacy/probability"] == 0
    assert values["locality/probability"] == 0


def test_a_broken_model_scores_nothing():
    nan = TargetScore(float("nan"), target=(1,), predicted=(0,))
    values = computed([request((nan, nan), neighbours=[(nan, nan)])])
    assert values["efficacy/probability"] == 0
    assert values["locality/probability"] == 0


def test_compute_before_any_update_is_empty_and_warns():
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert EditMetrics().compute() == {}


def test_updates_add_up_whatever_the_batches():
    metric = EditMetrics()
    for after, clean in zip(REQUESTS, CLEAN, strict=True):
        metric.update([after], [clean])
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(computed(REQUESTS, CLEAN))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_ranks_are_summed(cut):
    """Two ranks with unequal shares, one perhaps empty: the states go through torchmetrics' own reduction."""
    ranks = [EditMetrics(), EditMetrics()]
    ranks[0].update(REQUESTS[:cut], CLEAN[:cut])
    ranks[1].update(REQUESTS[cut:], CLEAN[cut:])
    gathered = {id(getattr(ranks[0], state)): getattr(ranks[1], state) for state in ("total", "count")}
    metric = ranks[0]
    metric.dist_sync_fn = lambda tensor, group=None: [tensor, gathered[id(tensor)]]
    metric.distributed_available_fn = lambda: True
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(computed(REQUESTS, CLEAN))


def test_sums_stay_exact_when_the_module_around_is_cast():
    metric = EditMetrics().to(torch.bfloat16)
    metric.update([FIRST] * 1001 + [THIRD])  # neither 1001 nor 1002 is a bf16 number
    values = metric.compute()
    assert values["efficacy/probability"].dtype == torch.float64
    assert values["efficacy/probability"].item() == pytest.approx(1001 / 1002, abs=1e-12)


def test_clean_scores_of_other_requests_are_refused():
    with pytest.raises(ValueError, match="clean has 1 requests, after 4"):
        EditMetrics().update(REQUESTS, CLEAN[:1])
    with pytest.raises(ValueError, match="Request 0 has other neighbours"):
        EditMetrics().update([FIRST, SECOND], [SECOND, FIRST])


def edit(text, new, true=None, paraphrases=(), neighbours=()):
    return SimpleNamespace(
        text=text,
        target_new=new,
        target_true=true,
        paraphrases=paraphrases,
        neighbours=tuple(SimpleNamespace(prompt=p, answer=a) for p, a in neighbours),
    )


def test_evaluate_asks_the_right_questions(tiny):
    requests = [
        edit(
            "The mother tongue of Danielle Darrieux is",
            "English",
            "French",
            ("I think Danielle Darrieux speaks", "You know"),
            [("The Eiffel Tower is located in the city of", "Paris, in France"), ("I think", "so")],
        ),
        edit("The capital of Spain is", "Rome, in Italy", None, ("The city of Madrid is",), [("What is", "it")]),
        edit("LeBron James plays", "the sport of religion", "basketball"),
    ]
    results = evaluate(tiny, requests)
    assert [(len(r.paraphrases), len(r.neighbours)) for r in results] == [(2, 2), (1, 1), (0, 0)]

    def check(score, prompt, target):
        if target is None:
            assert score is None
            return
        log_probs, ids, likeliest = zip(*target_log_probs(tiny, prompt, target), strict=True)
        assert score.log_prob == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-5)
        assert (score.target, score.predicted) == (ids, likeliest)

    for wanted, result in zip(requests, results, strict=True):
        check(result.rewrite.new, wanted.text, wanted.target_new)
        check(result.rewrite.true, wanted.text, wanted.target_true)
        for pair, prompt in zip(result.paraphrases, wanted.paraphrases, strict=True):
            check(pair.new, prompt, wanted.target_new)
            check(pair.true, prompt, wanted.target_true)
        for pair, neighbour in zip(result.neighbours, wanted.neighbours, strict=True):
            check(pair.new, neighbour.prompt, wanted.target_new)
            check(pair.true, neighbour.prompt, neighbour.answer)


def test_unedited_models_are_unchanged(tiny):
    requests = [edit("I think", "so", "it", neighbours=[("You know", "it"), ("The city", "of Paris")])]
    clean = evaluate(tiny, requests)
    assert computed(clean, clean)["locality/unchanged"] == 1


def test_magnitude_is_the_difference_of_geometric_means():
    new = TargetScore(-1.5, target=(1, 2), predicted=(0, 0))
    true = TargetScore(-0.25, target=(1, 2), predicted=(0, 0))
    assert computed([request((new, true))])["efficacy/magnitude"] == pytest.approx(exp(-1.5) - exp(-0.25))
