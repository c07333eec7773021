"""Whether edits took: efficacy, generalisation and locality of a batch of requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from math import exp
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from rect_lightning.metrics.forward import check_lengths
from rect_lightning.metrics.scoring import TargetScore, score_targets
from rect_lightning.metrics.wild import FreeAnswer, Wild, check_free, free_answers
from rect_lightning.models.encoding import encode

if TYPE_CHECKING:
    from rect_lightning.data.request import EditRequest
    from rect_lightning.models import Adapter


@dataclass(frozen=True, slots=True)
class Pair:
    """The two answers to one prompt.

    Attributes:
        new: The request's new target.
        true: What was true before; after a neighbour's prompt the neighbour's answer. None where it is not known.
        free: What the model answers by itself, where it was asked.
    """

    new: TargetScore
    true: TargetScore | None
    free: FreeAnswer | None = None


@dataclass(frozen=True, slots=True)
class RequestScores:
    """What a model makes of one request.

    Attributes:
        rewrite: The answers to the request's own prompt.
        paraphrases: The answers to each of its paraphrases.
        neighbours: The answers to each neighbour's prompt.
    """

    rewrite: Pair
    paraphrases: tuple[Pair, ...] = ()
    neighbours: tuple[Pair, ...] = ()


SCORES = (RequestScores, Pair, TargetScore, FreeAnswer)
"""The classes that a request's scores are made of."""


def evaluate(
    adapter: Adapter, requests: Sequence[EditRequest], *, wild: Wild | None = None, show_progress: bool = False
) -> list[RequestScores]:
    """Score all prompts of all requests with the model as it stands now.

    Args:
        adapter: The model and its tokenizer.
        requests: The requests; nothing is edited.
        wild: How to ask for free answers to rewrite prompts and paraphrases, None for none.
        show_progress: Whether to show a bar.

    Returns:
        One record a request, in the order given.

    Raises:
        ValueError: As `score_targets` and `free_answers`.
    """
    questions = _questions(requests)
    prompts, targets = _asked(questions)
    scores = iter(score_targets(adapter, prompts, targets, show_progress=show_progress))
    pairs = (Pair(next(scores), None if true is None else next(scores)) for *_, true in questions)
    free: Iterator[FreeAnswer | None] = repeat(None)
    if wild is not None:
        free = iter(free_answers(adapter, *_open_questions(requests), wild, show_progress=show_progress))
    return [
        RequestScores(
            rewrite=replace(next(pairs), free=next(free)),
            paraphrases=tuple(replace(next(pairs), free=next(free)) for _ in request.paraphrases),
            neighbours=tuple(next(pairs) for _ in request.neighbours),
        )
        for request in requests
    ]


def check_requests(adapter: Adapter, requests: Sequence[EditRequest], *, wild: Wild | None = None) -> None:
    """Refuse requests that `evaluate` could not measure, before anything is spent on them.

    Raises:
        ValueError: A prompt with its answer does not fit the model's context, or a target the length of a free answer.
    """
    if wild is not None:
        check_free(adapter, *_open_questions(requests), wild)
    prompts, targets = _asked(_questions(requests))
    check_lengths(adapter, [len(row.ids) for row in encode(adapter.tokenizer, prompts, targets)], prompts)


def _questions(requests: Sequence[EditRequest]) -> list[tuple[str, str, str | None]]:
    """Every prompt with the new target and the other answer, in the order of the requests."""
    questions: list[tuple[str, str, str | None]] = []
    for request in requests:
        questions.append((request.text, request.target_new, request.target_true))
        questions.extend((prompt, request.target_new, request.target_true) for prompt in request.paraphrases)
        questions.extend((n.prompt, request.target_new, n.answer) for n in request.neighbours)
    return questions


def _open_questions(requests: Sequence[EditRequest]) -> tuple[list[str], list[str]]:
    """Each request's own prompt and paraphrases, and the new target as often."""
    asked = [(prompt, request.target_new) for request in requests for prompt in (request.text, *request.paraphrases)]
    return [prompt for prompt, _ in asked], [target for _, target in asked]


def _asked(questions: Sequence[tuple[str, str, str | None]]) -> tuple[list[str], list[str]]:
    """The prompts and the answers to score, pairs in order."""
    asked = [(prompt, target) for prompt, *targets in questions for target in targets if target is not None]
    return [prompt for prompt, _ in asked], [target for _, target in asked]


_TAKEN = ("probability", "magnitude", "exact", "token")
_FREE = ("wild", "wild_begins")
_NAMES = (
    *(f"{group}/{name}" for group in ("efficacy", "generalisation", "locality") for name in _TAKEN),
    "locality/unchanged",
    *(f"{group}/{name}" for group in ("efficacy", "generalisation") for name in _FREE),
)


