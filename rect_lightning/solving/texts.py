"""The token rows that an edit reads its keys from and searches its target values on."""

from __future__ import annotations

from collections.abc import Sequence

from rect_lightning.data.request import EditRequest
from rect_lightning.models.adapter import Adapter
from rect_lightning.models.encoding import Row, encode
from rect_lightning.solving.search_batches import SearchRows


def key_rows(adapter: Adapter, requests: Sequence[EditRequest], templates: Sequence[str]) -> list[Row]:
    """Each request's prompt in each template, subject marked: all templates of the first request, then of the second."""
    return _rows(adapter, requests, templates, targets=False)


def search_rows(adapter: Adapter, requests: Sequence[EditRequest], templates: Sequence[str]) -> list[SearchRows]:
    """Each request's prompt with its new target in each template, and the row "{subject} is a"."""
    rows = _rows(adapter, requests, templates, targets=True)
    essences = encode(
        adapter.tokenizer,
        [f"{request.subject} is a" for request in requests],
        subject_ends=[len(request.subject) for request in requests],
    )
    n = len(templates)
    return [
        SearchRows(targets=tuple(rows[i * n : (i + 1) * n]), essence=essence, id=request.id)
        for i, (request, essence) in enumerate(zip(requests, essences, strict=True))
    ]


def answer_rows(adapter: Adapter, requests: Sequence[EditRequest]) -> list[Row]:
    """Each request's prompt with its new target, target marked."""
    rows = encode(adapter.tokenizer, [r.text for r in requests], [r.target_new for r in requests])
    for request, row in zip(requests, rows, strict=True):
        _check_length(adapter, request, row)
    return rows


def _rows(adapter: Adapter, requests: Sequence[EditRequest], templates: Sequence[str], *, targets: bool) -> list[Row]:
    prompts, ends = [], []
    for request in requests:
        for template in templates:
            before = template.partition("{}")[0] + request.prompt.partition("{}")[0]
            prompts.append(template.replace("{}", request.prompt, 1).replace("{}", request.subject, 1))
            ends.append(len(before) + len(request.subject))
    wanted = [request.target_new for request in requests for _ in templates] if targets else None
    rows = encode(adapter.tokenizer, prompts, wanted, ends)
    for i, row in enumerate(rows):
        name = requests[i // len(templates)].id
        if row.target <= row.subject:
            raise ValueError(
                f"Request {name}: one token spans the end of its subject and its target; reword the prompt."
            )
        _check_length(adapter, requests[i // len(templates)], row)
    return rows


def _check_length(adapter: Adapter, request: EditRequest, row: Row) -> None:
    if len(row.ids) > adapter.context_length:
        raise ValueError(
            f"Request {request.id} has {len(row.ids)} tokens with its prefix, more than the "
            f"model's {adapter.context_length} positions: shorten its prompt or the prefixes."
        )