class EditMetrics(Metric):
    """Efficacy, generalisation and locality, by every definition in use; `DEFINITIONS` says what each name means.

    Each value is the mean over the prompts of a request, then over the requests that have such prompts, as in the
    CounterFact evaluation of Meng et al. 2022. A name without data is left out, so before the first update ``compute``
    returns an empty dictionary (with torchmetrics' warning). All values are float64 and higher is better.

    The sums are float64, whatever dtype the module around the metric is cast to between updates.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("total", "count"):
            self.add_state(state, torch.zeros(len(_NAMES), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, after: Sequence[RequestScores], clean: Sequence[RequestScores] | None = None) -> None:
        """Take in the scores of some requests.

        Args:
            after: Scores by the edited model.
            clean: Scores of the same requests by the model before any edit, for ``locality/unchanged``.

        Raises:
            ValueError: ``clean`` is not of the same requests.
        """
        total, count = _edit_metrics_update(after, clean)
        # not in place: float64 wins over the bf16 that `module.to(torch.bfloat16)` turns an empty state into
        self.total = self.total + total.to(self.total.device)
        self.count = self.count + count.to(self.count.device)

    def compute(self) -> dict[str, Tensor]:
        """The value of each name that has data, float64 scalars."""
        return _edit_metrics_compute(self.total, self.count)

    def counts(self) -> dict[str, int]:
        """How many requests each value is the mean of, in this process; the score is a mean of means and has none."""
        return {name: int(count) for name, count in zip(_NAMES, self.count, strict=True) if count > 0}


def request_metrics(
    after: Sequence[RequestScores], clean: Sequence[RequestScores] | None = None
) -> list[dict[str, float]]:
    """The values of `EditMetrics` for each request alone: which edits took and which did not."""
    found = []
    for i, scores in enumerate(after):
        values = _edit_metrics_compute(*_edit_metrics_update([scores], None if clean is None else [clean[i]]))
        found.append({name: float(value) for name, value in values.items()})
    return found


def _edit_metrics_update(
    after: Sequence[RequestScores], clean: Sequence[RequestScores] | None
) -> tuple[Tensor, Tensor]:
    """The sum over requests of each name's mean over prompts, and how many requests have it."""
    total, count = (dict.fromkeys(_NAMES, 0.0) for _ in range(2))
    if clean is not None and len(clean) != len(after):
        raise ValueError(f"clean has {len(clean)} requests, after {len(after)}: both must score the same requests.")
    for i, scores in enumerate(after):
        groups = {
            "efficacy": [_edited(scores.rewrite)],
            "generalisation": [_edited(pair) for pair in scores.paraphrases],
            "locality": [_taken(pair.true, pair.new) for pair in scores.neighbours if pair.true is not None],
        }
        if clean is not None:
            groups["locality"] += [{"unchanged": share} for share in _unchanged(scores, clean[i], i)]
        for group, prompts in groups.items():
            for name in (*_TAKEN, *_FREE, "unchanged"):
                if values := [prompt[name] for prompt in prompts if name in prompt]:
                    total[f"{group}/{name}"] += fmean(values)
                    count[f"{group}/{name}"] += 1
    sums, counts = (torch.tensor([*values.values()], dtype=torch.float64) for values in (total, count))
    return sums, counts


def _edited(pair: Pair) -> dict[str, float]:
    """Whether a prompt gets the new target, teacher-forced and, where the model was asked, freely."""
    values = _taken(pair.new, pair.true)
    if pair.free is not None:
        values |= {"wild": float(pair.free.exact), "wild_begins": float(pair.free.begins)}
    return values


def _taken(wanted: TargetScore, other: TargetScore | None) -> dict[str, float]:
    """Whether a prompt gets the wanted answer and not the other one."""
    values = {"exact": float(wanted.exact), "token": wanted.token_accuracy}
    if other is not None:
        values["probability"] = float(wanted.log_prob > other.log_prob)
        values["magnitude"] = exp(wanted.log_prob) - exp(other.log_prob)
    return values


def _unchanged(after: RequestScores, clean: RequestScores, number: int) -> Iterator[float]:
    answers, clean_answers = ([pair.true for pair in s.neighbours if pair.true is not None] for s in (after, clean))
    if [a.target for a in answers] != [c.target for c in clean_answers]:
        raise ValueError(
            f"Request {number} has other neighbours in clean than in after: both must score the same ones."
        )
    for answer, clean_answer in zip(answers, clean_answers, strict=True):
        yield fmean(a == c for a, c in zip(answer.predicted, clean_answer.predicted, strict=True))


def _edit_metrics_compute(total: Tensor, count: Tensor) -> dict[str, Tensor]:
    values = {name: total[i] / count[i] for i, name in enumerate(_NAMES) if count[i] > 0}
    parts = [values[name] for g in ("efficacy", "generalisation", "locality") if (name := f"{g}/probability") in values]
    if len(parts) == 3:
        values["score/probability"] = 3 / (1 / torch.stack(parts)).sum()  # 1 / 0 is inf, which makes the score 0
    return values
